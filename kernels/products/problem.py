"""What a product is, as far as the choice of its kernel depends on it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from falqon_fx.config import Accumulation
from falqon_fx.kernels.gemm.launch import Piece, follows
from falqon_fx.kernels.gemm.tiles import GemmProblem
from falqon_fx.kernels.spec import Fp8Format, InputDtype
from falqon_fx.site.numerics import E4M3, INT8
from falqon_fx.site.nvfp4 import is_packed


def problem_of(
    q: Tensor,
    q_scale: Tensor,
    pieces: Sequence[Piece],
    a_pieces: int,
    out_dtype: torch.dtype,
    a_dtype: torch.dtype,
    accumulation: Accumulation,
) -> GemmProblem:
    """The problem that a product of q [n, k] with these pieces is."""
    n, k = q.shape
    biases = [p.bias for p in pieces if p.bias is not None]
    scales = [p.scale for p in pieces]
    rows = tuple(p.weight.shape[0] for p in pieces)
    return GemmProblem(
        n=n,
        k=k,
        rows=rows,
        a_pieces=a_pieces,
        x="int8" if q.dtype == INT8 else fp8_format(q.dtype),
        x_scale="row" if q_scale.dim() == 2 else "tensor",
        w_scale="none" if scales[0] is None else "row" if scales[0].dim() == 2 else "tensor",
        out_dtype=dtype_name(out_dtype),
        a_dtype=dtype_name(a_dtype),
        bias=dtype_name(biases[0].dtype) if biases else "none",
        rank=max(0 if p.right is None else p.right.shape[1] for p in pieces),
        accumulation=accumulation,
        one_tensor=all(follows(a.weight, b.weight) for a, b in pairwise(pieces)),
        packed=is_packed(pieces[0].weight),
    )


def fp8_format(dtype: torch.dtype) -> Fp8Format:
    """The name of an FP8 dtype in a spec."""
    return "e4m3" if dtype == E4M3 else "e5m2"


def dtype_name(dtype: torch.dtype) -> InputDtype:
    """The name of another dtype in a spec; specs refuse those that they don't know."""
    return cast(InputDtype, str(dtype).removeprefix("torch."))


def bucket(n: int) -> int:
    """Token counts between two powers of two share a choice."""
    return 1 << max(0, n - 1).bit_length()


def rounded(problem: GemmProblem) -> GemmProblem:
    """The problem that stands for all in its bucket."""
    n = bucket(problem.n)
    return problem if n == problem.n else replace(problem, n=n)


def key_of(what: str, problem: GemmProblem) -> str:
    """What names a choice, in memory and on disk."""
    return _text_of(what, rounded(problem))


@functools.lru_cache(maxsize=4096)
def _text_of(what: str, problem: GemmProblem) -> str:
    fields = ", ".join(f"{name}={value}" for name, value in vars(problem).items())
    return f"{what} {fields}"
