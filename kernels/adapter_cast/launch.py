"""Host side of the casts of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton import cdiv

from falqon_fx.kernels.adapter_cast.spec import AdapterCastSpec
from falqon_fx.kernels.fixed import Fixed, signature
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.launching import launch
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import POINTER
from falqon_fx.site.numerics import E4M3


def adapter_cast(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    spec: AdapterCastSpec,
    fixed_a: Sequence[Tensor] = (),
    fixed_b: Sequence[Tensor] = (),
    columns: Sequence[Tensor] = (),
) -> list[Tensor]:
    """[Â_j, its scale, b_j] of each adapter j in turn: Â_j = q([A_j; A_c]) [R, in] in E4M3 with a
    float32 scale [R, 1], b_j = [scaling_j · B_j | B_c | W_S] [out, R + c]. R is r, or with anything
    fixed r + rc up to a multiple of 16 by zeros, as between B_c and W_S.

    ``fixed_a`` has A_c [rc, in] of each adapter, ``fixed_b`` B_c [out, rc], ``columns`` W_S
    [out, c]. Where one is empty there are no such rows and columns.

    Raises ValueError where the tensors are not what the spec is for.
    """
    wanted = getattr(torch, spec.input_dtype)
    if not len(lora_a) == len(lora_b) == len(scaling) == spec.adapters:
        raise ValueError(f"adapter_cast: {len(lora_a)} adapters, {spec} takes others")
    if any(t.dtype != wanted or t.dim() != 2 for t in (*lora_a, *lora_b)):
        raise ValueError(f"adapter_cast: {spec} takes matrices of {wanted}")
    fixed = Fixed(fixed_a, fixed_b, columns)
    fixed.check(lora_a, lora_b, spec.fixed, "adapter_cast")
    interpreted, device = runs_interpreted(lora_a[0]), lora_a[0].device
    if interpreted and spec.cast == "hardware":
        raise ValueError("adapter_cast: the interpreter needs cast='integer'")
    arguments: list[Any] = []
    programs = 0
    behind = fixed.arguments(spec.adapters) if fixed.tensors else [[]] * spec.adapters
    all_rows, last = fixed.rows(lora_a), fixed.counts(spec.adapters)
    for j, (a, b, factor) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        rows, width = all_rows[j], all_rows[j] + last[j]
        # Bytes for the interpreter and for GPUs below sm_89, which know no FP8.
        code = torch.empty((rows, a.shape[1]), dtype=E4M3, device=device)
        code = code if spec.cast == "hardware" else code.view(torch.uint8)
        scale = torch.empty((rows, 1), dtype=torch.float32, device=device)
        scaled = torch.empty((len(b), width), dtype=getattr(torch, spec.b_dtype), device=device)
        arguments += [a.contiguous(), code, scale, *a.shape, *behind[j]]
        arguments += [b.contiguous(), scaled, scaled.numel(), factor]
        programs += rows + cdiv(scaled.numel(), spec.block)
    written = [f"{name}{j}_ptr" for j in range(spec.adapters) for name in ("code", "scale", "b")]
    made = launch(
        load(spec, interpreted).adapter_cast,
        (programs,),
        arguments,
        written,
        num_warps=spec.num_warps,
    )
    return [t.view(E4M3) if t.dtype == torch.uint8 else t for t in made]


def signatures(spec: AdapterCastSpec) -> dict[str, dict[str, str]]:
    """Argument types of the kernel, for `aot.compile_ahead`: aligned, sizes divisible by 16."""
    given, types = POINTER[spec.input_dtype], dict[str, str]()
    code = "*fp8e4nv:16" if spec.cast == "hardware" else "*u8:16"
    for j in range(spec.adapters):
        types |= {f"a{j}_ptr": given, f"code{j}_ptr": code, f"scale{j}_ptr": "*fp32:16"}
        types |= {f"rank{j}": "i32:16", f"width{j}": "i32:16"} | signature(j, spec.fixed)
        types |= {f"lora_b{j}_ptr": given, f"b{j}_ptr": POINTER[spec.b_dtype]}
        types |= {f"size{j}": "i32:16", f"scaling{j}": "fp32"}
    return {"adapter_cast": types}
