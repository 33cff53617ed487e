"""FP8 checkpoints with one scale per block: loaded, prequantized, trained, or refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.files import blocks
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.folders import BF16, IDS, WIDE, dense_model, folder_of, lora, prequantize
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

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZE = (16, 32)
UP = "model.layers.0.mlp.up_proj"
SPEC = SiteSpec.from_config(FalqonConfig())


def in_blocks(weight: Tensor, size: tuple[int, int], power_of_two: bool) -> tuple[Tensor, Tensor]:
    """E4M3 codes and a scale per block, block by block."""
    out, features = weight.shape
    scale = torch.empty(-(-out // size[0]), -(-features // size[1]))
    code = torch.empty(weight.shape, dtype=E4M3)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows = slice(i * size[0], (i + 1) * size[0])
            columns = slice(j * size[1], (j + 1) * size[1])
            block = weight[rows, columns].float()
            of_block = block.abs().amax() / 448
            scale[i, j] = 2 ** of_block.log2().ceil() if power_of_two else of_block
            code[rows, columns] = (block / scale[i, j]).to(E4M3)
    return code, scale


def decoded(code: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """W element by element."""
    rows = torch.arange(code.shape[0]) // size[0]
    columns = torch.arange(code.shape[1]) // size[1]
    return code.float() * scale.float()[rows][:, columns]


def published(folder: Path, power_of_two: bool, of_scale: torch.dtype = torch.float32) -> Path:
    """A Llama as DeepSeek's and Qwen's files are: sharded, one scale per block."""
    model = dense_model(**WIDE)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [*SIZE]}
    model.config.quantization_config = settings
    model.config.save_pretrained(folder)
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            code, scale = in_blocks(module.weight, SIZE, power_of_two)
            tensors |= {f"{path}.weight": code, f"{path}.weight_scale_inv": scale.to(of_scale)}
    index: dict[str, str] = {}
    for number, part in enumerate((".self_attn.", "")):
        own = {n: t for n, t in tensors.items() if part in n and n not in index}
        safetensors.save_file(own, folder / f"{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(own, f"{number}.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def by_transformers(folder: Path) -> nn.Module:
    """The model as transformers decodes it."""
    config = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=SIZE)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    return model


def loaded(folder: Path, exact: bool) -> nn.Module:
    """Through `load`, which warns of a second cast and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = falqon_fx.load(folder, lora())
    ours = [str(warning.message) for warning in caught if "falqon" in str(warning.message)]
    assert len(ours) == (0 if exact else 1), ours
    assert exact or "14 weights" in ours[0]
    return model


@pytest.mark.parametrize("exact", [True, False], ids=["ue8m0", "float32"])
def test_it_is_what_prepare_makes_of_what_transformers_decodes(tmp_path, exact):
    model = loaded(published(tmp_path / "fp8", exact), exact)
    dense = by_transformers(tmp_path / "fp8")
    states = falqon_fx.adapters(model)
    assert len(states) == 14
    for path, state in states.items():
        weight = dense.get_submodule(path.removeprefix("base_model.model.")).weight
        # Values, since a weight whose blocks have the same scale keeps it, and its bytes.
        assert torch.equal(state.base(), cast_base(weight, SPEC).dequantize())


def test_scales_in_e8m0_are_read(tmp_path):
    """The dtype in which powers of two are published since DeepSeek V3.1."""
    torch.manual_seed(0)
    published(tmp_path / "float32", True)
    torch.manual_seed(0)
    published(tmp_path / "e8m0", True, torch.float8_e8m0fnu)
    first, second = (falqon_fx.load(tmp_path / n, lora()) for n in ("float32", "e8m0"))
    for path, state in falqon_fx.adapters(first).items():
        other = falqon_fx.adapters(second)[path]
        assert torch.equal(state.weight.view(torch.uint8), other.weight.view(torch.uint8))
        assert torch.equal(state.scale, other.scale)


@given(
    out=st.integers(1, 40),
    features=st.integers(1, 40),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    power_of_two=st.booleans(),
    spread=st.integers(0, 12),
    strip=st.sampled_from([1, 64, 1 << 24]),
    seed=st.integers(0, 9),
)
def test_what_casting_again_changes_is_bounded(
    out, features, rows, columns, power_of_two, spread, strip, seed
):
    """Any size of block, edges included, blocks that differ by up to 2**spread. A value changes by
    half of E4M3's spacing at most: of 2**-9 of the row's scale below its smallest normal number,
    2**-6, and of 2**-3 relative above. Where both scales are powers of two, not at all above.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, features, generator=generator)
    exponents = torch.randint(0, spread + 1, (out, features), generator=generator)
    size = (rows, columns)
    code, scale = in_blocks(weight * 2.0**-exponents, size, power_of_two)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "STRIP", strip)
        base, moved = blocks.cast_again("site", code, scale, size, SPEC)
    before, after = decoded(code, scale, size), base.dequantize()
    normal = before.abs() >= 2.0**-6 * base.scale
    bound = torch.where(normal, before.abs() * 2.0**-4, 2.0**-10 * base.scale)
    if power_of_two:
        bound = torch.where(normal, 0.0, bound)
    assert bool(((after - before).abs() <= bound).all())
    change = float((after - before).double().norm() / before.double().norm().clamp_min(1e-30))
    assert moved.relative == pytest.approx(change, rel=1e-4)  # summed in float32
    assert torch.equal(blocks.dequantize(code, scale, size), before)


def test_powers_of_two_move_what_is_published_by_next_to_nothing(tmp_path):
    """Weights of a normal distribution, whose rows and columns differ in size by 2 to 4."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator)
    weight *= torch.randn(256, 1, generator=generator).exp2()
    weight *= torch.randn(1, 512, generator=generator).exp2()
    for power_of_two, most in ((True, 1e-3), (False, 0.03)):
        code, scale = in_blocks(weight, (128, 128), power_of_two)
        _, moved = blocks.cast_again("site", code, scale, (128, 128), SPEC)
        # Nothing but subnormals; a cast to nearest, whose error lies between 0 and 2**-4 and is
        # 2.6% in the mean of squares.
        assert moved.relative < most


@pytest.mark.parametrize("exact", [True, False], ids=["ue8m0", "float32"])
def test_prequantize_takes_them_too(tmp_path, exact):
    published(tmp_path / "fp8", exact)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = falqon_fx.prequantize(tmp_path / "fp8", tmp_path / "out", lora(), progress=False)
    assert any("W is cast again here" in str(w.message) for w in caught) is not exact
    assert report.layers == 14
    whole, parts = loaded(tmp_path / "fp8", exact), falqon_fx.load(tmp_path / "out")
    for path, state in falqon_fx.adapters(whole).items():
        assert torch.equal(state.base(), falqon_fx.adapters(parts)[path].base())
    left = dict(parts.named_parameters())
    assert not [name for name in left if "scale_inv" in name]
    for name, tensor in whole.named_parameters():
        if ".lora_" not in name and tensor.dtype == BF16:
            assert torch.equal(left[name], tensor)


def test_a_layer_that_is_left_out_is_decoded(tmp_path):
    """In the model's dtype, in which powers of two keep it exactly."""
    published(tmp_path / "fp8", True)
    config = FalqonConfig(exclude=["*.up_proj"])
    falqon_fx.prequantize(tmp_path / "fp8", tmp_path / "out", lora(), config, progress=False)
    model, dense = falqon_fx.load(tmp_path / "out"), by_transformers(tmp_path / "fp8")
    assert len(falqon_fx.adapters(model)) == 12
    kept = model.get_parameter(f"base_model.model.{UP}.base_layer.weight")
    assert torch.equal(kept, dense.get_parameter(f"{UP}.weight"))


def test_it_trains_and_is_exported(tmp_path):
    """The base stays, the loss falls, and what is written loads again."""
    model = falqon_fx.load(published(tmp_path / "fp8", True), lora(r=8)).train()
    before = {
        path: s.weight.view(torch.uint8).clone() for path, s in falqon_fx.adapters(model).items()
    }
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(20):
        loss = call(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]  # of one batch, time and again
    states = falqon_fx.adapters(model)
    assert all(torch.equal(states[path].weight.view(torch.uint8), b) for path, b in before.items())
    falqon_fx.save_fp8(model, tmp_path / "served", progress=False)
    assert len(falqon_fx.adapters(falqon_fx.load(tmp_path / "served", lora()))) == 14


def test_what_compressed_tensors_wrote_in_blocks(tmp_path):
    """Its preset FP8_BLOCK, by the real package."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization

    model = dense_model(hidden_size=256, intermediate_size=384, num_hidden_layers=1)
    group = quantization.preset_name_to_scheme("FP8_BLOCK", ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            _, scale = in_blocks(module.weight.detach(), (128, 128), False)
            module.weight_scale.data.copy_(scale)
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(
        model, quantization_format="float-quantized"
    )
    compressor.compress_model(model)
    folder_of(model, tmp_path)
    compressor.update_config(tmp_path)
    written = tmp_path / "config.json"
    pair = json.loads(written.read_text())["quantization_config"]["config_groups"]["group_0"]
    assert pair["weights"]["block_structure"] == [128, 128]
    assert blocks.block_size({"config_groups": {"": pair}}, tmp_path) == (128, 128)
    pair["weights"]["block_structure"] = "128x128"  # which the package takes, too
    assert blocks.block_size({"config_groups": {"": pair}}, tmp_path) == (128, 128)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="one FP8 scale per block"):
        states = falqon_fx.adapters(falqon_fx.load(tmp_path, lora()))
    assert len(states) == 7
    for path, state in states.items():
        name = path.removeprefix("base_model.model.")
        code, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert scale.shape == tuple(-(-n // 128) for n in code.shape)
        assert torch.equal(
            state.weight.view(torch.uint8), cast_base(decoded(code, scale, (128, 128)), SPEC).code
        )


# -- damaged ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return published(tmp_path_factory.mktemp("blocks") / "fp8", True)


INV = f"{UP}.weight_scale_inv"
WEIGHT = f"{UP}.weight"
GRID = r"has float32 {} as its scales, and blocks of 16 x 32 of \[96, 64\] need \[6, 2\]"


def alike(*shape: int) -> Change:
    """Scales that are the same and that do not fit."""
    return put(INV, lambda _: torch.full(shape, 2.0**-9))


DAMAGES: dict[str, tuple[Change, str]] = {
    "NaN": (put_first(INV, float("nan")), "1 of its 12 scales in .* are NaN"),
    "Inf": (put_first(INV, float("inf")), "1 of its 12 scales in .* are Inf"),
    "zero": (put_first(INV, 0.0), "1 of its 12 scales in .* are zero"),
    "negative": (put_first(INV, -1.0), "1 of its 12 scales in .* are negative"),
    "cut": (put(INV, lambda t: t[:-1]), GRID.format(r"\[5, 2\]")),
    "turned": (put(INV, lambda t: t.t()), GRID.format(r"\[2, 6\]")),
    "alike, a row too few": (alike(5, 2), GRID.format(r"\[5, 2\]")),
    "alike, of other blocks": (alike(2, 1), GRID.format(r"\[2, 1\]")),
    "alike, of a stack": (alike(2, 3, 4), GRID.format(r"\[2, 3, 4\]")),
    "alike, one per column": (alike(1, 64), GRID.format(r"\[1, 64\]")),
    "bits of scales": (
        put(INV, lambda t: t.to(torch.float8_e8m0fnu).view(torch.uint8)),
        r"has float8_e4m3fn \[96, 64\] with scales uint8 \[6, 2\]",
    ),
    "complex": (put(INV, lambda t: t.to(torch.complex64)), r"with scales complex64 \[6, 2\]"),
    "empty": (put(INV, lambda t: t[:, :0]), r"with scales float32 \[6, 0\]"),
    "no scales": (lose(INV), r"holds no scale for it, which is float8_e4m3fn \[96, 64\]"),
    "two scales": (
        put(f"{UP}.weight_scale", lambda t: 2 * t, of=INV),
        rf"it has scales as {UP}\.weight_scale and as {INV}",
    ),
    "zero points": (
        put(f"{UP}.weight_zero_point", lambda t: t.char() + 3, of=INV),
        "it has zero points that are not zero",
    ),
    "INT8 beside it": (
        put(WEIGHT, lambda t: t.float().char()),
        r"has it in INT8, and model\.layers\..*_proj in FP8",
    ),
    "E5M2": (
        put(WEIGHT, lambda t: t.float().to(torch.float8_e5m2)),
        r"float8_e5m2 \[96, 64\] for it",
    ),
    "a weight of one dimension": (
        put(WEIGHT, lambda t: t[0]),
        r"has float8_e4m3fn \[64\] with scales float32 \[6, 2\]",
    ),
    "a weight too small": (put(WEIGHT, lambda t: t[:16]), r"of \[16, 64\] need \[1, 2\]"),
    "dense beside its scales": (put(WEIGHT, lambda t: t.bfloat16()), "it is in .* but not in the"),
    "scales of nothing": (
        put(f"{UP}2.weight_scale_inv", lambda t: t, of=INV),
        "it is in .* but not in the model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_blocks_are_refused(source, tmp_path, damage):
    change, told = DAMAGES[damage]
    assert_refused(damaged(source, tmp_path / "fp8", change), UP, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [(put_byte(WEIGHT, 0x7F), "FP8 bytes in .* are NaN"), (put_first(INV, 2.0**16), "exceeds 65")],
    ids=["NaN", "huge"],
)
def test_damaged_codes_are_refused(source, tmp_path, change, told):
    """What `prequantize` had cast by then is gone on with once the weight is mended."""
    folder = damaged(source, tmp_path / "fp8", change)
    assert_refused(folder, UP, told, in_codes=True)
    for file in source.glob("*.safetensors"):
        shutil.copy(file, folder)
    prequantize(folder, tmp_path / "out")
    wanted = falqon_fx.adapters(falqon_fx.load(source, lora()))
    for path, state in falqon_fx.adapters(falqon_fx.load(tmp_path / "out")).items():
        assert torch.equal(state.base(), wanted[path].base())


def test_a_layer_that_is_left_out_is_refused_where_it_is_inf(source, tmp_path):
    folder = damaged(source, tmp_path / "fp8", put_first(INV, 1e38))
    config = FalqonConfig(exclude=["*.up_proj"])
    assert_refused(folder, UP, "holds NaN or Inf", config=config, in_codes=True)


@pytest.mark.parametrize(
    ("given", "site", "told"),
    [
        (None, "_proj", r"it has float32 \[\d, 2\] as its scales, and config.json names no blocks"),
        ([16], "fp8", "a block has rows and columns"),
        ([16, 0], "fp8", "a block has rows and columns"),
        ([64, 64], "_proj", "blocks of 64 x 64 of .* need"),
        ([32, 16], "_proj", "blocks of 32 x 16 of .* need"),
        ([16, "32"], "config.json", "weight_block_size"),
    ],
    ids=str,
)
def test_a_wrong_size_of_block_is_refused(source, tmp_path, given, site, told):
    folder = damaged(source, tmp_path / "fp8", lambda _: None)
    settings(folder, lambda c: c["quantization_config"].update(weight_block_size=given))
    assert_refused(folder, site, told)


def test_no_size_of_block_is_refused_where_scales_are_alike(source, tmp_path):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {n: torch.ones_like(t) for n, t in tensors.items() if n.endswith("_inv")}

    folder = damaged(source, tmp_path / "fp8", change)
    settings(folder, lambda c: c["quantization_config"].pop("weight_block_size"))
    assert_refused(folder, "_proj", "names no blocks")
