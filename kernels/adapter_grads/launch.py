"""Host side of dL/dB and dL/dA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.adapter_grads.spec import AdapterGradsSpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch, with_rows
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER

_BLOCK = 1024  # elements that a program of add_up adds
_MOST_SUMS = 2**24  # of partial sums, 64 MiB


def adapter_grads(
    grad: Sequence[Tensor],
    out_a: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    x: Sequence[Tensor],
    d: Sequence[Tensor],
    spec: AdapterGradsSpec,
    widths: Sequence[int] | None = None,
) -> list[Tensor]:
    """dL/dB_j [out_j, r_j] = scaling_j · dL/dO_jᵀ · O_A,j of each adapter j, then, with ``x``,
    dL/dA_j [r_j, in] = (D_j ⊙ s_x)ᵀ · q of each.

    ``grad`` has dL/dO_j [n, out_j], ``out_a`` [n, Σ w_j] every O_A,j side by side; ``x`` is q
    [n, in] in E4M3 and its scale, and ``d`` one D [n, Σ w_j] in the dtype of ``out_a``, or both are
    empty. Of the w_j columns of an adapter, ``widths``, the first r_j are those of A_j; without
    ``widths`` they are all. Sums are float32. Tokens are split so that all processors work; the
    parts are added in a fixed order, so that the results are the same each time. No tokens give
    zeros.

    Raises ValueError where the tensors are not what the spec is for.
    """
    widths = ranks if widths is None else widths
    _check(grad, out_a, ranks, widths, x, d, spec)
    n, interpreted, device = out_a.shape[0], runs_interpreted(out_a), out_a.device
    shapes = [(g.shape[1], r) for g, r in zip(grad, ranks, strict=True)]
    shapes += [(r, x[0].shape[1]) for r in ranks] if x else []
    dtype = getattr(torch, spec.out_dtype)
    if n == 0:
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    sizes = [rows * columns for rows, columns in shapes]
    blocks = [cdiv(size, _BLOCK) for size in sizes]
    tiles_b = sum(cdiv(g.shape[1], spec.block_m) for g in grad)
    tiles_x = cdiv(x[0].shape[1], spec.block_x) if x else tiles_b
    total = sum(blocks) * _BLOCK
    most = max(1, _MOST_SUMS // total)
    splits, tokens = splits_of(n, min(tiles_b, tiles_x), most, spec, device)
    partial = torch.empty((splits, total), dtype=torch.float32, device=device)
    kernels = load(spec, interpreted)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    arguments: list[Any] = []
    # The first adapter's columns begin at 0.
    begins = [[sum(widths[:j])] if j else [] for j in range(len(widths))]
    for g, rank, begin in zip(grad, ranks, begins, strict=True):
        arguments += [g.contiguous(), g.shape[1], rank, *begin]
    out_a = with_rows(out_a)
    arguments += [out_a, out_a.stride(0), partial, total, n, tokens]
    (partial,) = launch(kernels.partial_b, (tiles_b, splits), arguments, ["partial_ptr"], **options)
    if x:
        q, scale = x[0] if spec.fp8 else x[0].view(torch.uint8), x[1]
        start = sum(blocks[: len(grad)]) * _BLOCK
        rows = with_rows(d[0])
        arguments = [q, q.stride(0), scale, q.shape[1], rows, rows.stride(0)]
        for rank, begin in zip(ranks, begins, strict=True):
            arguments += [rank, *begin]
        arguments += [partial, start, total, n, tokens]
        (partial,) = launch(
            kernels.partial_a, (tiles_x, splits), arguments, ["partial_ptr"], **options
        )
    results = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    factors = [*scaling, *([1.0] * len(ranks) if x else [])]
    arguments = [partial]
    for result, size, factor in zip(results, sizes, factors, strict=True):
        arguments += [result, size, factor]
    arguments += [splits, total]
    written = [f"result{i}_ptr" for i in range(len(results))]
    return launch(kernels.add_up, (sum(blocks),), arguments, written, num_warps=4)


def signatures(spec: AdapterGradsSpec) -> dict[str, dict[str, str]]:
    """Argument types of each kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    a, j = POINTER[spec.a_dtype], range(spec.adapters)
    sums = {"partial_ptr": "*fp32:16", "total": "i32:16", "n": "i32", "tokens": "i32:16"}
    partial_b: dict[str, str] = {}
    for i in j:
        partial_b |= {f"grad{i}_ptr": POINTER[spec.grad_dtype], f"out{i}": "i32:16"}
        partial_b |= _columns(i)
    found = {"partial_b": partial_b | {"a_ptr": a, "a_stride": "i32:16"} | sums}
    if spec.x_rank:
        x = {
            "x_ptr": "*fp8e4nv:16" if spec.fp8 else "*u8:16",
            "x_stride": "i32:16",
            "scale_ptr": "*fp32:16",
            "width": "i32:16",
            "d_ptr": a,
            "d_stride": "i32:16",
        }
        ranks = {name: kind for i in j for name, kind in _columns(i).items()}
        first = {"partial_ptr": "*fp32:16", "start": "i32:16"}
        found["partial_a"] = x | ranks | first | sums
    add_up = {"partial_ptr": "*fp32:16"}
    for i in range(spec.adapters * (2 if spec.x_rank else 1)):
        add_up |= {f"result{i}_ptr": POINTER[spec.out_dtype], f"size{i}": "i32:16"}
        add_up[f"scaling{i}"] = "fp32"
    found["add_up"] = add_up | {"splits": "i32", "total": "i32:16"}
    return found


def _columns(j: int) -> dict[str, str]:
    """Argument types that say which columns are those of adapter j."""
    return {f"rank{j}": "i32:16"} | ({f"begin{j}": "i32:16"} if j else {})


def _check(
    grad: Sequence[Tensor],
    out_a: Tensor,
    ranks: Sequence[int],
    widths: Sequence[int],
    x: Sequence[Tensor],
    d: Sequence[Tensor],
    spec: AdapterGradsSpec,
) -> None:
    n, a_dtype = out_a.shape[0], getattr(torch, spec.a_dtype)
    if not len(grad) == len(ranks) == spec.adapters or len(x) != 2 * len(d):
        raise ValueError(f"adapter_grads: {len(grad)} adapters, {spec} takes others")
    if out_a.dtype != a_dtype or any(g.dtype != getattr(torch, spec.grad_dtype) for g in grad):
        raise ValueError(f"adapter_grads: {grad[0].dtype} and {out_a.dtype}, {spec} takes others")
    if any(len(g) != n for g in grad) or out_a.shape[1] != sum(widths) or max(ranks) > spec.rank:
        raise ValueError(f"adapter_grads: O_A is {tuple(out_a.shape)}, ranks {ranks}, {spec}")
    if len(widths) != len(ranks) or any(r > w for r, w in zip(ranks, widths, strict=True)):
        raise ValueError(f"adapter_grads: {[*ranks]} of {[*widths]} columns")
    if bool(x) != bool(spec.x_rank) or (x and sum(ranks) > spec.x_rank):
        raise ValueError(f"adapter_grads: x is for dL/dA alone, which {spec} does or does not make")
    if x and (d[0].shape != out_a.shape or d[0].dtype != a_dtype or len(x[0]) != n):
        raise ValueError(f"adapter_grads: D is {d[0].dtype} {tuple(d[0].shape)}")
    if x and not (x[0].stride(1) == 1 and x[1].is_contiguous()):
        raise ValueError("adapter_grads: x or its scale has gaps")
    if x and x[1].numel() != (n if spec.x_scale == "row" else 1):
        raise ValueError(f"adapter_grads: a scale {tuple(x[1].shape)} is not {spec.x_scale!r}")
    if runs_interpreted(out_a) and spec.operands == "native":
        raise ValueError("adapter_grads: the interpreter needs operands='float32'")


def splits_of(
    n: int, columns: int, most: int, spec: AdapterGradsSpec, device: torch.device
) -> tuple[int, int]:
    """(how many parts, tokens in each), so that a GPU gets two programs for each processor, but no
    part has more bytes of sums, which are written and read again, than of operands.
    """
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks, least = cdiv(n, spec.block_k), 2 * max(spec.block_m, spec.rank)
    splits = max(1, min(blocks, most, 2 * processors // columns, n // least))
    tokens = cdiv(blocks, splits) * spec.block_k
    return cdiv(n, tokens), tokens
