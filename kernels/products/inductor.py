"""Inductor's templates of ``torch._scaled_mm``, as something that can be called with operands.

Inductor makes them while it compiles a graph, as part of it: so each shape gets a graph that is
this product alone, compiled when it is first called. Inductor times its templates beside the
library's GEMM, and keeps its choice and the code in caches of its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor

from falqon_fx import _compat


def scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    *,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """`falqon_fx._compat.scaled_mm` through Inductor: a [n, K], b [K, m].

    Raises RuntimeError where Inductor can't compile it.
    """
    if _compat.is_fake(a):  # in a graph of Inductor's already
        return _compat.scaled_mm(
            a, b, scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=use_fast_accum
        )
    place = (a.device, a.dtype, a.shape[1], b.shape[1], scale_a.dim(), scale_b.dim())
    try:
        return _compiled(place, out_dtype, use_fast_accum)(a, b, scale_a, scale_b)
    except RuntimeError as error:
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        raise RuntimeError(str(cause)) from error  # compilers wrap it in lines that say little


@functools.cache
def _compiled(place: object, out_dtype: torch.dtype, fast: bool) -> Callable[..., Tensor]:
    """One for each ``place``; n may change, which Dynamo makes a symbol when it first does."""

    def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
        return _compat.scaled_mm(a, b, scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=fast)

    # Dynamo counts compilations by code object, and stops after some: each gets one of its own.
    code = product.__code__.replace(co_name=f"product_{abs(hash(place))}")
    own = types.FunctionType(code, product.__globals__, None, None, product.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(
        own, fullgraph=True, options={"max_autotune_gemm": True}
    )
    return compiled
