"""What transformers and compressed-tensors make of a folder of `save_fp8`."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon_fx import FalqonConfig
from falqon_fx.ops.lowering import cast_fp8
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
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
    sites,
)
from tests.models import tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.tolerances import Approx, fp8_cast_bound, gamma

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")


# -- the real packages -----------------------------------------------------------------------------


def test_the_config_is_valid_for_the_real_packages(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy

    export(in_fp8(tiny_llama(), prepared=True), tmp_path)
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

    model = in_fp8(tiny_llama(target_modules=targets), prepared=True)
    report = export(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    settings = QuantizationConfig.model_validate(config.quantization_config)
    fresh = transformers.LlamaForCausalLM(model.get_base_model().config)
    apply_quantization_config(fresh, settings)
    found = {path for path, module in fresh.named_modules() if hasattr(module, "weight_scale")}
    assert found == set(report.layers)
    (noted,) = [note for note in report.notes if "fuse" in note] or [""]
    assert ("model.layers.0.self_attn" in noted) is (targets != "all-linear")


@each_value(dtype=[F32, BF16], granularity=["tensor", "row"])
def test_transformers_loads_the_same_weights(tmp_path, dtype, granularity):
    """Compressed until the first call, dequantized after it: exactly, as scales are powers of 2."""
    export(in_fp8(tiny_llama(dtype), prepared=True, granularity=granularity), tmp_path)
    loaded, found = load(tmp_path, dtype), layers_in(tmp_path)
    assert len(found) == 14
    for path, base in found.items():
        weight = loaded.get_submodule(path).weight
        assert weight.dtype == E4M3
        assert torch.equal(weight.view(torch.uint8), base.code)
    loaded(IDS)
    for candidate in (loaded, dense(tmp_path, dtype)):
        for path, base in found.items():
            weight = candidate.get_submodule(path).weight
            assert weight.dtype == dtype
            assert torch.equal(weight.float(), base.dequantize())


def test_scales_that_are_not_powers_of_two_lose_bits_in_a_bf16_model(tmp_path):
    """Why "pow2" is the default: transformers holds the scales in the model's dtype, so with "amax"
    they are rounded once (2^-8), and the product again.
    """
    export(in_fp8(tiny_llama(BF16), prepared=True, scale="amax"), tmp_path)
    loaded, off = load(tmp_path, BF16), 0
    loaded(IDS)
    for path, base in layers_in(tmp_path).items():
        weight, exact = loaded.get_submodule(path).weight.double(), base.dequantize().double()
        assert ((weight - exact).abs() <= gamma(2, 2.0**-8) * exact.abs()).all()
        off += int((weight != exact).sum())
    assert off


# -- logits ----------------------------------------------------------------------------------------


@each_value(update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
def test_logits_are_those_of_training_where_activations_are_cast_alike(tmp_path, update, prepared):
    """The loaded weights, each linear's input through falqon's cast: bit for bit the model that
    trained, since both multiply the same two float32 matrices. With the default an adapter is not
    part of the weight while it trains, so this one has B = 0.
    """
    if update == "rows":
        model = by_rows(tiny_llama(layers=1), prepared)
    else:
        model = in_fp8(tiny_llama(layers=1), prepared, b_size=0)
    export(model, tmp_path)
    config = FalqonConfig(update=update, inner="eager")
    loaded, compiled, spec = dense(tmp_path), call(model, config), SiteSpec.from_config(config)

    def cast(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = args
        read = cast_fp8(x.reshape(-1, x.shape[-1]), E4M3, spec, torch.float32)
        return ((read.value * read.rest).reshape(x.shape),)

    with torch.no_grad():
        plain = loaded(IDS).logits
        for path in layers_in(tmp_path):
            loaded.get_submodule(path).register_forward_pre_hook(cast)
        expected = compiled(IDS).logits
        assert torch.equal(loaded(IDS).logits, expected)
        assert not torch.equal(plain, expected)  # the casts are seen


def test_logits_with_the_engines_own_casts_are_within_the_bound_of_both(tmp_path):
    """With FP8 in the last layer alone, logits are one product, x · Mᵀ with M = dq(W) + s·B·A.

    compressed-tensors casts x with amax/448 a token, and reads q(M). falqon casts x with a power of
    two below twice that, and A by rows; s·B is rounded to float32, and the sum of the two products.
    """
    model = in_fp8(tiny_llama(target_modules=["lm_head"]), prepared=True, frozen="leave")
    export(model, tmp_path)
    compiled = call(model, FalqonConfig(inner="eager", frozen="leave"))
    loaded, seen = load(tmp_path), dict[str, Any]()
    with torch.no_grad():
        loaded(IDS)  # the first call decompresses the weights
        hook = loaded.model.register_forward_hook(lambda m, a, out: seen.update(x=out[0]))
        actual, expected = loaded(IDS).logits, compiled(IDS).logits
        hook.remove()
    x, (site,) = seen["x"].reshape(-1, 32), sites(model).values()
    ((a, b, scaling),) = site.adapters
    merged = Approx.exact(site.base()) + Approx.exact(b * scaling) @ Approx.exact(a)
    scale = layers_in(tmp_path)["lm_head"].scale.double()
    whole = Approx(merged.value, merged.bound + fp8_cast_bound(merged.largest, scale, E4M3))
    amax = x.abs().amax(1, keepdim=True).double() / 448
    served = cast_approx(x, amax) @ whole.t()
    served.assert_holds(actual.reshape(served.value.shape))
    of_a = cast_approx(a.detach(), 2 * a.detach().abs().amax(1, keepdim=True).double() / 448)
    of_x = cast_approx(x, 2 * amax)
    low = (of_x @ of_a.t()).rounded(F32) @ Approx.exact(b.detach() * scaling).rounded(F32).t()
    trained = (of_x @ Approx.exact(site.base()).t() + low).rounded(F32)
    trained.assert_holds(expected.reshape(trained.value.shape))
    assert not torch.equal(actual, expected)


def cast_approx(x: Tensor, scale: Tensor) -> Approx:
    """x after a cast to E4M3 with a scale up to ``scale``, which is rounded itself (gamma_4)."""
    bound = fp8_cast_bound(x, scale * (1 + gamma(4)), E4M3) * (1 + gamma(4))
    return Approx(x.double(), bound)
