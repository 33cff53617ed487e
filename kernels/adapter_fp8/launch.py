"""Host side of the casts of adapters whose b is in FP8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.adapter_fp8.spec import AdapterFp8Spec
from falqon_fx.kernels.fixed import Fixed, Name, signature
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER
from falqon_fx.site.numerics import E4M3

_OF_A: tuple[Name, ...] = ("fixed_a", "fixed_b", "fixed_rank")
_OF_B: tuple[Name, ...] = ("fixed_b", "columns", "fixed_rank", "count")


def adapter_fp8(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    spec: AdapterFp8Spec,
    fixed_a: Sequence[Tensor] = (),
    fixed_b: Sequence[Tensor] = (),
    columns: Sequence[Tensor] = (),
) -> list[Tensor]:
    """[Â_j, its scale, b_j, α_j] of each adapter j in turn, with R = r, or with anything fixed
    r + rc up to a multiple of 16 by zeros: Â_j = q([A_j; A_c]) [R, in] and
    b_j = q([scaling_j · B_j | B_c] · α_j / s_W) [out, R] in E4M3, the scale float32 [R, 1], α_j
    float32 [R]; ``base_scale`` s_W float32 [out, 1] of each. The rows of b_j lie a
    multiple of 16 apart, with zeros between.

    ``fixed_a`` has A_c [rc, in] of each adapter, ``fixed_b`` B_c [out, rc]; where they are empty
    there are no such rows and columns. With ``columns`` W_S [out, c] b_j is [out, R + c] and has
    q(W_S / s_W) from column R on.

    Raises ValueError where the tensors are not what the spec is for.
    """
    fixed = Fixed(fixed_a, fixed_b, columns)
    _check(lora_a, lora_b, scaling, base_scale, fixed, spec)
    interpreted, device = runs_interpreted(lora_a[0]), lora_a[0].device
    code_dtype = E4M3 if spec.cast == "hardware" else torch.uint8

    def codes(rows: int, columns: int) -> Tensor:
        return torch.empty((rows, columns), dtype=code_dtype, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    kernels, numbers = load(spec, interpreted), range(spec.adapters)
    trained, outs = [len(a) for a in lora_a], [len(b) for b in lora_b]
    last, widths = fixed.counts(spec.adapters), fixed.in_fp8(lora_a)
    ranks = fixed.rows(lora_a)
    blocks = [cdiv(out, spec.chunks * spec.rows) for out in outs]
    found = torch.empty((sum(blocks) + len(blocks), spec.rank), dtype=torch.int32, device=device)
    of_b = [(b.contiguous(), s.contiguous()) for b, s in zip(lora_b, base_scale, strict=True)]
    arguments: list[Any] = []
    behind = fixed.arguments(spec.adapters, _OF_A)
    for j, a in enumerate(lora_a):
        arguments += [a.contiguous(), codes(ranks[j], a.shape[1]), floats(ranks[j], 1), *a.shape]
        arguments += [*behind[j], *of_b[j], outs[j], scaling[j]]
    written = [f"{name}{j}_ptr" for j in numbers for name in ("code", "scale")]
    *of_a, found = launch(
        kernels.cast_a,
        (sum(ranks) + sum(blocks),),
        [*arguments, found],
        [*written, "found_ptr"],
        num_warps=spec.num_warps,
    )
    arguments, behind = [], fixed.arguments(spec.adapters, _OF_B)
    for j in numbers:
        arguments += [trained[j], *behind[j]]
        arguments += [*of_b[j], codes(outs[j], widths[j]), floats(ranks[j])]
        arguments += [outs[j], scaling[j]]
    written = [f"{name}{j}_ptr" for j in numbers for name in ("b", "alpha")]
    programs = sum(cdiv(out, spec.rows) for out in outs)
    second = launch(
        kernels.cast_b, (programs,), [*arguments, found], written, num_warps=spec.num_warps
    )
    casts: list[Tensor] = []
    for j in numbers:
        (code, scale), (b, alpha) = (made[2 * j : 2 * j + 2] for made in (of_a, second))
        b = b.view(E4M3).narrow(1, 0, ranks[j] + last[j])
        casts += [code.view(E4M3), scale, b, alpha]
    return casts


def signatures(spec: AdapterFp8Spec) -> dict[str, dict[str, str]]:
    """Argument types of each kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    given = POINTER[spec.input_dtype]
    code = "*fp8e4nv:16" if spec.cast == "hardware" else "*u8:16"
    of_a: dict[str, str] = {}
    of_b: dict[str, str] = {}
    for j in range(spec.adapters):
        of_a |= {f"a{j}_ptr": given, f"code{j}_ptr": code, f"scale{j}_ptr": "*fp32:16"}
        of_a |= {f"rank{j}": "i32:16", f"width{j}": "i32:16"}
        of_a |= signature(j, spec.fixed, _OF_A)
        of_a |= {f"lora_b{j}_ptr": given, f"s{j}_ptr": "*fp32:16"}
        of_a |= {f"out{j}": "i32:16", f"scaling{j}": "fp32"}
        of_b |= {f"rank{j}": "i32:16"} | signature(j, spec.fixed, _OF_B)
        of_b |= {f"lora_b{j}_ptr": given, f"s{j}_ptr": "*fp32:16"}
        of_b |= {f"b{j}_ptr": code, f"alpha{j}_ptr": "*fp32:16"}
        of_b |= {f"out{j}": "i32:16", f"scaling{j}": "fp32"}
    found = {"found_ptr": "*i32:16"}
    return {"cast_a": of_a | found, "cast_b": of_b | found}


def _check(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    fixed: Fixed,
    spec: AdapterFp8Spec,
) -> None:
    wanted = getattr(torch, spec.input_dtype)
    if not len(lora_a) == len(lora_b) == len(scaling) == len(base_scale) == spec.adapters:
        raise ValueError(f"adapter_fp8: {len(lora_a)} adapters, {spec} takes others")
    if any(t.dtype != wanted or t.dim() != 2 for t in (*lora_a, *lora_b)):
        raise ValueError(f"adapter_fp8: {spec} takes matrices of {wanted}")
    fixed.check(lora_a, lora_b, spec.fixed, "adapter_fp8")
    if max(fixed.in_fp8(lora_a)) > spec.rank:
        raise ValueError(f"adapter_fp8: {fixed.in_fp8(lora_a)} columns, {spec} takes less")
    if any(s.numel() != len(b) for b, s in zip(lora_b, base_scale, strict=True)):
        raise ValueError(f"adapter_fp8: {spec} takes one scale a row of a base weight")
    if runs_interpreted(lora_a[0]) and spec.cast == "hardware":
        raise ValueError("adapter_fp8: the interpreter needs cast='integer'")
