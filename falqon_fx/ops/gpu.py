"""What the ``falqon::`` ops compute on a GPU: ATen casts, and products by `falqon_fx.kernels`.

The functions take what those of `falqon_fx.ops.lowering` take and compute the same; here products
get FP8 operands and their scales, and add up in float32 up to the store. The casts are ATen, so
that Inductor fuses them into whatever made x or dL/dO; the products stand in `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from falqon_fx.kernels.fixed import NONE_FIXED, Fixed
from falqon_fx.kernels.hardware import fp8_architecture
from falqon_fx.kernels.spec import in_casts
from falqon_fx.ops import products
from falqon_fx.ops.arguments import Merged
from falqon_fx.ops.cast_errors import (
    cast_errors,
    channels_apart,
    kept_errors,
    receivers,
    with_errors,
)
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.site.casts import cast_fp8
from falqon_fx.site.forms import operand_of
from falqon_fx.site.numerics import INT8, as_operand, without_autocast
from falqon_fx.site.spec import parse_spec


def quantize(
    x: Tensor, dtype: torch.dtype, spec_text: str, apart: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``x`` [n, k] ≈ q · scale: FP8 or INT8 q [n, k], scale float32 [n, 1] or []; zeros in the
    channels ``apart``, bool [k].

    Below sm_89 the compiler of generated kernels has no FP8: there its cast is an op by itself.
    """
    if apart is not None:
        x = x.masked_fill(apart, 0.0)
    known = x.device.type == "cuda" and torch.cuda.is_available()
    if known and dtype != INT8 and not fp8_architecture(x.device):
        narrow = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        x = x if narrow else x.to(torch.float32)
        q, scale = products.call(products.cast_fp8, x, dtype, spec_text)
        return q, scale
    return cast_fp8(x.to(torch.float32), dtype, spec_text)


@without_autocast
def proxy_update(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    wide: bool,
    spec_text: str,
    fixed: Fixed = NONE_FIXED,
) -> list[Tensor]:
    """See `falqon_fx.ops.lowering.proxy_update`."""
    dtype = torch.float32 if wide else torch.bfloat16

    def cast(a: list[Tensor], b: list[Tensor], own: list[int]) -> list[Tensor]:
        factors = [scaling[j] for j in own]
        return products.adapter_casts(a, b, factors, fixed.of(own), dtype, spec_text)

    return by_launches(lora_a, lora_b, cast)


def by_launches(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    cast: Callable[[list[Tensor], list[Tensor], list[int]], list[Tensor]],
) -> list[Tensor]:
    """The casts of all adapters in turn. ``cast`` makes those of one launch, which have one dtype,
    from their A, their B and their numbers: as many tensors of each.
    """
    alike: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for j, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
        alike.setdefault((a.dtype, b.dtype), []).append(j)
    casts: dict[int, list[Tensor]] = {}
    for members in alike.values():
        for own in (members[part] for part in in_casts(len(members))):
            of_a, of_b = ([of[j].detach() for j in own] for of in (lora_a, lora_b))
            made = cast(of_a, of_b, own)
            size = len(made) // len(own)
            casts |= {j: made[size * i : size * (i + 1)] for i, j in enumerate(own)}
    return [of_one for j in sorted(casts) for of_one in casts[j]]


@without_autocast
def grad_a(d: Tensor, code: Tensor, scale: Tensor, a_dtype: torch.dtype) -> Tensor:
    """See `falqon_fx.ops.lowering.grad_a`."""
    scaled = (d.to(torch.float32) * scale).to(d.dtype)
    return (scaled.t() @ code.to(d.dtype)).to(a_dtype)


@without_autocast
def merged_linear(given: Merged) -> list[Tensor]:
    """See `falqon_fx.ops.lowering.merged_linear`. x̂ is kept as it is multiplied: E4M3 or int8, and
    its scale.
    """
    x, spec_text = given.x, given.spec_text
    operand = parse_spec(spec_text).operand
    dtype = gemm_dtype(given.out_dtype, x.device)
    apart = channels_apart(given)
    q, q_scale = quantize(x.reshape(-1, x.shape[-1]), operand, spec_text, apart)
    own = [quantize(x_j.reshape(-1, x_j.shape[-1]), operand, spec_text) for x_j in given.adapter_x]
    codes_a = [as_operand(code) for code in given.a]
    out_a: list[Tensor] = []
    if own:
        parts = [
            products.call(
                products.adapter_product, *cast, code, scale_a, given.out_dtype, spec_text
            )
            for cast, code, scale_a in zip(own, codes_a, given.a_scale, strict=True)
        ]
        out_a = [torch.cat(parts, dim=1)]
    errors = cast_errors(given, q_scale, dtype, apart)
    if receivers(given):
        (of_codes,) = products.call(
            products.merged_product,
            *(q, q_scale, [], [], [], codes_a, given.a_scale, [], [], [], []),
            given.out_dtype,
            spec_text,
        )
        out_a = [with_errors(of_codes, given, errors)]
    made = products.call(
        products.merged_product,
        q,
        q_scale,
        [operand_of(w) for w in given.weight],
        given.scale,
        given.bias,
        codes_a,
        given.a_scale,
        [t.to(dtype) for t in given.b],
        out_a,
        [*errors.values()],
        given.owner,
        given.out_dtype,
        spec_text,
    )
    # Not `reshape`: below autograd that makes a view, which may not be written in place later.
    shape, sites = x.shape[:-1], len(given.weight)
    ys = [torch.ops.aten._unsafe_view(y, (*shape, y.shape[1])) for y in made[:sites]]
    kept = [part for cast in own or [(q, q_scale)] for part in cast] if given.keep_x else []
    kept += [errors[j] for j in kept_errors(given)]
    return [*ys, *(out_a or made[sites:]), *kept]


@without_autocast
def merged_linear_grad_x(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    d: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    turned: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """See `falqon_fx.ops.lowering.merged_linear_grad_x`; ``d`` is one, the D_j side by side, and
    ``turned`` the W_iᵀ where they are kept.
    """
    spec, dtype = parse_spec(spec_text), gemm_dtype(grad[0].dtype, grad[0].device)
    if spec.base == "int8":
        return _grad_x_of_int8(grad, weight, scale, d, a, a_scale, x_dtype)
    casts, q_scales = [], []
    for g, s in zip(grad, scale):
        folded = g.to(torch.float32) * s.t() if spec.base_per_row else g
        q, q_scale = quantize(folded, spec.grad_dtype, spec_text)
        casts.append(q)
        q_scales.append(q_scale if spec.base_per_row else q_scale * s)
    left = [t.to(dtype) for t in d]
    if d and spec.scale != "pow2":  # D takes the scales that dq(Â) would be rounded by
        of_columns = [s.reshape(1, -1).expand(1, len(code)) for code, s in zip(a, a_scale)]
        left = [(d[0].to(torch.float32) * torch.cat(of_columns, dim=1)).to(dtype)]
        a_scale = []
    # Products for bfloat16 may round to it on their way, which those of a float32 dL/dO must not.
    stored = torch.float32 if x_dtype == torch.bfloat16 != dtype else x_dtype
    # Copies beside a W that update="rows" writes are found by its address, which a graph hasn't.
    storing = spec.transpose == "store" and not turned
    opened = partial(products.call, products.grad_x_product)
    product: Tensor = (torch.ops.falqon.grad_x_product if storing else opened)(
        casts,
        q_scales,
        [operand_of(w) for w in weight],
        left,
        [as_operand(code) for code in a],
        a_scale,
        turned,
        stored,
        spec_text,
    )
    return product.to(x_dtype)


def _grad_x_of_int8(
    grad: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    d: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    x_dtype: torch.dtype,
) -> Tensor:
    """[dL/dO_1 ⊙ s_W,1 | ... | D ⊙ s_A] · [W_1; ...; Â_1; ...] as one product of the library, of
    integers that are decoded for it. In float16, whose range the scales could leave, they stay with
    the integers.
    """
    half = grad[0].dtype == torch.float16
    dtype = torch.float16 if half else gemm_dtype(grad[0].dtype, grad[0].device)
    codes, scales = [*weight, *a], [*scale, *a_scale]
    left = [*grad, *(d[0].split([len(code) for code in a], dim=1) if d else ())]
    if half:
        right = [code.to(torch.float32) * s for code, s in zip(codes, scales, strict=True)]
    else:
        right = codes
        left = [g.to(torch.float32) * s.reshape(1, -1) for g, s in zip(left, scales, strict=True)]
    whole = [
        torch.cat([part.to(dtype) for part in parts], dim) for parts, dim in ((left, 1), (right, 0))
    ]
    return (whole[0] @ whole[1]).to(x_dtype)
