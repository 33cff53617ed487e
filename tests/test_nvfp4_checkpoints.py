"""NVFP4 checkpoints, as compressed-tensors writes them and as ModelOpt does: loaded, prequantized,
or refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site import nvfp4
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec, parse_spec
from tests.folders import IDS, WIDE, dense_model, folder_of, lora
from tests.modelopt import steps
from tests.refusals import (
    Change,
    assert_refused,
    damaged,
    lose,
    put,
    put_byte,
    put_first,
    settings,
)
from tests.tolerances import assert_within, fp8_cast_bound, gamma

safetensors = pytest.importorskip("safetensors.torch")

UP = "model.layers.0.mlp.up_proj"
FP8 = FalqonConfig()
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def linears(model: nn.Module) -> list[str]:
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, nn.Linear) and n != "lm_head"]


def by_compressed_tensors(folder: Path) -> Path:
    """Its preset NVFP4A16, by the real package, in one file."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = dense_model(dtype=torch.float32, num_hidden_layers=1, **WIDE)
    group = quantization.preset_name_to_scheme("NVFP4A16", ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for path in linears(model):
        module: Any = model.get_submodule(path)
        blocks = module.weight.detach().view(len(module.weight), -1, 16)
        module.weight_global_scale.data = generate_gparam(blocks.amin(), blocks.amax())
        low, high = blocks.amin(-1), blocks.amax(-1)
        given = (low, high, group.weights, module.weight_global_scale)
        module.weight_scale.data = calculate_qparams(*given)[0]
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(
        model, quantization_format="nvfp4-pack-quantized"
    )
    compressor.compress_model(model)
    folder_of(model, folder)
    compressor.update_config(folder)
    return folder


def modelopts(path: str, weight: Tensor) -> dict[str, Tensor]:
    """A weight in its form."""
    scale = steps.scale_of(weight)
    codes, block_scales = steps.cast(weight, scale)
    own = {"weight": codes, "weight_scale": block_scales, "weight_scale_2": scale}
    own["input_scale"] = torch.tensor(0.01)
    return {f"{path}.{name}": tensor for name, tensor in own.items()}


def by_modelopt(folder: Path, inside: bool = False) -> Path:
    """Its unified form: what its export writes, with settings in a file of their own or, as since
    0.31, in config.json; two files with an index, scales of activations and of a cache.
    """
    model = dense_model(num_hidden_layers=1, **WIDE)
    settings: dict[str, Any] = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
    if inside:
        groups = {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
        in_config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": groups}
        model.config.quantization_config = in_config
    model.config.save_pretrained(folder)
    more = {"group_size": 16, "exclude_modules": ["lm_head"]}
    content = {"producer": {"name": "modelopt"}, "quantization": {**settings, **more}}
    (folder / "hf_quant_config.json").write_text(json.dumps(content))
    tensors = dict(model.state_dict())
    for path in linears(model):
        tensors |= modelopts(path, tensors[f"{path}.weight"])
    tensors |= {f"model.layers.0.self_attn.{n}": torch.ones(()) for n in CACHE}
    index: dict[str, str] = {}
    for number, part in enumerate((".self_attn.", "")):
        own = {n: t for n, t in tensors.items() if part in n and n not in index}
        safetensors.save_file(own, folder / f"{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(own, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


CACHE = ("k_proj.k_scale", "v_proj.v_scale")
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "compressed-tensors": by_compressed_tensors,
    "ModelOpt": by_modelopt,
    "ModelOpt, config.json": lambda folder: by_modelopt(folder, inside=True),
}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.load_file(file)
    return found


def decoded(tensors: dict[str, Tensor], path: str) -> Tensor:
    """W element by element, float64."""
    names = ("weight_packed", "weight_global_scale"), ("weight", "weight_scale_2")
    codes, whole = next(pair for pair in names if f"{path}.{pair[1]}" in tensors)
    pairs = tensors[f"{path}.{codes}"]
    index = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1).int()
    value = VALUES.double()[index & 7] * (1.0 - 2.0 * (index >> 3))
    blocks = tensors[f"{path}.weight_scale"].double().repeat_interleave(16, 1)
    scale = tensors[f"{path}.{whole}"].double()
    return value * blocks * (1 / scale if codes == "weight_packed" else scale)


@pytest.mark.parametrize("layout", ["compressed-tensors", "ModelOpt"])
@pytest.mark.filterwarnings("ignore:.*scales of an FP8 cache")
def test_it_is_cast_again_to_fp8_where_that_is_asked_for(tmp_path, layout):
    """By `load` and by `prequantize`, both with the cost said."""
    folder = LAYOUTS[layout](tmp_path / "nvfp4")
    tensors = tensors_in(folder)
    with pytest.warns(UserWarning, match=r"7 weights in NVFP4.*moved them by \d\.\d\d%"):
        model = falqon_fx.load(folder, lora(), FP8)
    with pytest.warns(UserWarning, match="7 weights in NVFP4.*moves them once more"):
        report = falqon_fx.prequantize(folder, tmp_path / "out", lora(), FP8, progress=False)
    assert report.layers == 7
    parts = falqon_fx.load(tmp_path / "out")
    spec = SiteSpec.from_config(FP8)
    assert len(falqon_fx.adapters(model)) == 7
    for path, state in falqon_fx.adapters(model).items():
        weight = decoded(tensors, path.removeprefix("base_model.model."))
        # One cast, of what three roundings to float32 have decoded: of 1 / s, S · s and C · S · s.
        assert torch.equal(state.scale, cast_base(weight.float(), spec).scale)
        bound = fp8_cast_bound(weight, state.scale, E4M3) * (1 + gamma(3)) + gamma(3) * weight.abs()
        assert_within(state.base(), weight, bound)
        assert torch.equal(falqon_fx.adapters(parts)[path].base(), state.base())
    left = dict(parts.named_parameters())
    for name, tensor in model.named_parameters():
        if ".lora_" not in name and tensor.is_floating_point():
            assert torch.equal(left[name], tensor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*scales of an FP8 cache")
def test_it_is_a_base_as_it_is(tmp_path, layout):
    """By `load` and by `prequantize`: the same bytes; s is no power of two, so scale="amax"."""
    folder = LAYOUTS[layout](tmp_path / "nvfp4")
    tensors = tensors_in(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = falqon_fx.load(folder, lora(target_modules=["q_proj"]))
        config = FalqonConfig(base_dtype="nvfp4", init="keep")
        falqon_fx.prequantize(folder, tmp_path / "out", lora(target_modules=["q_proj"]), config,
                              progress=False)  # fmt: skip
        parts = falqon_fx.load(tmp_path / "out")
    assert not [w for w in caught if "NVFP4" in str(w.message)]
    layers = {p: m for p, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == 7
    for path, layer in layers.items():
        name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        codes, block_scales = nvfp4.parted(layer.code)
        packed = f"{name}.weight_packed" in tensors
        assert torch.equal(codes, tensors[f"{name}.{'weight_packed' if packed else 'weight'}"])
        assert torch.equal(block_scales.view(E4M3), tensors[f"{name}.weight_scale"])
        assert parse_spec(layer.spec_text).scale == "amax"
        found, wanted = layer.base().dequantize().double(), decoded(tensors, name)
        # Rounded once for S · s, once for the product, once for 1 / s.
        assert bool(((found - wanted).abs() <= 3 * 2.0**-24 * wanted.abs()).all())
        other: Any = parts.get_submodule(path)
        assert other.extra_repr() == layer.extra_repr()
        assert all(map(torch.equal, other.parameters(), layer.parameters()))
    if layout != "ModelOpt":
        return
    options = FalqonConfig(base_dtype="nvfp4", scale="amax", inner="eager")
    run = torch.compile(model, backend="falqon", options=dict[str, Any](config=options))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.01)
    losses = []
    for _ in range(5):
        loss = run(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_an_svd_start_is_refused(tmp_path):
    config = FalqonConfig(base_dtype="nvfp4", init="svd")
    folder = by_modelopt(tmp_path / "nvfp4")
    assert_refused(folder, "'init'", "'svd' starts from the error of a cast", config=config)


# -- damaged ---------------------------------------------------------------------------------------


SHAPES = "as its codes, block scales and scale"


def damages(codes: str, whole: str) -> dict[str, tuple[Change, str]]:
    """By the names that a layout has for codes and for the scale of all of a weight."""
    codes, scales, whole = (f"{UP}.{name}" for name in (codes, "weight_scale", whole))
    return {
        "NaN": (put_first(whole, float("nan")), "1 of its 1 scales in .* are NaN"),
        "Inf": (put_first(whole, float("inf")), "1 of its 1 scales in .* are Inf"),
        "zero": (put_first(whole, 0.0), "1 of its 1 scales in .* are zero"),
        "negative": (put_first(whole, -1.0), "1 of its 1 scales in .* are negative"),
        "no block scales": (lose(scales), r"lacks its .*weight_scale$"),
        "no scale": (lose(whole), rf"lacks its {whole}$"),
        "blocks of 32": (put(scales, lambda t: t[:, ::2]), SHAPES),
        "a row too few": (put(scales, lambda t: t[1:]), SHAPES),
        "a code too few": (put(codes, lambda t: t[:, 1:]), SHAPES),
        "turned": (put(scales, lambda t: t.t()), SHAPES),
        "other block scales": (put(scales, lambda t: t.float()), SHAPES),
        "a scale a row": (put(whole, lambda t: t.expand(96)), SHAPES),
        "a scale of integers": (put(whole, lambda t: t.int()), SHAPES),
        "INT8 beside it": (put(codes, lambda t: t.view(torch.int8)), SHAPES),
    }


DAMAGES = {
    "compressed-tensors": damages("weight_packed", "weight_global_scale"),
    "ModelOpt": damages("weight", "weight_scale_2"),
}
DAMAGES["compressed-tensors"]["a divisor of next to nothing"] = (
    put_first(f"{UP}.weight_global_scale", 1e-40),
    "are to be divided by .*, which gives Inf",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("nvfp4")
    return {name: LAYOUTS[name](folder / name) for name in DAMAGES}


@pytest.mark.parametrize("damage", DAMAGES["compressed-tensors"])
def test_damaged_weights_are_refused(sources, tmp_path, damage):
    for layout, known in DAMAGES.items():
        if damage in known:
            change, told = known[damage]
            folder = damaged(sources[layout], tmp_path / layout / "nvfp4", change)
            assert_refused(folder, UP, told)


@pytest.mark.parametrize("layout", DAMAGES)
@pytest.mark.parametrize("byte", [0x7F, 0xB8], ids=["NaN", "negative"])
def test_damaged_block_scales_are_refused(sources, tmp_path, layout, byte):
    """`prequantize` reads them with their codes."""
    folder = damaged(sources[layout], tmp_path / "nvfp4", put_byte(f"{UP}.weight_scale", byte))
    told = "1 of its block scales in .* are NaN or negative"
    assert_refused(folder, UP, told, in_codes=True)


@pytest.mark.parametrize("config", [None, FP8], ids=["NVFP4", "FP8"])
def test_a_weight_beyond_the_scales_in_use_is_refused(sources, tmp_path, config):
    change = put_first(f"{UP}.weight_scale_2", 2.0**16)
    folder = damaged(sources["ModelOpt"], tmp_path / "nvfp4", change)
    assert_refused(folder, UP, "exceeds 65536", config=config, in_codes=True)


def test_weights_in_two_forms_are_refused(sources, tmp_path):
    down = "model.layers.0.mlp.down_proj"

    def other(tensors: dict[str, Tensor]) -> None:
        lose(f"{down}.weight_scale", f"{down}.weight_scale_2")(tensors)
        tensors[f"{down}.weight"] = torch.ones(64, 96).to(E4M3)

    def both(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight_packed"] = tensors[f"{UP}.weight"]
        tensors[f"{UP}.weight_global_scale"] = torch.ones(1)

    for name, change, site, told in (
        ("other", other, down, r"float8_e4m3fn \[64, 96\] there, and NVFP4 elsewhere"),
        ("no scales", lose(f"{UP}.weight_scale", f"{UP}.weight_scale_2"), UP, r"uint8 \[96, 32\]"),
        ("both", both, UP, "in two forms"),
    ):
        folder = damaged(sources["ModelOpt"], tmp_path / name / "nvfp4", change)
        assert_refused(folder, site, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION weights"),
        ({"quant_algo": "NVFP4_AWQ"}, "NVFP4_AWQ weights"),
        ({"group_size": 32}, "blocks of 32, and NVFP4 has blocks of 16"),
        ({"group_size": "16"}, "group_size"),
        ({"quant_algo": 4}, "quant_algo"),
    ],
)
def test_other_settings_are_refused(sources, tmp_path, change, told):
    folder = damaged(sources["ModelOpt"], tmp_path / "nvfp4", lambda _: None)
    settings(folder, lambda c: c["quantization"].update(change), "hf_quant_config.json")
    assert_refused(folder, "nvfp4", told)


def test_lost_settings_are_refused(sources, tmp_path):
    folder = damaged(sources["ModelOpt"], tmp_path / "nvfp4", lambda _: None)
    (folder / "hf_quant_config.json").unlink()
    assert_refused(folder, "_proj", "its config.json has no quantization_config")


def test_groups_in_several_forms_are_refused(tmp_path):
    folder = by_modelopt(tmp_path / "nvfp4", inside=True)

    def change(content: dict[str, Any]) -> None:
        groups = content["quantization_config"]["config_groups"]
        groups["group_1"] = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        groups["group_0"]["weights"]["strategy"] = "tensor_group"
        content["quantization_config"] |= {"quant_method": "compressed-tensors"}

    told = "some of its weights are NVFP4 and others are not"
    assert_refused(settings(folder, change), "nvfp4", told)


def test_experts_are_cast_again_or_refused(tmp_path):
    """One stack of a checkpoint's experts; the cast to E4M3 is off by half of a step, 2^-4 of the
    value, or of those below its normal numbers, 2^-10 of the row's scale.
    """
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 1}
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, intermediate_size=64, num_hidden_layers=1, **sizes, **heads
    )
    transformers.Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in tensors_in(tmp_path).items():
        path = name.removesuffix(".weight")
        in_nvfp4 = tensor.dim() == 2 and "_proj" in name
        tensors |= modelopts(path, tensor) if in_nvfp4 else {name: tensor}
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    own = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*mlp.gate"]}
    about = {"producer": {"name": "modelopt"}, "quantization": own}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(about))

    with pytest.raises(FalqonError, match=r"experts\.gate_up_proj: it is a stack .* in NVFP4"):
        falqon_fx.load(
            tmp_path,
            lora(target_modules=["q_proj"]),
            FalqonConfig(base_dtype="nvfp4", scale="amax"),
        )
    model = falqon_fx.load(tmp_path, lora(target_modules=["q_proj"]), FP8).base_model.model.model
    stack = model.layers[0].mlp.experts.gate_up_proj.float()
    for expert, found in enumerate(stack):
        parts = [f"model.layers.0.mlp.experts.{expert}.{n}_proj" for n in ("gate", "up")]
        wanted = torch.cat([decoded(tensors, part) for part in parts]).float()
        scale = wanted.abs().amax(1, keepdim=True) / 448 * 2  # at most: a power of two
        assert ((found - wanted).abs() <= torch.maximum(wanted.abs() / 16, scale / 1024)).all()
