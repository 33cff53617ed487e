"""What the ops should compute with adapters in FP8, in float64 on the same quantized operands."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.lowered import F32, behind, cast_error, decoded, hat, number
from tests.strategies import Case, Layer, Lora
from tests.tolerances import Approx, fp8_cast_bound, side_by_side

ROOM = {E5M2: 64.0, E4M3: 4.0}
# The largest number and half of the gap below it: what is not beyond that is nearest to it.
ROUNDS_TO_MAX = {E4M3: 448.0 + 2.0**8 * 2.0**-4, E5M2: 57344.0 + 2.0**15 * 2.0**-3}


def in_fp8(case: Case) -> Case:
    """The same with adapters in FP8, and so much smaller ones that hardly any is clamped."""

    def smaller(lora: Lora) -> Lora:
        of_b = [part * 2.0**-6 for part in lora.fixed.error_b]
        return replace(lora, lora_b=lora.lora_b * 2.0**-6, fixed=lora.fixed._replace(error_b=of_b))

    layers = [replace(layer, adapters=[*map(smaller, layer.adapters)]) for layer in case.layers]
    spec = replace(case.spec, adapter="fp8")
    return replace(case, layers=layers, spec=spec, adds_b=True)


def cast_fp8(wanted: Approx, unit: Tensor, fp8: torch.dtype) -> Approx:
    """After a cast to FP8 in multiples of ``unit``; nothing may be clamped but what rounds to the
    largest number anyway.
    """
    value = wanted.value
    assert bool((value.abs() <= ROUNDS_TO_MAX[fp8] * unit + wanted.bound).all())
    # A cast is monotonic: of what is off by the bound, the result is off by no more than the bound
    # and the two casts' own errors.
    own = fp8_cast_bound(wanted.largest, unit, fp8)
    return Approx(value, wanted.bound + own)


def exactly(value: Tensor) -> Approx:
    return Approx.exact(value.double())


def expected(case: Case, out_a: Tensor, dtype: torch.dtype) -> dict[str, Approx]:
    """Each result on what is multiplied. t is known from the O_A that the op returns (checked
    itself against x and A), b and α from the casts. ``dtype``: what products return.
    """
    spec = case.spec
    e_grad = E5M2 if spec.grad == "e5m2" else E4M3
    x_hat = hat(case.x.detach().reshape(-1, case.x.shape[-1]), E4M3, spec)
    wanted: dict[str, Approx] = {}
    parts = iter(out_a.split([lora.rank for lora in case.adapters], dim=1))
    of_a, j = [], -1
    reached = [layer for layer in case.layers if layer.reached]
    of_rows = [_of_rows(layer) for layer in reached]
    wide = torch.cat([_flat(layer).float() * s.float() for layer, s in zip(reached, of_rows)], 1)
    largest = wide.abs().amax(1, keepdim=True) if spec.per_row else wide.abs().amax()
    s_g = _scale(largest, e_grad, spec) * ROOM[e_grad]
    codes = (wide / s_g).to(e_grad).double()
    each = iter(codes.split([len(layer.base.code) for layer in reached], dim=1))
    lefts, rights, others = [exactly(codes)], [], []
    for layer in reached:
        rights.append(decoded(layer.base.code, torch.ones(())))
    for i, layer in enumerate(case.layers):
        g = next(each) if layer.reached else None
        left, right = [x_hat], [decoded(layer.base.code, layer.base.scale)]
        for lora in layer.adapters:
            j += 1
            code, a_scale, b8, alpha = case.casts[j]
            part = next(parts)
            x_j = case.x if lora.x is None else lora.x
            read = hat(x_j.detach().reshape(-1, x_j.shape[-1]), E4M3, spec)
            a = decoded(code, a_scale)
            product = (read @ a.t()).rounded(dtype, *behind(spec, dtype))
            unit = x_scale(case) * alpha.double()
            of_a.append(cast_fp8(product, unit, E4M3).rounded(F32, dtype))
            added = exactly(part)
            if spec.scale == "pow2":  # t is an FP8 number
                t = part.double() / unit
                assert torch.equal(t.to(E4M3).double(), t)
            else:  # O_A is t in other units, rounded
                added = added.rounded(F32, dtype)
            s_w, of_w = layer.base.scale.double(), b8[:, lora.rank :].float().double()
            b8 = b8[:, : lora.rank]
            left.append(added)
            right.append(exactly(b8.float().double() * s_w / alpha.double()))
            if lora.channels is not None:
                error = cast_error(case, lora.channels)
                left.append(cast_fp8(error.rounded(F32), x_scale(case), E4M3).rounded(F32, dtype))
                right.append(exactly(of_w * s_w))
            if g is None:
                continue
            grad, rank = exactly(_flat(layer)), len(lora.lora_a)
            of_b = (grad.t() @ exactly(part[:, :rank])).rounded(dtype) * number(lora.scaling)
            wanted[f"b {j}"] = of_b.rounded(F32, lora.lora_b.dtype)
            product = (exactly(g) @ exactly(b8.float())).rounded(dtype)
            d = (product * exactly(s_g / alpha)).rounded(F32, F32, dtype)
            of_x = (d if spec.scale == "pow2" else d.rounded(F32, dtype))[:, :rank]
            wanted[f"a {j}"] = (of_x.t() @ read).rounded(dtype, lora.lora_a.dtype)
            if case.apart:
                values = a if spec.scale == "pow2" else a.rounded(F32, dtype)
                through = (d @ values).rounded(dtype, x_j.dtype)
                if lora.x is None:
                    others.append(through)
                else:
                    wanted[f"x {j}"] = through
            else:
                tail = product * exactly(a_scale.reshape(1, -1).double() / alpha.double())
                lefts.append(cast_fp8(tail.rounded(F32, F32), torch.ones(()), e_grad))
                rights.append(decoded(code, torch.ones(())))
        y = side_by_side(left, 1) @ side_by_side(right, 1).t()
        y = y.rounded(dtype, *behind(spec, dtype))  # scales that follow the sum
        if layer.bias is not None:
            y = (y + Approx.exact(layer.bias).rounded(dtype)).rounded(dtype)
        wanted[f"y {i}"] = y.rounded(case.out_dtype)
        if layer.reached and layer.bias is not None:
            total = exactly(torch.ones(1, len(codes))) @ exactly(_flat(layer))
            wanted[f"bias {i}"] = Approx(total.value[0], total.bound[0]).rounded(layer.bias.dtype)
    total = (side_by_side(lefts, 1) @ side_by_side(rights, 0)).rounded(dtype)
    total = (total * exactly(s_g)).rounded(F32, case.x.dtype)
    for other in others:
        total = (total + other).rounded(case.x.dtype)
    wanted["x"] = total
    none = exactly(torch.zeros(len(x_hat.value), 0))
    wanted["out_a"] = side_by_side(of_a, 1) if of_a else none
    return wanted


def _flat(layer: Layer) -> Tensor:
    return layer.grad.reshape(-1, len(layer.base.code))


def _of_rows(layer: Layer) -> Tensor:
    """s_W as columns [1, out]."""
    return layer.base.scale.reshape(1, -1).expand(1, len(layer.base.code)).double()


def _scale(amax: Tensor, fp8: torch.dtype, spec: SiteSpec) -> Tensor:
    limit = torch.finfo(fp8).max
    if spec.scale == "pow2":
        scale = (amax.double() / limit).log2().ceil().exp2().float()
    else:
        scale = amax * (1 / limit)
    return torch.where(amax == 0, 1.0, scale).double()


def x_scale(case: Case) -> Tensor:
    x = case.x.detach().reshape(-1, case.x.shape[-1]).float().abs()
    if case.spec.per_row:
        return _scale(x.amax(1, keepdim=True), E4M3, case.spec)
    return _scale(x.amax() if x.numel() else torch.zeros(()), E4M3, case.spec)
