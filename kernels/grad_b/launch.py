"""Host side of dL/dB."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx.kernels.grad_b.spec import GradBSpec
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.loader import load

_TYPE = {"float32": "*fp32:16", "bfloat16": "*bf16:16", "float16": "*fp16:16"}


def grad_b(grad: Tensor, out_a: Tensor, scaling: float, spec: GradBSpec) -> Tensor:
    """dL/dB [out, r] = scaling · gradᵀ · out_a, for dL/dO [n, out] and O_A [n, r].

    Sums are float32. Tokens are split so that all processors work; the parts are added in a fixed
    order, so that the result is the same each time. No tokens give zeros.

    Raises ValueError where the tensors are not what the spec is for.
    """
    (n, out), rank = grad.shape, out_a.shape[1]
    if (grad.dtype, out_a.dtype) != (
        getattr(torch, spec.grad_dtype),
        getattr(torch, spec.a_dtype),
    ):
        raise ValueError(f"grad_b: {grad.dtype} and {out_a.dtype}, {spec} takes others")
    if out_a.shape[0] != n or not 0 < rank <= spec.rank:
        raise ValueError(f"grad_b: O_A is {tuple(out_a.shape)} for {n} tokens and {spec}")
    interpreted = runs_interpreted(grad)
    if interpreted and spec.operands == "native":
        raise ValueError("grad_b: the interpreter needs operands='float32'")
    grad, out_a = grad.contiguous(), out_a.contiguous()
    result = torch.zeros((out, rank), dtype=getattr(torch, spec.b_dtype), device=grad.device)
    if n == 0:
        return result
    columns = -(-out // spec.block_m)
    splits, tokens = _splits(n, columns, spec.block_k, grad.device)
    partial = torch.empty((splits, out, rank), dtype=torch.float32, device=grad.device)
    kernels, size = load(spec, interpreted), out * rank
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    with torch.cuda.device_of(grad):
        kernels.partial_sums[(columns, splits)](
            grad, out_a, partial, n, out, rank, tokens, **options
        )
        kernels.add_up[(-(-size // 1024),)](partial, result, size, splits, scaling, num_warps=4)
    return result


def signatures(spec: GradBSpec) -> dict[str, dict[str, str]]:
    """Argument types of each kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    partial_sums = {
        "grad_ptr": _TYPE[spec.grad_dtype],
        "a_ptr": _TYPE[spec.a_dtype],
        "partial_ptr": "*fp32:16",
        "n": "i32",
        "out": "i32:16",
        "rank": "i32:16",
        "tokens": "i32:16",
    }
    add_up = {
        "partial_ptr": "*fp32:16",
        "b_ptr": _TYPE[spec.b_dtype],
        "size": "i32:16",
        "splits": "i32",
        "scaling": "fp32",
    }
    return {"partial_sums": partial_sums, "add_up": add_up}


def _splits(n: int, columns: int, block_k: int, device: torch.device) -> tuple[int, int]:
    """(how many parts, tokens in each), so that a GPU gets two programs for each processor."""
    processors = 2
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    blocks = -(-n // block_k)
    splits = max(1, min(blocks, 2 * processors // columns))
    tokens = -(-blocks // splits) * block_k
    return -(-n // tokens), tokens
