"""W rounded along what layers read, and where a calibration puts it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site.base import cast_base
from falqon_fx.site.compensate import DAMPING, damped_root
from falqon_fx.site.rounding import BLOCK, round_along
from falqon_fx.site.spec import SiteSpec
from tests.calibrated import EAGER, IN, RANK, adapted, calibrated, inputs
from tests.exports import IDS, export, wide_llama
from tests.sites import randn
from tests.tolerances import UNIT_ROUNDOFF, gamma

SPECS: dict[str, dict[str, Any]] = {
    "rows": {},
    "one scale": {"granularity": "tensor"},
    "amax": {"scale": "amax"},
    "int8": {"base_dtype": "int8"},
}
OUT, FEATURES = 24, 2 * BLOCK + 44  # two blocks and a part of one


def spec_of(**options: Any) -> SiteSpec:
    return SiteSpec.from_config(FalqonConfig(**options))


def correlated(features: int, seed: int = 0) -> Tensor:
    """L of inputs that a few directions make most of."""
    x = randn(900, 12, seed=seed) @ randn(12, features, seed=seed + 1)
    x += 0.2 * randn(900, features, seed=seed + 2)
    return damped_root(x.t() @ x / len(x))


@pytest.mark.parametrize("name", SPECS)
def test_each_column_is_rounded_from_where_it_makes_up_for_those_behind_it(name):
    """In float64, with the columns behind it as they came out. Half a step of E4M3 is a 16th of the
    value, or 2^-10 scales; of INT8 half a scale. float32: W in steps is off by u of itself, and
    what the columns carry by a sum of as many products as there are columns, and a quotient.
    """
    spec, weight, root = spec_of(**SPECS[name]), randn(OUT, FEATURES), correlated(FEATURES)
    base = round_along(weight, root, spec)
    found, low, wide = base.dequantize().double(), root.double(), weight.double()
    error, scale = wide - found, base.scale.double()
    behind = low.tril(-1) / low.diagonal()
    aimed = wide + error @ behind
    most = (448 if spec.base == "fp8" else 127) * scale
    size = aimed.clamp(-most, most)
    half = (size.abs() / 16).maximum(scale * 2.0**-10) if spec.base == "fp8" else scale / 2
    off = wide.abs() + error.abs() @ behind.abs()
    assert bool(((found - size).abs() <= half + gamma(FEATURES + 8) * off).all())


@pytest.mark.parametrize("name", SPECS)
def test_it_costs_less_than_nearest_and_as_much_where_no_channels_go_together(name):
    spec, weight, root = spec_of(**SPECS[name]), randn(OUT, FEATURES), correlated(FEATURES)
    nearest = cast_base(weight, spec)

    def cost(dequantized: Tensor) -> float:
        return float(((weight - dequantized) @ root).norm())

    # A third of the energy at most: 12 of the directions hold nearly all of it.
    assert cost(round_along(weight, root, spec).dequantize()) < cost(nearest.dequantize()) / 3**0.5
    alone = round_along(weight, torch.diag(randn(FEATURES).abs() + 0.1), spec)
    assert torch.equal(alone.code, nearest.code)
    assert torch.equal(alone.scale, nearest.scale)


def test_nvfp4_is_cast_to_nearest():
    """Its scales are those of 16 neighbours."""
    weight, spec = randn(32, 64), spec_of(base_dtype="nvfp4")
    assert torch.equal(round_along(weight, correlated(64), spec).code, cast_base(weight, spec).code)
    config = FalqonConfig(inner="eager", base_dtype="nvfp4")
    plain, model = adapted(), calibrated(config)
    falqon_fx.prepare(plain, config, progress=False)
    assert codes(plain).keys() == codes(model).keys()
    assert all(torch.equal(code, codes(model)[path]) for path, code in codes(plain).items())


def codes(model: Any) -> dict[str, Tensor]:
    return {p: m.code for p, m in model.named_modules() if isinstance(m, Fp8Linear)}


def test_a_prepared_layer_has_the_error_that_is_reported_and_less_than_ranks_alone_leave():
    """q's, along x as it comes from outside, in float64. Its terms are rounded to bf16 once each,
    by which what they make is off by 2^-8 of it and a little; E · L by float32 products.
    """
    original, model = adapted(), adapted()
    asked: dict[str, Any] = {"compensate": RANK, "outliers": 4, "progress": False}
    report = falqon_fx.prepare(model, EAGER, calibration=inputs(), **asked)
    site = next(path for path in report.calibrated if path.endswith(".q"))
    weight = original.get_submodule(f"{site}.base_layer").weight.detach().double()
    layer: Any = model.get_submodule(f"{site}.base_layer")
    x = torch.cat(inputs()).double()
    moment = x.t() @ x / len(x)
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    low = torch.linalg.cholesky(moment)
    nearest = (weight - cast_base(weight.float(), spec_of()).dequantize().double()) @ low
    product = layer.error_b.detach().double() @ layer.error_a.detach().double()
    error = (weight - layer.base().dequantize().double() - product) @ low
    left = float(error.norm() / nearest.norm())
    terms = layer.error_b.detach().double().abs() @ layer.error_a.detach().double().abs()
    off = 2 * UNIT_ROUNDOFF[torch.bfloat16] * (terms @ low.abs()).norm()
    off += gamma(2 * IN) * (weight.abs() @ low.abs()).norm()
    assert abs(left - report.calibrated[site]) <= float(off / nearest.norm())
    alone = torch.linalg.svdvals(nearest)[RANK:].norm() / nearest.norm()
    assert left < float(alone)


@pytest.mark.parametrize("asked", [{"compensate": 0, "outliers": 4}, {}, {"compensate": "auto"}])
def test_without_ranks_w_is_cast_to_nearest(asked):
    """Also of layers that "auto" buys none for, which an export knows by that."""
    plain, model = adapted(), adapted()
    falqon_fx.prepare(plain, EAGER, progress=False)
    given: dict[str, Any] = {"calibration": inputs(), **asked} if asked else {}
    report = falqon_fx.prepare(model, EAGER, progress=False, **given)
    bought = report.bought.items()
    ranks = {path.removesuffix(".base_layer"): ranks for path, (ranks, _) in bought}
    without = [path for path in codes(plain) if not ranks.get(path.removesuffix(".base_layer"))]
    assert without
    assert all(torch.equal(codes(plain)[path], codes(model)[path]) for path in without)
    left = report.calibrated
    assert all(left[path] == 1.0 for path, (ranks, _) in bought if not ranks)


def test_an_export_knows_the_weight_that_was_rounded_from_another(tmp_path: Path):
    """One that is as far off as a cast, in all layers alike, is not it."""
    model = wide_llama()
    plain = wide_llama().unload()
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("proj.weight"):
                weight += 0.1 * weight.std() * randn(*weight.shape)
    plain.save_pretrained(tmp_path / "plain")
    other.save_pretrained(tmp_path / "other")
    asked: dict[str, Any] = {"compensate": 8, "outliers": 4, "progress": False}
    falqon_fx.prepare(model, EAGER, calibration=[{"input_ids": IDS}], **asked)
    with pytest.warns(UserWarning, match="were calibrated"):
        export(model, tmp_path / "of W", base=tmp_path / "plain")
    with pytest.raises(FalqonError, match="was not made from the weight"):
        export(model, tmp_path / "of another", base=tmp_path / "other")
