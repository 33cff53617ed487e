"""What bases in INT8 and NVFP4 have in common: files, options, and what is never mixed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.config import BaseDtype
from falqon_fx.report import repro
from falqon_fx.site import nvfp4
from falqon_fx.site.spec import SiteSpec
from tests.folders import BF16, IDS, dense_model, folder_of, lora
from tests.models import compiled, tiny_mlp
from tests.parameters import slow
from tests.sites import randn

BOTH: list[BaseDtype] = ["int8", "nvfp4"]
FEATURES = {"int8": 130, "nvfp4": 144}  # of NVFP4 a multiple of 16


def config_of(base_dtype: BaseDtype) -> FalqonConfig:
    return FalqonConfig(base_dtype=base_dtype, inner="eager")


@pytest.mark.parametrize("base_dtype", BOTH)
@pytest.mark.parametrize("options", [{}, {"scale": "amax"}, {"granularity": "tensor"}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_site_alone_is_right(base_dtype, options, dtype):
    """Against float64, within the rounding of the products: what is decoded is exact."""
    spec = str(SiteSpec.from_config(replace(config_of(base_dtype), **options)))
    given = (70, FEATURES[base_dtype], 8, 33, 0.5, dtype, "float32", spec)
    for site in ({}, {"dropout": 0.25}, {"train_a": False}):
        found = repro.check(*given, adapters=2, **site)
        assert found.right, found


@pytest.mark.parametrize(
    ("base_dtype", "options"),
    [
        ("int8", {}),
        slow("int8", {"scale": "pow2", "init": "svd"}),
        slow("nvfp4", {}),
        ("nvfp4", {"scale": "amax", "init": "svd"}),
    ],
    ids=str,
)
def test_prequantize_is_prepare_bit_for_bit(tmp_path, base_dtype, options):
    transformers = pytest.importorskip("transformers")
    config = replace(config_of(base_dtype), **options)
    folder_of(dense_model(num_hidden_layers=1), tmp_path / "dense", "10KB")
    falqon_fx.prequantize(tmp_path / "dense", tmp_path / "out", lora(), config, progress=False)
    loaded = falqon_fx.load(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=BF16)
    expected = peft.get_peft_model(dense, lora())
    falqon_fx.prepare(expected, config, progress=False)
    named = dict(expected.named_parameters())
    for name, parameter in loaded.named_parameters():
        if config.init == "svd" or "lora_A" not in name:
            assert torch.equal(parameter, named[name]), name
    codes = [p for name, p in loaded.named_parameters() if name.endswith(".code")]
    assert len(codes) == 7
    assert {code.dtype for code in codes} == {torch.int8 if base_dtype == "int8" else torch.uint8}
    assert all(map(nvfp4.is_packed, codes)) is (base_dtype == "nvfp4")
    run = torch.compile(loaded, backend="falqon", options=dict[str, Any](config=config))
    assert run(IDS).logits.isfinite().all()


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_dtype", "options"),
    [
        *(
            (base, given)
            for base in BOTH
            for given in ({"update": "rows"}, {"adapter_dtype": "fp8"})
        ),
        ("int8", {"grad_dtype": "e4m3"}),
    ],
    ids=str,
)
def test_options_of_fp8_are_refused(base_dtype, options):
    ((name, value),) = options.items()
    with pytest.raises(FalqonConfigError) as error:
        FalqonConfig(base_dtype=base_dtype, **options)
    assert f"{name!r}: {value!r} is of FP8" in str(error.value)
    assert error.value.remedy == f'Leave {name} out, or set base_dtype="fp8"'


@pytest.mark.parametrize("base_dtype", BOTH)
@pytest.mark.parametrize(("name", "value"), [("kernel", "scaled_mm"), ("transpose", "store")])
def test_options_of_fp8_products_are_refused(base_dtype, name, value):
    with pytest.raises(FalqonConfigError) as error:
        FalqonConfig(base_dtype=base_dtype, **{name: value})
    assert f'is of FP8 products, and base_dtype="{base_dtype}" has others' in str(error.value)


@pytest.mark.parametrize("base_dtype", BOTH)
@pytest.mark.parametrize("prepared", ["fp8", "this"])
def test_a_base_is_never_run_in_another_dtype(base_dtype, prepared):
    torch.manual_seed(0)
    model, both = tiny_mlp(), {"fp8": "fp8", "this": base_dtype}
    config = FalqonConfig(base_dtype=both.pop(prepared))
    falqon_fx.prepare(model, config, progress=False)
    (asked,) = both.values()
    with pytest.raises(BackendCompilerFailed) as error:
        compiled(model, base_dtype=asked)(randn(3, 32))
    assert "Give prepare() and torch.compile() the same config" in str(error.value)
    assert f"base_dtype={base_dtype!r}" in str(error.value)


@pytest.mark.parametrize(
    ("base_dtype", "told"),
    [("int8", r"its code is torch.int8 .* has torch.uint8"), ("nvfp4", r"is \[48, 9, 2\], the")],
)
def test_a_state_dict_of_another_dtype_is_refused(base_dtype, told):
    torch.manual_seed(0)
    fp8, model = tiny_mlp(), tiny_mlp()
    falqon_fx.prepare(fp8, progress=False)
    falqon_fx.prepare(model, config_of(base_dtype), progress=False)
    layer = "base_model.model.0.base_layer."
    before = {n: t.clone() for n, t in model.state_dict().items() if n.startswith(layer)}
    with pytest.raises(FalqonError, match=told):
        model.load_state_dict(fp8.state_dict())
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
