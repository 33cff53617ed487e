"""Host side of dL/dO_A."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.grad_out_a.spec import GradOutASpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch, with_rows
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER


def grad_out_a(grad: Sequence[Tensor], b: Sequence[Tensor], spec: GradOutASpec) -> Tensor:
    """D [n, Σ r_j], side by side D_j = dL/dO_j · b_j for dL/dO_j [n, out_j] and b_j [out_j, r_j],
    whose rows may be part of longer ones.

    Sums are float32, rounded once to the dtype of b.

    Raises ValueError where the tensors are not what the spec is for.
    """
    a_dtype, n = getattr(torch, spec.a_dtype), len(grad[0])
    if not len(grad) == len(b) == spec.adapters:
        raise ValueError(f"grad_out_a: {len(grad)} adapters, {spec} takes others")
    if any(g.dtype != getattr(torch, spec.grad_dtype) for g in grad) or any(
        f.dtype != a_dtype for f in b
    ):
        raise ValueError(f"grad_out_a: {grad[0].dtype} and {b[0].dtype}, {spec} takes others")
    ranks = [f.shape[1] for f in b]
    if [(n, len(f)) for f in b] != [tuple(g.shape) for g in grad] or max(ranks) > spec.rank:
        raise ValueError(f"grad_out_a: b {[tuple(f.shape) for f in b]} for {spec}")
    interpreted = runs_interpreted(b[0])
    if interpreted and spec.operands == "native":
        raise ValueError("grad_out_a: the interpreter needs operands='float32'")
    d = torch.empty((n, sum(ranks)), dtype=a_dtype, device=b[0].device)
    if n == 0:
        return d
    arguments: list[Any] = []
    for g, f, rank in zip(grad, map(with_rows, b), ranks, strict=True):
        arguments += [g.contiguous(), f, f.stride(0), len(f), rank]
    (d,) = launch(
        load(spec, interpreted).grad_out_a,
        (cdiv(n, spec.block_m), spec.adapters),
        [*arguments, d, d.stride(0), n],
        ["d_ptr"],
        num_warps=spec.num_warps,
        num_stages=spec.num_stages,
    )
    return d


def signatures(spec: GradOutASpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    types: dict[str, str] = {}
    for j in range(spec.adapters):
        types |= {f"grad{j}_ptr": POINTER[spec.grad_dtype], f"b{j}_ptr": POINTER[spec.a_dtype]}
        types |= {f"b{j}_stride": "i32:16", f"out{j}": "i32:16", f"rank{j}": "i32:16"}
    types |= {"d_ptr": POINTER[spec.a_dtype], "d_stride": "i32:16", "n": "i32"}
    return {"grad_out_a": types}
