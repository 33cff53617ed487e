"""An eager model of the same quantized ops, written apart from the library.

Casts are torch's own, weights are kept as FP8 codes in float32, scales are applied to the result.
Powers of two commute with every rounding, and the other scales are multiplied in the order that
the paper gives, so that a float32 model is equal bit for bit to what the backend runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import MergedAdapter

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def cast(x: Tensor, dtype: torch.dtype, per_row: bool, pow2: bool) -> tuple[Tensor, Tensor]:
    """(codes, scale): x ≈ codes · scale, codes as float32."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax(1, keepdim=True) if per_row else x.abs().amax()
    scale = (amax.double() / largest).log2().ceil().exp2().float() if pow2 else amax * (1 / largest)
    scale = torch.where(amax == 0, 1.0, scale)
    scaled = x / scale if pow2 else x * (1 / scale)
    return scaled.clamp(-largest, largest).to(dtype).float(), scale


class Site(torch.autograd.Function):
    """One merged layer, float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_b: Tensor, state: MergedAdapter) -> Tensor:
        plan, out = state.plan, state.applied.shape[0]
        row, pow2 = plan.granularity == "row", plan.scale == "pow2"
        codes, s_x = cast(x.reshape(-1, x.shape[-1]), E4M3, row, pow2)
        merged, scale = state.weight.float(), state.scale
        s_w, s_a = (scale[:out].t(), scale[out:].t()) if row else (scale, scale)
        y = codes @ merged[:out].t() * s_x * s_w
        out_a = codes @ merged[out:].t() * s_x * s_a
        rest = (lora_b - state.applied) * state.scaling
        if plan.pending == "apply":
            y = torch.addmm(y, out_a, rest.t())
        ctx.state, ctx.shape = state, x.shape
        ctx.save_for_backward(out_a, rest)
        return y.reshape(*x.shape[:-1], out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        out_a, rest = ctx.saved_tensors
        state, flat = ctx.state, grad.reshape(-1, grad.shape[-1])
        plan, out = state.plan, state.applied.shape[0]
        row, pow2 = plan.granularity == "row", plan.scale == "pow2"
        merged, scale = state.weight.float(), state.scale
        wide = flat * scale[:out].t() if row else flat
        codes, s_g = cast(wide, E5M2 if plan.grad == "e5m2" else E4M3, row, pow2)
        grad_x = codes @ merged[:out] * s_g * (1.0 if row else scale)
        if plan.pending == "apply":
            tail = flat @ rest * (scale[out:].t() if row else scale)
            grad_x = torch.addmm(grad_x, tail, merged[out:])
        grad_b = flat.t() @ out_a * state.scaling
        return grad_x.reshape(ctx.shape), grad_b, None


class EmulatedSite(nn.Module):
    """Takes the place of a LoRA layer."""

    def __init__(self, lora_b: nn.Parameter, state: MergedAdapter) -> None:
        super().__init__()
        self.lora_B, self.state = lora_b, state

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Site.apply(x, self.lora_B, self.state)
        return result


def emulate(model: nn.Module, states: dict[str, MergedAdapter]) -> nn.Module:
    """Put emulated sites in the place of PEFT's layers, with the given states."""
    for path, state in states.items():
        parent, _, name = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        site = EmulatedSite(layer.lora_B["default"].weight, state)
        setattr(model.get_submodule(parent), name, site)
    return model
