"""The folder that `save_fp8` writes: files, the fp8 form, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests.exports import (
    BF16,
    F32,
    IDS,
    by_rows,
    call,
    dense,
    export,
    in_fp8,
    layers_in,
    load,
    read,
    wide_llama,
)
from tests.models import tiny_llama, tiny_mlp
from tests.parameters import each_value
from tests.sites import randn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("compressed_tensors")


# -- the folder ------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path):
    model = in_fp8(tiny_llama(), prepared=True)
    report = export(model, tmp_path, max_shard_size=8000)
    files = [name for name in report.files if name.endswith(".safetensors")]
    assert len(files) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in safetensors.load_file(tmp_path / "out" / file)
    with torch.no_grad():
        sharded = dense(tmp_path)(IDS).logits
        export(model, tmp_path / "whole")
        assert torch.equal(sharded, dense(tmp_path / "whole")(IDS).logits)


def test_generation_config_and_tokenizer_are_in_the_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="a")
    model = in_fp8(tiny_llama(), prepared=True)
    model.get_base_model().generation_config.temperature = 0.25
    model.get_base_model().generation_config.do_sample = True
    report = export(model, tmp_path, tokenizer=tokenizer)
    assert report.notes == ()
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert back("b a").input_ids == [1, 0]
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.temperature == 0.25
    # The folder that a model came from has them too.
    model.get_base_model().config._name_or_path = str(tmp_path / "out")
    assert export(model, tmp_path / "second").notes == ()
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "second/out")
    assert back("b a").input_ids == [1, 0]


def test_a_missing_tokenizer_is_reported(tmp_path):
    assert "give tokenizer=" in str(export(in_fp8(tiny_llama(), prepared=True), tmp_path))


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_the_model_goes_on_training_as_before(tmp_path, prepared):
    model = in_fp8(tiny_llama(layers=1), prepared)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = copy.deepcopy(model.get_base_model().config.to_dict())
    compiled = call(model, FalqonConfig(inner="eager"))
    with torch.no_grad():
        logits = compiled(IDS).logits
        export(model, tmp_path)
        assert torch.equal(compiled(IDS).logits, logits)
    assert model.get_base_model().config.to_dict() == config
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("adapted", [False, True], ids=["tied", "adapted"])
def test_tied_embeddings_stay_tied_unless_the_head_has_its_own_weight(tmp_path, adapted):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    targets = ["q_proj", "lm_head"] if adapted else ["q_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    export(in_fp8(model, prepared=False), tmp_path)
    tensors = read(tmp_path)
    assert ("lm_head.weight" in tensors) == adapted
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is not adapted
    assert ("lm_head" in config["quantization_config"]["ignore"]) is not adapted
    loaded = dense(tmp_path)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied is not adapted
    if adapted:
        assert torch.equal(loaded.lm_head.weight, layers_in(tmp_path)["lm_head"].dequantize())
        assert torch.equal(
            tensors["model.embed_tokens.weight"], model.get_input_embeddings().weight
        )


def test_trained_modules_and_rejected_adapters_are_exported_dense(tmp_path):
    """modules_to_save replace the original; an adapter that falqon left as it was is merged."""
    model = tiny_llama(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    norm = model.get_base_model().model.norm
    with torch.no_grad():
        norm.modules_to_save.default.weight.fill_(3.0)
    model = in_fp8(model, prepared=True, exclude=("*v_proj",))
    report = export(model, tmp_path)
    tensors = read(tmp_path)
    assert torch.equal(tensors["model.norm.weight"], torch.full((32,), 3.0))
    assert not any("modules_to_save" in n or "original_module" in n for n in tensors)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(tensors["model.layers.0.self_attn.v_proj.weight"], merged)
    assert len(report.layers) == 2
    assert not any("lora_" in name for name in tensors)


def test_a_trained_head_is_exported_dense(tmp_path):
    """Nor is the original beside it cast."""
    model = in_fp8(wide_llama(modules_to_save=["lm_head"]), prepared=True)
    head = model.get_base_model().lm_head
    assert type(head.original_module) is nn.Linear
    with torch.no_grad():
        head.modules_to_save.default.weight.fill_(3.0)
    report = export(model, tmp_path)
    assert len(report.layers) == 14
    assert report.dense == {"lm_head": "it is an output head"}
    assert torch.equal(read(tmp_path)["lm_head.weight"], torch.full((64, 64), 3.0))


@pytest.mark.parametrize("bias", [False, True])
def test_biases_of_lora_b_go_into_the_layers_bias(tmp_path, bias):
    """Of all active adapters, each with its scaling."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=bias, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], lora_bias=bias)
    model = peft.get_peft_model(model, lora)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=bias))
    model.base_model.set_adapter(["default", "other"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    if bias:
        with torch.no_grad():
            layer.lora_B.default.bias.copy_(randn(32))
            layer.lora_B.other.bias.copy_(randn(32, seed=2))
            layer.base_layer.bias.copy_(randn(32, seed=1))
    model.get_base_model().model.layers[0].self_attn.q_proj.scaling["other"] = 0.5
    falqon_fx.prepare(model, progress=False)
    export(model, tmp_path)
    tensors = read(tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert (name in tensors) is bias
    if bias:
        expected = randn(32, seed=1) + 2.0 * randn(32) + 0.5 * randn(32, seed=2)
        assert torch.equal(tensors[name], expected)


# -- the fp8 form ----------------------------------------------------------------------------------


@each_value(dtype=[F32, BF16], b_size=[0, 0.05])
def test_the_fp8_form_holds_the_same_bytes(tmp_path, dtype, b_size):
    """transformers has FP8 kernels for GPUs alone; here it dequantizes while loading."""
    model = in_fp8(tiny_llama(dtype), prepared=True, b_size=b_size, granularity="tensor")
    export(model, tmp_path / "rows")
    expected = layers_in(tmp_path / "rows")
    export(model, tmp_path, form="fp8")
    tensors = read(tmp_path)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    parsed = transformers.FineGrainedFP8Config.from_dict(config)
    assert tuple(parsed.weight_block_size) == (16, 16)  # of 32, 48 and 16 columns and rows
    assert parsed.modules_to_not_convert == ["lm_head"]
    loaded = load(tmp_path, dtype)
    assert len(expected) == 14
    for path, base in expected.items():
        out, features = base.code.shape
        assert torch.equal(tensors[f"{path}.weight"].view(torch.uint8), base.code)
        grid = tensors[f"{path}.weight_scale_inv"]
        assert grid.shape == (out / 16, features / 16)
        assert (grid == base.scale[0]).all()
        weight = loaded.get_submodule(path).weight
        assert torch.equal(weight.float(), base.dequantize())


def test_the_fp8_form_refuses_row_scales(tmp_path):
    model = in_fp8(tiny_llama(), prepared=True)
    with pytest.raises(FalqonError, match="one scale per row") as caught:
        export(model, tmp_path, form="fp8")
    assert "granularity='tensor'" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_of_two_ways_in_which_a_model_ran_the_one_that_the_form_holds_is_taken(tmp_path):
    model = in_fp8(tiny_llama(layers=1), prepared=False, granularity="tensor")
    call(model, FalqonConfig(inner="eager", granularity="row"))
    for form in ("compressed-tensors", "fp8"):
        report = export(model, tmp_path / form, form=form)
        assert len(report.layers) == 7, form
    rows = layers_in(tmp_path / "compressed-tensors").values()
    assert all(len(base.scale.unique()) > 1 for base in rows)


# -- refusals --------------------------------------------------------------------------------------


def test_a_folder_that_exists_is_left_alone(tmp_path):
    model = in_fp8(tiny_llama(), prepared=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(FalqonError, match="exists already"):
        export(model, tmp_path)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_model_without_fp8_weights_is_refused(tmp_path):
    with pytest.raises(FalqonError, match="no layer of the model has an FP8 weight"):
        export(tiny_llama(), tmp_path)


def test_a_model_without_a_transformers_config_is_refused(tmp_path):
    model = tiny_mlp()
    falqon_fx.prepare(model, progress=False)
    with pytest.raises(FalqonError, match="no transformers config"):
        export(model, tmp_path)


@pytest.mark.parametrize("update", ["adapter", "rows"])
def test_a_bias_without_a_place_is_refused(tmp_path, update):
    model = tiny_llama(target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_B.default.bias = nn.Parameter(randn(32))
    falqon_fx.prepare(model, FalqonConfig(update=update), progress=False)
    with pytest.raises(FalqonError, match=r"layers\.1\.self_attn\.q_proj: its lora_B has a bias"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("b_size", [0, 0.05])
def test_bytes_that_were_averaged_are_refused(tmp_path, b_size):
    model = in_fp8(tiny_llama(), prepared=True, b_size=b_size)
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.code += 1
    with pytest.raises(FalqonError, match=r"layers\.1\.mlp\.up_proj: the bytes of its FP8 base"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_an_adapter_that_is_gone_are_refused(tmp_path):
    model = by_rows(tiny_llama())
    base = model.unload()
    with pytest.raises(FalqonError, match="holds an adapter that is not active"):
        export(base, tmp_path)


def test_an_unknown_form_is_refused(tmp_path):
    model = in_fp8(tiny_llama(), prepared=True)
    with pytest.raises(FalqonError, match="'compressed-tensors' or 'fp8'"):
        export(model, tmp_path, form="int4")
