"""The products that the ``falqon::`` ops are lowered to on a GPU (see `falqon_fx.ops.gpu`).

In a graph whose sizes are all known they open into what was chosen: ATen's GEMMs, and launches of
generated kernels (`call`). Where sizes are symbols they stay opaque ops, which choose by the sizes
that they meet. These are defined without the wrapping of `torch.library.custom_op`: several run in
each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falqon_fx.kernels.fixed import Fixed
from falqon_fx.kernels.spec import MAX_PIECES
from falqon_fx.ops.adapter_grads import blocks
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.site.numerics import filled
from falqon_fx.site.nvfp4 import is_packed, shape_of
from falqon_fx.site.spec import parse_spec

if TYPE_CHECKING:
    from falqon_fx.kernels.gemm.launch import Piece
    from falqon_fx.kernels.products.contest import Options


def call(run: Callable[..., Any], *args: Any) -> Any:
    """The result of one of the functions below, opened in a graph that is being traced where no
    size is a symbol.
    """
    return run(*args) if sizes_known(args) else getattr(torch.ops.falqon, run.__name__)(*args)


def sizes_known(args: Sequence[Any]) -> bool:
    """Whether no size of the tensors among ``args`` is a symbol."""
    columns = [value if isinstance(value, list | tuple) else [value] for value in args]
    tensors = (value for column in columns for value in column if isinstance(value, Tensor))
    return all(isinstance(size, int) for tensor in tensors for size in tensor.shape)


def cast_fp8(x: Tensor, dtype: torch.dtype, spec_text: str) -> tuple[Tensor, Tensor]:
    """`cast_fp8` as a kernel by itself, of ``x`` in its own dtype."""
    from falqon_fx.kernels.products import activation_cast

    q, scale = activation_cast.cast_fp8(x, dtype, spec_text).run()
    return q, scale


def _cast_fp8_fake(x: Tensor, dtype: torch.dtype, spec_text: str) -> tuple[Tensor, Tensor]:
    scale = (x.shape[0], 1) if parse_spec(spec_text).per_row else ()
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(scale, dtype=torch.float32)


def adapter_casts(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    fixed: Fixed,
    dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """[Â_j, its scale, b_j] of each adapter in turn, b_j = [scaling_j · B_j | B_c,j | W_S,j] in
    ``dtype``.
    """
    from falqon_fx.kernels.products import adapters

    return adapters.adapter_casts(lora_a, lora_b, scaling, dtype, spec_text, *fixed).run()


def merged_product(
    q: Tensor,
    q_scale: Tensor,
    weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    bias: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    b: Sequence[Tensor],
    out_a: Sequence[Tensor],
    error: Sequence[Tensor],
    owner: Sequence[int],
    out_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """O_i [n, out_i] of the sites i that share x, then O_A [n, Σ r_j], unless that is given as
    ``out_a``:

        O_i   = dq(q) · dq(W_i)ᵀ + Σ_j [O_A,j | e_j] · b_jᵀ + bias_i   over owner[j] == i
        O_A,j = dq(q) · dq(Â_j)ᵀ

    ``error`` has the e_j of those adapters in turn whose b_j is wider than Â_j is high.

    W_i [out_i, in] and Â_j [r_j, in] are E4M3, their scales float32 [rows, 1] or []; or W_i is
    NVFP4. ``bias`` has one entry per site or none, ``b`` one per adapter or none, ``out_a`` one or
    none. With ``b`` O_A comes first, since all of it is needed for each tile of O. One op, so that
    Inductor writes q once.
    """
    from falqon_fx.kernels.gemm.launch import Piece
    from falqon_fx.kernels.products import dispatch

    dtype, options = gemm_dtype(out_dtype, q.device), options_of(spec_text)
    packed = any(map(is_packed, weight))
    q, a = filled(q), [filled(code) for code in a]
    weight = weight if packed else [filled(w) for w in weight]

    def run(pieces: Sequence[Piece], a_pieces: int) -> list[Tensor]:
        """O of each piece but the last ``a_pieces``, whose O_A stand side by side behind them."""
        of_sites: list[Tensor] = []
        of_adapters: list[Tensor] = []
        for first in range(0, len(pieces), MAX_PIECES):
            part = pieces[first : first + MAX_PIECES]
            in_part = len(range(max(first, len(pieces) - a_pieces), first + len(part)))
            made = dispatch.forward(q, q_scale, part, in_part, out_dtype, dtype, options).run()
            of_sites += made[: len(part) - in_part]
            of_adapters += made[len(part) - in_part :]
        return [*of_sites, *([_side_by_side(of_adapters)] if of_adapters else [])]

    biases: Sequence[Tensor | None] = bias or [None] * len(weight)
    sites = [Piece(w, s, of_site) for w, s, of_site in zip(weight, scale, biases, strict=True)]
    adapters = [Piece(code, s) for code, s in zip(a, a_scale, strict=True)]
    if adapters and not b and not out_a and not packed:
        return run([*sites, *adapters], len(adapters))
    made: list[Tensor] = []
    if not out_a:
        made = run(adapters, len(adapters)) if adapters else [q.new_empty((len(q), 0), dtype=dtype)]
    if b:
        sites = _with_adapters(sites, _left([*out_a, *made][0], a, b, error), b, owner)
    results: dict[int, Tensor] = {}
    for members in launches([site.right is not None for site in sites]):
        results |= zip(members, run([sites[i] for i in members], 0), strict=True)
    return [*(results[i] for i in range(len(sites))), *made]


def launches(adapted: Sequence[bool]) -> list[list[int]]:
    """Which sites of a group are computed together: those that add O_A · bᵀ, and the others."""
    kinds = [[i for i, adds in enumerate(adapted) if adds == kind] for kind in (True, False)]
    return [members for members in kinds if members]


def _left(
    out_a: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], error: Sequence[Tensor]
) -> Tensor:
    """[O_A,1 | e_1 | O_A,2 | ...], the columns that every b_j meets."""
    if not error:
        return out_a
    given, parts = iter(error), list[Tensor]()
    of_a = out_a.split([len(code) for code in a], dim=1)
    for part, code, factor in zip(of_a, a, b, strict=True):
        parts += [part, next(given)] if factor.shape[1] > len(code) else [part]
    return torch.cat(parts, dim=1)


def _with_adapters(
    sites: Sequence[Piece], left: Tensor, b: Sequence[Tensor], owner: Sequence[int]
) -> list[Piece]:
    """The sites with the term left · bᵀ of their adapters."""
    widths, done = [factor.shape[1] for factor in b], list(sites)
    for i, site in enumerate(sites):
        own = [j for j, of in enumerate(owner) if of == i]
        if own:
            right = _side_by_side([b[j] for j in own])
            done[i] = replace(site, left=blocks(left, widths, own), right=right)
    return done


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=1)


def _merged_product_fake(
    q: Tensor, q_scale: Tensor, weight: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    _, _, a, _, _, out_a, _, _, out_dtype, _ = rest
    n, rank = q.shape[0], sum(code.shape[0] for code in a)
    results = [q.new_empty((n, w.shape[0]), dtype=out_dtype) for w in weight]
    if not out_a:
        results.append(q.new_empty((n, rank), dtype=gemm_dtype(out_dtype, q.device)))
    return results


def adapter_product(
    q: Tensor,
    q_scale: Tensor,
    a: Tensor,
    a_scale: Tensor,
    out_dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """O_A [n, r] = dq(q) · dq(Â)ᵀ of one adapter, whose input the base layer doesn't read."""
    from falqon_fx.kernels.gemm.launch import Piece
    from falqon_fx.kernels.products import dispatch

    dtype, options = gemm_dtype(out_dtype, q.device), options_of(spec_text)
    (result,) = dispatch.forward(
        filled(q), q_scale, [Piece(filled(a), a_scale)], 1, out_dtype, dtype, options
    ).run()
    return result


def _adapter_product_fake(q: Tensor, q_scale: Tensor, a: Tensor, *rest: Any) -> Tensor:
    _, out_dtype, _ = rest
    return q.new_empty((q.shape[0], a.shape[0]), dtype=gemm_dtype(out_dtype, q.device))


def grad_x_product(
    q: Sequence[Tensor],
    q_scale: Sequence[Tensor],
    weight: Sequence[Tensor],
    left: Sequence[Tensor],
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor],
    turned: Sequence[Tensor],
    x_dtype: torch.dtype,
    spec_text: str,
) -> Tensor:
    """dL/dx [n, in] = Σ_i (q_i · W_i) ⊙ s_q,i + left · [dq(Â_j)]; ``left`` [n, Σ r_j] has one entry
    or none, ``turned`` the W_iᵀ or none. The scales of W are in q_i, or in s_q,i, and without
    ``a_scale`` those of Â in ``left``.
    """
    from falqon_fx.kernels.gemm.launch import Product
    from falqon_fx.kernels.products import dispatch

    products = [Product(q_i, s, w) for q_i, s, w in zip(q, q_scale, weight)]
    factors: tuple[Tensor | None, Tensor | None] = None, None
    if left:
        values = [code.to(torch.float32) for code in a]
        if a_scale:
            values = [value * s for value, s in zip(values, a_scale, strict=True)]
        right = torch.cat([value.to(left[0].dtype) for value in values]).t()
        factors = left[0], right.clone(memory_format=torch.contiguous_format)
    given = products, *factors, x_dtype, options_of(spec_text), turned
    (result,) = dispatch.grad_x(*given).run()
    return result


def _grad_x_product_fake(
    q: Sequence[Tensor], q_scale: Sequence[Tensor], weight: Sequence[Tensor], *rest: Any
) -> Tensor:
    *_, x_dtype, _ = rest
    return q[0].new_empty((q[0].shape[0], shape_of(weight[0])[1]), dtype=x_dtype)


def grad_out_a_product(grad: Sequence[Tensor], b: Sequence[Tensor], spec_text: str) -> Tensor:
    """D [n, Σ r_j] = side by side grad_j · b_j of each adapter j, for b_j [out_j, r_j]."""
    from falqon_fx.kernels.products import adapters

    (d,) = adapters.grad_out_a(grad, b, parse_spec(spec_text).kernel).run()
    return d


def _grad_out_a_fake(grad: Sequence[Tensor], b: Sequence[Tensor], spec_text: str) -> Tensor:
    return b[0].new_empty((len(grad[0]), sum(f.shape[1] for f in b)))


def adapter_grads_product(
    grad: Sequence[Tensor],
    out_a: Tensor,
    ranks: Sequence[int],
    widths: Sequence[int],
    scaling: Sequence[float],
    x: Sequence[Tensor],
    d: Sequence[Tensor],
    out_dtype: torch.dtype,
    spec_text: str,
) -> list[Tensor]:
    """dL/dB_j [out_j, r_j] = scaling_j · grad_jᵀ · O_A,j of each adapter j, with the first r_j of
    the ``widths`` columns that it has in ``out_a``; then, for ``x`` = [code, scale],
    dL/dA_j [r_j, in] = D_jᵀ · x̂, where ``d`` is one tensor, the D_j side by side.
    """
    from falqon_fx.kernels.products import adapters

    given = grad, out_a, ranks, scaling, x, d, out_dtype, parse_spec(spec_text).kernel
    return adapters.adapter_grads(*given, widths=widths).run()


def _adapter_grads_fake(grad: Sequence[Tensor], out_a: Tensor, *rest: Any) -> list[Tensor]:
    ranks, _, _, x, _, out_dtype, _ = rest
    shapes = [(g.shape[1], rank) for g, rank in zip(grad, ranks)]
    shapes += [(rank, x[0].shape[1]) for rank in ranks] if x else []
    return [out_a.new_empty(shape, dtype=out_dtype) for shape in shapes]


def options_of(spec_text: str) -> Options:
    """How the products of a site are to be computed."""
    from falqon_fx.kernels.products.contest import Options

    spec = parse_spec(spec_text)
    return Options(spec.kernel, spec.accumulation, spec.transpose)


def define(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make a function the op of that name, opaque to a compiler."""
    op = f"falqon::{name}"
    torch.library.define(op, torch.library.infer_schema(run, mutates_args=()))
    torch.library.impl(op, "default", run)
    torch.library.register_fake(op, fake)


for _run, _fake in (
    (cast_fp8, _cast_fp8_fake),
    (merged_product, _merged_product_fake),
    (adapter_product, _adapter_product_fake),
    (grad_x_product, _grad_x_product_fake),
    (grad_out_a_product, _grad_out_a_fake),
    (adapter_grads_product, _adapter_grads_fake),
):
    define(_run.__name__, _run, _fake)
# What stands in a joint graph, until it is decomposed into the products of these names.
define("grad_out_a", grad_out_a_product, _grad_out_a_fake)
define("adapter_grads", adapter_grads_product, _adapter_grads_fake)
