"""The casts and the gradients of adapters by generated kernels, or by ATen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from falqon_fx.config import Scale
from falqon_fx.kernels.adapter_cast.examples import KERNEL as ADAPTER_CAST
from falqon_fx.kernels.adapter_cast.launch import adapter_cast
from falqon_fx.kernels.adapter_cast.spec import AdapterCastSpec
from falqon_fx.kernels.adapter_grads import launch as adapter_grads_launch
from falqon_fx.kernels.adapter_grads.examples import KERNEL as ADAPTER_GRADS
from falqon_fx.kernels.adapter_grads.spec import AdapterGradsSpec
from falqon_fx.kernels.fixed import Fixed, FixedDtype, joined
from falqon_fx.kernels.grad_out_a import launch as grad_out_a_launch
from falqon_fx.kernels.grad_out_a.examples import KERNEL as GRAD_OUT_A
from falqon_fx.kernels.grad_out_a.spec import GradOutASpec
from falqon_fx.kernels.hardware import FP8, cast_mode
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.products.contest import Contest, against_aten, where_runs
from falqon_fx.kernels.products.problem import dtype_name
from falqon_fx.kernels.spec import MAX_RANK, CastMode, InputDtype, sizes_of
from falqon_fx.site.casts import cast_fp8
from falqon_fx.site.numerics import INT8
from falqon_fx.site.spec import parse_spec


def adapter_grads(
    grad: Sequence[Tensor],
    out_a: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    x: Sequence[Tensor],
    d: Sequence[Tensor],
    out_dtype: torch.dtype,
    kernel: str,
    widths: Sequence[int] | None = None,
) -> Contest:
    """dL/dB of each adapter, then, with ``x`` and ``d``, dL/dA of each: see
    `falqon_fx.kernels.adapter_grads.launch.adapter_grads`.
    """
    columns = [*ranks] if widths is None else [*widths]

    def trained(of_all: Tensor) -> list[Tensor]:
        parts = zip(of_all.split(columns, dim=1), ranks, strict=True)
        return [part.narrow(1, 0, rank) for part, rank in parts]

    def plain() -> list[Tensor]:
        results = []
        for g, part, factor in zip(grad, trained(out_a), scaling, strict=True):
            product = g.to(out_a.dtype).t() @ part
            results.append((product.to(torch.float32) * factor).to(out_dtype))
        if x:
            values = x[0].to(d[0].dtype)
            for part in trained(d[0]):
                scaled = (part.to(torch.float32) * x[1]).to(part.dtype)
                results.append((scaled.t() @ values).to(out_dtype))
        return results

    def generated(spec: AdapterGradsSpec) -> list[Tensor]:
        return adapter_grads_launch.adapter_grads(grad, out_a, ranks, scaling, x, d, spec, columns)

    def made() -> tuple[AdapterGradsSpec, ...]:
        dtypes = (dtype_name(grad[0].dtype), dtype_name(out_a.dtype), dtype_name(out_dtype))
        by_row = not x or x[1].dim() == 2
        if max(ranks) > MAX_RANK or (x and x[0].dtype == INT8):
            return ()
        where = where_runs(out_a)
        found = _adapter_grads_specs(tuple(ranks), dtypes, by_row, bool(x), where)
        own = [*ranks, *columns, *(size for t in (out_a, *d) for size in row_places(t))]
        sizes = sizes_of(own, [t.shape[1] for t in (*grad, *x[:1])])
        return tuple(spec for spec in found if ADAPTER_GRADS.takes(spec, sizes, where))

    what = f"dL/dB {[g.shape[1] for g in grad]} of ranks {[*ranks]} in {columns}" + (
        f", dL/dA in={x[0].shape[1]}" if x else ""
    )
    return against_aten(what, grad[0], made, generated, plain, kernel)


def grad_out_a(grad: Sequence[Tensor], b: Sequence[Tensor], kernel: str) -> Contest:
    """[D]: see `falqon_fx.kernels.grad_out_a.launch.grad_out_a`."""

    def plain() -> list[Tensor]:
        return [torch.cat([g.to(f.dtype) @ f for g, f in zip(grad, b, strict=True)], dim=1)]

    def generated(spec: GradOutASpec) -> list[Tensor]:
        return [grad_out_a_launch.grad_out_a(grad, b, spec)]

    def made() -> tuple[GradOutASpec, ...]:
        ranks = tuple(f.shape[1] for f in b)
        dtypes = (dtype_name(grad[0].dtype), dtype_name(b[0].dtype))
        if max(ranks) > MAX_RANK:
            return ()
        found = _grad_out_a_specs(ranks, dtypes, runs_interpreted(b[0]))
        own = [*ranks, *(size for f in b for size in row_places(f))]
        sizes, where = sizes_of(own, [len(f) for f in b]), where_runs(b[0])
        return tuple(spec for spec in found if GRAD_OUT_A.takes(spec, sizes, where))

    what = f"dL/dO_A {[(*f.shape, f.stride(0)) for f in b]}"
    return against_aten(what, grad[0], made, generated, plain, kernel)


def adapter_casts(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    b_dtype: torch.dtype,
    spec_text: str,
    fixed_a: Sequence[Tensor] = (),
    fixed_b: Sequence[Tensor] = (),
    columns: Sequence[Tensor] = (),
) -> Contest:
    """[Â_j, its scale, b_j] of each adapter j in turn: see
    `falqon_fx.kernels.adapter_cast.launch.adapter_cast`.
    """
    site, first = parse_spec(spec_text), lora_a[0]
    fixed = Fixed(fixed_a, fixed_b, columns)
    ranks = fixed.rows(lora_a)

    def plain() -> list[Tensor]:
        casts: list[Tensor] = []
        for j, (a, b, factor) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
            rows = joined([a.to(torch.float32), *fixed_a[j : j + 1]], 0, ranks[j])
            code, scale = cast_fp8(rows, site.operand, spec_text)
            scaled = (b.to(torch.float32) * factor).to(b_dtype)
            of_b = joined([scaled, *fixed_b[j : j + 1]], 1, ranks[j])
            casts += [code, scale, joined([of_b, *columns[j : j + 1]], 1)]
        return casts

    def generated(made: AdapterCastSpec) -> list[Tensor]:
        return adapter_cast(lora_a, lora_b, scaling, made, fixed_a, fixed_b, columns)

    def made() -> tuple[AdapterCastSpec, ...]:
        kinds = {t.dtype for t in (*lora_a, *lora_b)}
        of_fixed = {t.dtype for t in fixed.tensors}
        if site.granularity != "row" or site.operand == INT8 or len(kinds) > 1 or len(of_fixed) > 1:
            return ()
        where, adapters = where_runs(first), len(lora_a)
        dtypes = dtype_name(first.dtype), dtype_name(b_dtype)
        behind: FixedDtype = dtype_name(*of_fixed) if of_fixed else "none"
        spec = _adapter_cast_spec(dtypes, behind, site.scale, cast_mode(where), adapters)
        more, last = fixed.ranks(adapters), fixed.counts(adapters)
        sizes_of_b = zip(lora_b, ranks, last, strict=True)
        widths = [a.shape[1] for a in lora_a]
        widths += [len(b) * (rank + count) for b, rank, count in sizes_of_b]
        sizes = sizes_of([*map(len, lora_a), *more, *last], widths)
        return (spec,) if ADAPTER_CAST.takes(spec, sizes, where) else ()

    shapes = [tuple(t.shape) for t in (*lora_a, *lora_b, *fixed.tensors)]
    what = f"casts of adapters {shapes}"
    return against_aten(what, first, made, generated, plain, site.kernel)


def row_places(matrix: Tensor) -> tuple[int, int]:
    """Where the first row of a matrix begins in its memory, and how far rows lie apart; where
    elements of rows don't stand side by side, those of a copy.
    """
    if matrix.stride(1) != 1:
        return 0, matrix.shape[1]
    return int(matrix.storage_offset()), matrix.stride(0)


@functools.lru_cache(maxsize=4096)
def _adapter_cast_spec(
    dtypes: tuple[InputDtype, InputDtype],
    fixed: FixedDtype,
    scale: Scale,
    cast: CastMode,
    adapters: int,
) -> AdapterCastSpec:
    given, made = dtypes
    if made == "float16":
        raise ValueError("b is bfloat16 or float32")
    return AdapterCastSpec(
        input_dtype=given, b_dtype=made, scale=scale, cast=cast, adapters=adapters, fixed=fixed
    )


@functools.lru_cache(maxsize=4096)
def _grad_out_a_specs(
    ranks: tuple[int, ...], dtypes: tuple[InputDtype, InputDtype], interpreted: bool
) -> tuple[GradOutASpec, ...]:
    operands: Literal["native", "float32"] = "float32" if interpreted else "native"
    made = GradOutASpec.for_ranks(ranks, grad_dtype=dtypes[0], a_dtype=dtypes[1], operands=operands)
    return (made,)


@functools.lru_cache(maxsize=4096)
def _adapter_grads_specs(
    ranks: tuple[int, ...],
    dtypes: tuple[InputDtype, InputDtype, InputDtype],
    by_row: bool,
    train_a: bool,
    where: int,
) -> tuple[AdapterGradsSpec, ...]:
    made = AdapterGradsSpec.for_ranks(
        ranks,
        grad_dtype=dtypes[0],
        a_dtype=dtypes[1],
        out_dtype=dtypes[2],
        x_scale="row" if by_row else "tensor",
        train_a=train_a,
        fp8=where >= FP8,
        operands="native" if where else "float32",
    )
    return (made,)
