"""``falqon::gather_tokens``: x of sequence parallelism, gathered in FP8.

The sites that read x cast it per token, and a token lies whole on one process. So the cast may come
first, and bytes are gathered instead of x: what arrives is dq(q(x)), which every later cast leaves
as it is, for its scale is a power of two and its values are E4M3's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falqon_fx.ops.lowering import cast_fp8
from falqon_fx.site.numerics import E4M3, decode_fp8, without_autocast
from falqon_fx.site.spec import parse_spec

_SCALE = 4  # bytes of a float32
_functional = torch.ops._c10d_functional


@torch.library.custom_op("falqon::gather_tokens", mutates_args=())
def gather_tokens(x: Tensor, dim: int, group: str, size: int, spec_text: str) -> Tensor:
    """dq(q(x)) of all ``size`` processes of ``group``, one after another along ``dim``; x [..., in]
    is cut along it. dL/dx is the sum of what the processes find for these tokens.
    """
    return _gather(x, dim, group, size, spec_text)


@without_autocast
def _gather(x: Tensor, dim: int, group: str, size: int, spec_text: str) -> Tensor:
    first = x.movedim(dim, 0)
    flat = first.reshape(-1, first.shape[-1])
    cast = cast_fp8(flat, E4M3, parse_spec(spec_text), torch.float32, keep=True)
    assert cast.code is not None
    bytes_of = [cast.code.view(torch.uint8), cast.scale.view(torch.uint8).reshape(-1, _SCALE)]
    packed = _all_gather(torch.cat(bytes_of, dim=1), size, group)
    code, scale = packed.split([flat.shape[1], _SCALE], dim=1)
    values = decode_fp8(code.contiguous(), scale.contiguous().view(torch.float32), x.dtype)
    whole = values.reshape(size * first.shape[0], *first.shape[1:])
    return whole.movedim(0, dim).contiguous()


def _all_gather(x: Tensor, size: int, group: str) -> Tensor:
    whole: Tensor = _functional.wait_tensor(_functional.all_gather_into_tensor(x, size, group))
    return whole


@gather_tokens.register_fake
def _(x: Tensor, dim: int, group: str, size: int, spec_text: str) -> Tensor:
    shape = [*x.shape]
    shape[dim] = shape[dim] * size
    return x.new_empty(shape)


@torch.library.custom_op("falqon::scatter_tokens", mutates_args=())
def scatter_tokens(grad: Tensor, dim: int, group: str, size: int) -> Tensor:
    """The sum of all processes' ``grad``, of this process's tokens."""
    first = grad.movedim(dim, 0).contiguous()
    piece = _functional.reduce_scatter_tensor(first, "sum", size, group)
    return _functional.wait_tensor(piece).movedim(0, dim).contiguous()  # type: ignore[no-any-return]


@scatter_tokens.register_fake
def _(grad: Tensor, dim: int, group: str, size: int) -> Tensor:
    shape = [*grad.shape]
    shape[dim] = shape[dim] // size
    return grad.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.way, _ = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.falqon.scatter_tokens(grad, *ctx.way), None, None, None, None


gather_tokens.register_autograd(_backward, setup_context=_setup)

OP = torch.ops.falqon.gather_tokens.default
EXACT = (torch.bfloat16, torch.float32)  # which hold an E4M3 number times a power of two
