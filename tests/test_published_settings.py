"""What published checkpoints say beside their weights: settings and tensors that change what these
mean, and such that training has no use for.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.files.hf import quantization_config
from falqon_fx.files.places import in_own_dtype
from falqon_fx.site.numerics import E4M3
from tests import zoo
from tests.folders import IDS, WIDE, dense_model, exported, folder_of, lora, prequantize
from tests.models import fill_b
from tests.refusals import assert_refused, edit, lose, put, settings
from tests.test_block_scales import INV, UP, by_transformers, published

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


def test_fp8_is_never_read_as_integers(tmp_path):
    """Bytes under the dtype of integers, with a scale for all of a weight."""
    folder = published(tmp_path / "fp8", True)
    for file in folder.glob("*.safetensors"):
        tensors = safetensors.load_file(file)
        own = {n: t.view(torch.int8) if t.dtype == E4M3 else t for n, t in tensors.items()}
        own = {n: t.flatten()[:1] if n.endswith("_inv") else t for n, t in own.items()}
        safetensors.save_file(own, file, metadata={"format": "pt"})
    assert_refused(folder, "_proj", r"has it in INT8, by its config\.json weights are FP8")


def test_what_training_has_no_use_for_is_left_out(tmp_path):
    """Zero points that are zero, of symmetric scales, and with a warning scales of a cache: what
    `prequantize` writes can be loaded.
    """
    folder = published(tmp_path / "fp8", True)

    def more(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight_zero_point"] = torch.zeros(6, 2).to(E4M3)
        tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    edit(folder, more)
    with pytest.warns(UserWarning, match="holds 1 scales of an FP8 cache"):
        wanted = falqon_fx.adapters(falqon_fx.load(folder, lora()))
    with pytest.warns(UserWarning, match="holds 1 scales of an FP8 cache"):
        prequantize(tmp_path / "fp8", tmp_path / "out")
    found = falqon_fx.adapters(falqon_fx.load(tmp_path / "out"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[path].base(), state.base()) for path, state in wanted.items())


def test_attention_that_is_quantized_is_left_out(tmp_path):
    """A group of compressed-tensors that has no weights, and its scales."""
    exported(tmp_path)
    activations = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"targets": ["LlamaAttention"], "weights": None, "input_activations": activations}

    def more(content: dict[str, Any]) -> None:
        content["quantization_config"]["config_groups"]["attention"] = group

    settings(tmp_path, more)
    (file,) = tmp_path.glob("*.safetensors")
    scales = {f"model.layers.0.self_attn.{n}_scale": torch.ones(1) for n in "qkv"}
    own = {**safetensors.load_file(file), **scales}
    safetensors.save_file(own, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="holds 3 scales of an FP8 cache"):
        assert len(falqon_fx.adapters(falqon_fx.load(tmp_path, lora()))) == 14


def test_weights_for_rotated_activations_are_refused(tmp_path):
    """SpinQuant's R4 of compressed-tensors; what is of weights alone is in them already."""
    apply = [{"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True}]
    scheme: dict[str, Any] = {"type": "hadamard", "head_dim": 32, "apply": apply}
    folder = published(tmp_path / "fp8", True)

    def rotate(content: dict[str, Any]) -> None:
        content["quantization_config"]["transform_config"] = {"config_groups": {"R4": scheme}}

    settings(folder, rotate)
    assert len(falqon_fx.adapters(falqon_fx.load(folder, lora()))) == 14
    apply.append({"targets": ["re:.*down_proj$"], "location": "input"})
    settings(folder, rotate)
    assert_refused(folder, "fp8", r"made for a transform of activations \(R4: input\)")


def test_settings_are_read_where_they_are(tmp_path):
    """DeepSeek V4's dtype of experts beside those of its quantization, V4.1's among them; those of
    the text model of a larger one.
    """
    given: dict[str, Any] = {"quant_method": "fp8"}
    for content in (
        {"expert_dtype": "fp4", "quantization_config": given},
        {"expert_dtype": "fp8", "quantization_config": {**given, "expert_dtype": "fp4"}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert quantization_config(tmp_path) == {**given, "expert_dtype": "fp4"}
    inside = {"text_config": {"quantization_config": given}, "quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(inside))
    assert quantization_config(tmp_path) == given
    (tmp_path / "config.json").write_text(json.dumps({"expert_dtype": "bf16"}))
    assert quantization_config(tmp_path) == {}


# -- tensors beside the weights --------------------------------------------------------------------


def in_bfloat16(folder: Path, **more: Any) -> Path:
    """A checkpoint that says so, as published ones do."""
    published(folder, True)
    settings(folder, lambda content: content.update(dtype="bfloat16", **more))
    return folder


def test_tensors_have_the_dtypes_in_which_transformers_loads_them(tmp_path):
    """Those of config.json: norms in float32 would meet weights in bfloat16."""
    folder = in_bfloat16(tmp_path / "fp8")
    names = ("model.norm.weight", "model.layers.0.input_layernorm.weight")

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: 1.001 * tensors[name].float() for name in names}

    edit(folder, widen)
    prequantize(tmp_path / "fp8", tmp_path / "out")
    for model in (falqon_fx.load(folder, lora()), falqon_fx.load(tmp_path / "out")):
        for name in names:
            found = model.get_parameter(f"base_model.model.{name}")
            assert torch.equal(found, torch.full_like(found, 1.001))
            assert found.dtype == torch.bfloat16
        assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_dense_checkpoint_keeps_its_dtype(tmp_path, dtype):
    """Which is then that of all, whatever config.json says."""
    folder_of(dense_model(dtype=dtype, **WIDE), tmp_path / "dense")
    settings(tmp_path / "dense", lambda content: content.update(dtype="bfloat16"))
    falqon_fx.prequantize(tmp_path / "dense", tmp_path / "out", lora(), progress=False)
    model = falqon_fx.load(tmp_path / "out")
    assert {p.dtype for n, p in model.named_parameters() if p.is_floating_point() and
            ".lora_" not in n} == {dtype}  # fmt: skip
    merged: Any = falqon_fx.merge_and_unload(model)
    assert merged(input_ids=IDS).logits.dtype == dtype


def test_a_router_stays_in_float32_where_transformers_keeps_it_there():
    class Router(nn.Module):
        _keep_in_fp32_modules_strict = ("gate.weight",)
        config = SimpleNamespace(dtype=torch.bfloat16)

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.proj = (nn.Linear(2, 2, bias=False).bfloat16() for _ in range(2))

        def get_base_model(self) -> nn.Module:
            return self

    for dtype in (torch.float32, torch.bfloat16):
        given = {f"{name}.weight": torch.ones(2, 2, dtype=dtype) for name in ("gate", "proj")}
        found = {
            name: tensor.dtype
            for name, tensor in in_own_dtype(Router(), given, {"bfloat16"}).items()
        }
        assert found == {"gate.weight": torch.float32, "proj.weight": torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
def test_a_head_of_its_own_is_not_tied(tmp_path, dtype):
    """transformers leaves it apart, whatever config.json says; with the same values it is tied."""
    folder, table = in_bfloat16(tmp_path / "fp8", tie_word_embeddings=True), "model.embed_tokens"
    edit(folder, put("lm_head.weight", Tensor.clone, of=f"{table}.weight"))
    model: Any = falqon_fx.load(folder, lora()).get_base_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    edit(folder, put("lm_head.weight", lambda t: (t.float() + 1).to(dtype)))
    if dtype == E4M3:
        edit(folder, put("lm_head.weight_scale_inv", lambda t: t[:4], of=INV))
    assert_refused(folder, r"lm_head\.weight", "another weight for .*, and its config.json ties")


@pytest.mark.parametrize(
    ("change", "site", "told"),
    [
        (
            lambda t: t.update({"more.weight": torch.ones(2)}),
            r"more\.weight",
            "it is in .* but not",
        ),
        (lose("model.norm.weight"), r"model\.norm\.weight", "the model needs it"),
        (put("model.norm.weight", Tensor.clone, of=INV), r"norm\.weight", r"\[6, 2\], the model"),
    ],
    ids=["unknown", "missing", "shape"],
)
def test_what_can_not_be_loaded_is_not_prequantized(tmp_path, change, site, told):
    """It is refused by the same words, before hours of casting."""
    edit(in_bfloat16(tmp_path / "fp8"), change)
    assert_refused(tmp_path / "fp8", site, told)


def test_modules_that_are_saved_whole_are_loaded(tmp_path):
    """PEFT's modules_to_save: the original, decoded where it was in FP8, and a copy that trains."""
    folder = in_bfloat16(tmp_path / "fp8")
    whole = lora(target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"])
    model, plain = falqon_fx.load(folder, whole), by_transformers(folder)
    falqon_fx.prequantize(folder, tmp_path / "out", whole, progress=False)
    for found in (model, falqon_fx.load(tmp_path / "out")):
        for path in ("lm_head", UP):
            module: Any = found.get_submodule(f"base_model.model.{path}")
            copy = module.modules_to_save.default.weight
            assert torch.equal(copy.float(), plain.get_parameter(f"{path}.weight"))
            assert torch.equal(copy, module.original_module.weight)
            assert copy.data_ptr() != module.original_module.weight.data_ptr()
        found(input_ids=IDS, labels=IDS).loss.backward()
        assert copy.grad is not None
        assert module.original_module.weight.grad is None


def test_a_layer_that_stores_its_weight_turned_is_refused(tmp_path):
    """GPT-2's Conv1D, [in, out]: of a square one the shapes would not tell."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).bfloat16()
    model.config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    model.config.save_pretrained(tmp_path)
    name = "transformer.h.0.attn.c_proj.weight"
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    tensors |= {name: tensors[name].to(E4M3), f"{name}_scale": torch.ones(())}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        FalqonError, match=r"c_proj: .* weights \[out, in\] for it, the model a Conv"
    ):
        falqon_fx.load(tmp_path, lora(target_modules=["c_attn"], fan_in_fan_out=True))


def test_a_buffer_that_is_missing_is_refused(tmp_path):
    """It would be zeros: a router would choose by its scores alone."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    }  # fmt: skip
    model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**sizes)).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    tensors = safetensors.load_file(file)
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FalqonError, match="e_score_correction_bias: the model needs it"):
        falqon_fx.prequantize(tmp_path / "dense", tmp_path / "out", lora(), progress=False)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_tied_module_is_not_saved_whole(tmp_path, module):
    folder = in_bfloat16(tmp_path / "fp8", tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(FalqonError, match=rf"{module}.*: modules_to_save makes a copy .* tied to"):
        falqon_fx.load(folder, lora(target_modules=["q_proj"], modules_to_save=[module]))


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' is not how adapters start"),
        ({"init_lora_weights": False}, "False is not how adapters start"),
        ({"trainable_token_indices": [1]}, "its rows are copied from an embedding"),
    ],
    ids=str,
)
def test_adapters_that_start_otherwise_are_refused(tmp_path, options, told):
    """They would start as others do, without a word."""
    given = lora(target_modules=["q_proj"], **options)
    folder = published(tmp_path / "fp8", True)
    with pytest.raises(FalqonError, match=told):
        falqon_fx.load(folder, given)
    with pytest.raises(FalqonError, match=told):
        falqon_fx.prequantize(folder, tmp_path / "out", given, progress=False)


def test_options_that_loading_can_not_keep_are_refused(tmp_path):
    folder = published(tmp_path / "fp8", True)
    for option, value in (("init", "svd"), ("base_dtype", "int8"), ("base_dtype", "nvfp4")):
        with pytest.raises(FalqonConfigError, match=f"'{option}': '{value}'"):
            falqon_fx.load(folder, lora(), FalqonConfig(**{option: value}))


def test_weights_without_their_settings_are_refused(tmp_path):
    folder = published(tmp_path / "fp8", True)
    settings(folder, lambda content: content.pop("quantization_config"))
    assert_refused(folder, "_proj", r"config\.json has no quantization_config")


def test_an_export_says_that_its_base_is_no_dense_one(tmp_path):
    folder = published(tmp_path / "fp8", True)
    model = falqon_fx.load(folder, lora())
    fill_b(model, 0.1)
    with pytest.raises(FalqonError, match=r"has float8_e4m3fn .*, which was cast already"):
        falqon_fx.save_fp8(model, tmp_path / "served", base=folder, progress=False)
    assert not (tmp_path / "served").exists()


def test_what_is_excluded_is_decoded(tmp_path):
    folder = in_bfloat16(tmp_path / "fp8")
    model = falqon_fx.load(folder, lora(), FalqonConfig(exclude=("*.up_proj",)))
    assert len(falqon_fx.adapters(model)) == 12
    found = model.get_parameter(f"base_model.model.{UP}.base_layer.weight")
    assert torch.equal(found.float(), by_transformers(folder).get_parameter(f"{UP}.weight"))


def test_weights_that_transformers_can_not_tie_are_refused(tmp_path):
    """Zamba ties whole layers, by patterns that know nothing of PEFT's names."""
    dense, out = tmp_path / "dense", tmp_path / "fp8"
    zoo.build("zamba").save_pretrained(dense)
    path = "model.layers.1.shared_transf.feed_forward.gate_proj"
    falqon_fx.prequantize(dense, out, lora(target_modules=[path]), progress=False)
    with pytest.raises(FalqonError, match="can't tie its weights"):
        falqon_fx.load(out)
