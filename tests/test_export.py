"""`save_fp8`: what the real engines' packages read back is what was trained on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.lowering import quantize
from falqon_fx.numerics import E4M3
from falqon_fx.unload import fp8_layers
from tests.models import fill_b, tiny_llama, tiny_mlp
from tests.sites import randn
from tests.tolerances import Approx, fp8_cast_bound, gamma

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("compressed_tensors")

F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def written(dtype: torch.dtype = F32, **options) -> nn.Module:
    """A prepared model whose FP8 weights hold steps of B."""
    model = tiny_llama(dtype).eval()
    falqon_fx.prepare(model, FalqonConfig(**options), progress=False)
    fill_b(model, 0.05)
    falqon_fx.flush(model)
    return model


def trained(dtype: torch.dtype = F32, prepared: bool = True, lora: dict | None = None, **options):
    """A model after a few steps under the backend, and its compiled form."""
    model = tiny_llama(dtype, **(lora or {}))
    config = FalqonConfig(**{"inner": "eager", "topk": 9, **options})
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    compiled = torch.compile(model, backend="falqon", options={"config": config})
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_B" in n], 0.02)
    for _ in range(3):
        compiled(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), compiled


def export(model: nn.Module, folder: Path, **arguments) -> falqon_fx.ExportReport:
    return falqon_fx.save_fp8(model, folder / "out", progress=False, **arguments)


def read(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted((folder / "out").glob("*.safetensors")):
        tensors |= safetensors.load_file(file)
    return tensors


def load(folder: Path, dtype: torch.dtype = F32, **arguments) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", dtype=dtype, **arguments
    ).eval()


def dense(folder: Path, dtype: torch.dtype = F32) -> nn.Module:
    """Loaded with all weights dequantized."""
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return load(folder, dtype, quantization_config=config)


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("scale", ["pow2", "amax"])
def test_the_bytes_are_those_trained_on(tmp_path, prepared, granularity, scale):
    options = {"granularity": granularity, "scale": scale}
    model = written(**options) if prepared else trained(prepared=False, **options)[0]
    falqon_fx.flush(model)
    states = {path: (s.code.clone(), s.scale.clone()) for path, s in _states_of(model).items()}
    report = export(model, tmp_path)
    assert report.flushed.rows == 0
    tensors = read(tmp_path)
    assert set(report.layers) == set(states)
    assert len(states) == 14
    for path, (code, old) in states.items():
        weight, new = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
        out = len(weight)
        assert weight.dtype == E4M3
        assert torch.equal(weight.view(torch.uint8), code[:out])
        assert (new.dtype, new.shape) == (F32, (out, 1))
        assert torch.equal(new, (old if granularity == "tensor" else old[:out]).expand(out, 1))
    names = dict(model.get_base_model().named_parameters())
    others = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in states}
    assert set(others) == {n for n in names if "base_layer" not in n and "lora_" not in n}
    assert all(torch.equal(tensor, names[name]) for name, tensor in others.items())


def _states_of(model: nn.Module) -> dict[str, falqon_fx.MergedAdapter]:
    return {path: state for path, (_, state) in fp8_layers(model.get_base_model()).items()}


def test_the_config_is_valid_for_the_real_packages(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

    model = written()
    export(model, tmp_path)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    (scheme,) = parsed.config_groups.values()
    assert scheme.weights.strategy == QuantizationStrategy.CHANNEL
    assert scheme.weights.pytorch_dtype() == E4M3
    assert not scheme.weights.dynamic
    assert scheme.input_activations.strategy == QuantizationStrategy.TOKEN
    assert scheme.input_activations.dynamic
    assert (parsed.format, parsed.ignore) == ("float-quantized", ["lm_head"])
    # Nothing in it is unknown to the schema, which drops what it doesn't know.
    kept = parsed.model_dump()
    assert set(config) <= set(kept)
    assert {k: v for k, v in kept["config_groups"]["group_0"]["weights"].items() if v} == {
        k: v for k, v in config["config_groups"]["group_0"]["weights"].items() if v
    }


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]], ids=["all", "some"])
def test_ignore_names_every_layer_that_is_dense_and_no_other(tmp_path, targets):
    """By the real package's own matching, on a model that it has not seen."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = tiny_llama(target_modules=targets)
    falqon_fx.prepare(model, progress=False)
    report = export(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    settings = QuantizationConfig.model_validate(config.quantization_config)
    fresh = transformers.LlamaForCausalLM(model.get_base_model().config)
    apply_quantization_config(fresh, settings)
    found = {path for path, module in fresh.named_modules() if hasattr(module, "weight_scale")}
    assert found == set(report.layers)
    (noted,) = [note for note in report.notes if "fuse" in note] or [""]
    assert ("model.layers.0.self_attn" in noted) is (targets != "all-linear")


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_transformers_loads_the_same_weights(tmp_path, dtype, granularity):
    """Compressed until the first call, dequantized after it: exactly, as scales are powers of 2."""
    model = written(dtype, granularity=granularity)
    export(model, tmp_path)
    loaded = load(tmp_path, dtype)
    for path, state in _states_of(model).items():
        weight = loaded.get_submodule(path).weight
        assert weight.dtype == E4M3
        assert torch.equal(weight.view(torch.uint8), state.code[: len(weight)])
    loaded(IDS)
    for candidate in (loaded, dense(tmp_path, dtype)):
        for path, state in _states_of(model).items():
            weight = candidate.get_submodule(path).weight
            assert weight.dtype == dtype
            assert torch.equal(weight.float(), state.dequantize()[: len(weight)])


def test_scales_that_are_not_powers_of_two_lose_bits_in_a_bf16_model(tmp_path):
    """Why "pow2" is the default: transformers holds the scales in the model's dtype, so with "amax"
    they are rounded once (2^-8), and the product again.
    """
    model = written(BF16, scale="amax")
    export(model, tmp_path)
    loaded, off = load(tmp_path, BF16), 0
    loaded(IDS)
    for path, state in _states_of(model).items():
        weight = loaded.get_submodule(path).weight.double()
        exact = state.dequantize()[: len(weight)].double()
        assert ((weight - exact).abs() <= gamma(2, 2.0**-8) * exact.abs()).all()
        off += int((weight != exact).sum())
    assert off


# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_logits_are_those_of_training_where_activations_are_cast_alike(tmp_path, prepared):
    """The loaded weights, each linear's input through falqon's cast: bit for bit the model that
    trained, since both multiply the same two float32 matrices.
    """
    model, compiled = trained(prepared=prepared)
    export(model, tmp_path)
    loaded = dense(tmp_path)
    plan = next(iter(_states_of(model).values())).plan

    def cast(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        value, rest = quantize(x.reshape(-1, x.shape[-1]), E4M3, plan)
        return ((value * rest).reshape(x.shape),)

    with torch.no_grad():
        plain = loaded(IDS).logits
        for path in _states_of(model):
            loaded.get_submodule(path).register_forward_pre_hook(cast)
        expected = compiled(IDS).logits
        assert torch.equal(loaded(IDS).logits, expected)
        assert not torch.equal(plain, expected)  # the casts are seen


def test_logits_with_the_engines_own_casts_are_within_the_bound_of_both(tmp_path):
    """With FP8 in the last layer alone, logits are one product: compressed-tensors casts x with
    amax/448 a token, falqon with a power of two below twice that. Each is off from x·dq(W)ᵀ by its
    cast of x, summed with |W|, and a float32 product.
    """
    model, compiled = trained(lora={"target_modules": ["lm_head"]})
    export(model, tmp_path)
    loaded, seen = load(tmp_path), {}
    head = loaded.lm_head
    with torch.no_grad():
        loaded(IDS)  # the first call decompresses the weights
        hook = loaded.model.register_forward_hook(lambda m, a, out: seen.update(x=out[0]))
        actual, expected = loaded(IDS).logits, compiled(IDS).logits
        hook.remove()
    x = seen["x"].reshape(-1, head.in_features)
    weight = Approx.exact(head.weight.detach())
    amax = x.abs().amax(1, keepdim=True).double() / 448
    for result, scale in ((actual, amax), (expected, 2 * amax)):
        bound = fp8_cast_bound(x, scale * (1 + gamma(4)), E4M3) * (1 + gamma(4))
        product = Approx(x.double(), bound) @ weight.t()
        product.assert_holds(result.reshape(product.value.shape))
    assert not torch.equal(actual, expected)


# -- pending rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_pending_rows_are_written_first_and_the_report_says_how_much_that_changed(
    tmp_path, pending
):
    model = written(pending=pending, rounding="nearest")
    fill_b(model, 0.05, seed=2)
    states = _states_of(model)
    before = {path: state.dequantize() for path, state in states.items()}
    waiting = sum(int(state.pending().any(1).sum()) for state in states.values())
    report = export(model, tmp_path)
    assert report.flushed.rows == waiting > 300
    assert not any(state.pending().any() for state in states.values())
    out = {path: state.applied.shape[0] for path, state in states.items()}
    moved = [(s.dequantize() - before[p])[: out[p]] for p, s in states.items()]
    changed = sum(m.double().square().sum() for m in moved)
    total = sum(before[p][: out[p]].double().square().sum() for p in states)
    assert report.flushed.relative_change == pytest.approx(float((changed / total) ** 0.5))
    assert f"{waiting} pending rows in 14 layers" in str(report)


# -- the folder ------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path):
    model = written()
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
    model = written()
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
    model = written()
    assert "give tokenizer=" in str(export(model, tmp_path))


def test_the_model_goes_on_training_as_before(tmp_path):
    model = written()
    falqon_fx.flush(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    config = copy.deepcopy(model.get_base_model().config.to_dict())
    export(model, tmp_path)
    assert model.get_base_model().config.to_dict() == config
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize("adapted", [False, True], ids=["tied", "adapted"])
def test_tied_embeddings_stay_tied_unless_the_head_has_its_own_weight(tmp_path, adapted):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    targets = ["q_proj", "lm_head"] if adapted else ["q_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    fill_b(model, 0.1)
    model.eval()
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    with torch.no_grad():
        compiled(IDS)
    export(model, tmp_path)
    tensors = read(tmp_path)
    assert ("lm_head.weight" in tensors) == adapted
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is not adapted
    assert ("lm_head" in config["quantization_config"]["ignore"]) is not adapted
    loaded = dense(tmp_path)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied is not adapted
    if adapted:
        state = _states_of(model)["lm_head"]
        assert torch.equal(loaded.lm_head.weight, state.dequantize()[:64])


def test_trained_modules_and_rejected_adapters_are_exported_dense(tmp_path):
    """modules_to_save replace the original; an adapter that falqon left as it was is merged."""
    model = tiny_llama(target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
    norm = model.get_base_model().model.norm
    with torch.no_grad():
        norm.modules_to_save.default.weight.fill_(3.0)
    fill_b(model, 0.1)
    falqon_fx.prepare(model, FalqonConfig(exclude=("*v_proj",)), progress=False)
    report = export(model, tmp_path)
    tensors = read(tmp_path)
    assert torch.equal(tensors["model.norm.weight"], torch.full((32,), 3.0))
    assert not any("modules_to_save" in n or "original_module" in n for n in tensors)
    layer = model.get_base_model().model.layers[0].self_attn.v_proj
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(tensors["model.layers.0.self_attn.v_proj.weight"], merged)
    assert len(report.layers) == 2
    assert not any("lora_" in name for name in tensors)


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_of_lora_b_goes_into_the_layers_bias(tmp_path, bias):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=bias, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], lora_bias=bias)
    model = peft.get_peft_model(model, lora)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    if bias:
        with torch.no_grad():
            layer.lora_B.default.bias.copy_(randn(32))
            layer.base_layer.bias.copy_(randn(32, seed=1))
    falqon_fx.prepare(model, FalqonConfig(), progress=False)
    export(model, tmp_path)
    tensors = read(tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert (name in tensors) is bias
    if bias:
        assert torch.equal(tensors[name], randn(32, seed=1) + 2.0 * randn(32))


# -- the fp8 form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_fp8_form_holds_the_same_bytes(tmp_path, dtype):
    """transformers has FP8 kernels for GPUs alone; here it dequantizes while loading."""
    model = written(dtype, granularity="tensor")
    export(model, tmp_path, form="fp8")
    tensors = read(tmp_path)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    parsed = transformers.FineGrainedFP8Config.from_dict(config)
    assert tuple(parsed.weight_block_size) == (16, 16)  # of 32, 48 and 16 columns and rows
    assert parsed.modules_to_not_convert == ["lm_head"]
    loaded = load(tmp_path, dtype)
    for path, state in _states_of(model).items():
        out, features = state.applied.shape[0], state.code.shape[1]
        assert torch.equal(tensors[f"{path}.weight"].view(torch.uint8), state.code[:out])
        grid = tensors[f"{path}.weight_scale_inv"]
        assert grid.shape == (out / 16, features / 16)
        assert (grid == state.scale).all()
        weight = loaded.get_submodule(path).weight
        assert torch.equal(weight.float(), state.dequantize()[:out])


def test_the_fp8_form_refuses_row_scales(tmp_path):
    model = written()
    with pytest.raises(FalqonError, match="quantizing anew") as caught:
        export(model, tmp_path, form="fp8")
    assert "granularity='tensor'" in str(caught.value)
    assert not list(tmp_path.iterdir())


# -- refusals --------------------------------------------------------------------------------------


def test_a_folder_that_exists_is_left_alone(tmp_path):
    model = written()
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


def test_a_bias_without_a_place_is_refused(tmp_path):
    model = tiny_llama(target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_B.default.bias = nn.Parameter(randn(32))
    falqon_fx.prepare(model, progress=False)
    with pytest.raises(FalqonError, match=r"layers\.1\.self_attn\.q_proj: its lora_B has a bias"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_form_is_refused(tmp_path):
    model = written()
    with pytest.raises(FalqonError, match="'compressed-tensors' or 'fp8'"):
        export(model, tmp_path, form="int4")
