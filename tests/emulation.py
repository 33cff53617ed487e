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
    """One merged layer on x [n, in], float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_b: Tensor, state: MergedAdapter) -> Tensor:
        plan, out = state.plan, state.applied.shape[0]
        row, pow2 = plan.granularity == "row", plan.scale == "pow2"
        codes, s_x = cast(x, E4M3, row, pow2)
        merged, scale = state.weight.float(), state.scale
        s_w, s_a = (scale[:out].t(), scale[out:].t()) if row else (scale, scale)
        y = codes @ merged[:out].t() * s_x * s_w
        out_a = codes @ merged[out:].t() * s_x * s_a
        rest = (lora_b - state.applied) * state.scaling
        if plan.pending == "apply":
            y = torch.addmm(y, out_a, rest.t())
        ctx.state = state
        ctx.save_for_backward(out_a, rest)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        out_a, rest = ctx.saved_tensors
        state = ctx.state
        plan, out = state.plan, state.applied.shape[0]
        row, pow2 = plan.granularity == "row", plan.scale == "pow2"
        merged, scale = state.weight.float(), state.scale
        wide = grad * scale[:out].t() if row else grad
        codes, s_g = cast(wide, E5M2 if plan.grad == "e5m2" else E4M3, row, pow2)
        grad_x = codes @ merged[:out] * s_g * (1.0 if row else scale)
        if plan.pending == "apply":
            tail = grad @ rest * (scale[out:].t() if row else scale)
            grad_x = torch.addmm(grad_x, tail, merged[out:])
        grad_b = grad.t() @ out_a * state.scaling
        return grad_x, grad_b, None


class EmulatedSite(nn.Module):
    """Takes the place of a LoRA layer."""

    def __init__(self, lora_b: nn.Parameter, base: nn.Module, state: MergedAdapter) -> None:
        super().__init__()
        self.lora_B, self.base_layer, self.state = lora_b, base, state

    @property
    def weight(self) -> Tensor:
        """Some models ask a layer for its parameters."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result: Tensor = Site.apply(flat, self.lora_B, self.state).reshape(*x.shape[:-1], -1)
        return result if self.bias is None else result + self.bias


def emulate(model: nn.Module, states: dict[str, MergedAdapter]) -> nn.Module:
    """Put emulated sites in the place of PEFT's layers, with the given states."""
    for path, state in states.items():
        parent, _, name = path.rpartition(".")
        layer: Any = model.get_submodule(path)
        site = EmulatedSite(layer.lora_B["default"].weight, layer.base_layer, state)
        setattr(model.get_submodule(parent), name, site)
    return model
