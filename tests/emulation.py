"""An eager model of the same quantized ops, written apart from the library.

Casts are torch's own, weights are kept as FP8 codes in float32, scales are applied to the result.
Powers of two commute with every rounding, and the other scales are multiplied in the order that
the paper gives, so that a float32 model is equal bit for bit to what the backend runs.
"""

from __future__ import annotations

import functools
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


class Sites(torch.autograd.Function):
    """Merged layers that share x [n, in], float32. What dL/dx gets from products that no scale
    follows (all of them with scale="pow2", else the pending parts) is one GEMM; other products are
    summed before it in the layers' order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, states: list[MergedAdapter], *lora_b: Tensor) -> Any:
        results, saved = [], []
        # One GEMM for all A: a library may sum one column in another order than several.
        ranks = [state.rank for state in states]
        all_a = torch.cat([state.weight.float()[-r:] for state, r in zip(states, ranks)])
        plan = states[0].plan
        row, pow2 = plan.granularity == "row", plan.scale == "pow2"
        codes, s_x = cast(x, E4M3, row, pow2)
        sums = (codes @ all_a.t()).split(ranks, dim=1)
        scales = [s.scale[-s.rank :].t() if row else s.scale for s in states]
        all_out_a = torch.cat([o * s_x * s_a for o, s_a in zip(sums, scales)], 1).split(ranks, 1)
        for state, b, out_a in zip(states, lora_b, all_out_a, strict=True):
            out = state.applied.shape[0]
            merged, scale = state.weight.float(), state.scale
            y = codes @ merged[:out].t() * s_x * (scale[:out].t() if row else scale)
            rest = (b - state.applied) * state.scaling
            if plan.pending == "apply":
                y = torch.addmm(y, out_a, rest.t())
            results.append(y)
            saved += [out_a, rest]
        ctx.states = states
        ctx.save_for_backward(*saved)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, products, left, right, grad_b = ctx.saved_tensors, [], [], [], []
        for i, (state, grad) in enumerate(zip(ctx.states, grads, strict=True)):
            out_a, rest = saved[2 * i : 2 * i + 2]
            plan, out = state.plan, state.applied.shape[0]
            row, pow2 = plan.granularity == "row", plan.scale == "pow2"
            merged, scale = state.weight.float(), state.scale
            wide = grad * scale[:out].t() if row else grad
            codes, s_g = cast(wide, E5M2 if plan.grad == "e5m2" else E4M3, row, pow2)
            if pow2:
                left.append(codes * s_g)
                right.append(merged[:out] * (1.0 if row else scale))
            else:
                products.append(codes @ merged[:out] * s_g * (1.0 if row else scale))
            if plan.pending == "apply":
                left.append(grad @ rest * (scale[out:].t() if row else scale))
                right.append(merged[out:])
            grad_b.append(grad.t() @ out_a * state.scaling)
        if left:  # one GEMM: a library may sum two in another order
            products.append(torch.cat(left, 1) @ torch.cat(right))
        return functools.reduce(torch.add, products), None, *grad_b


class Spread(torch.autograd.Function):
    """The same values with gaps of ``more`` elements between rows: some of torch's functions round
    those in another way.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, more: int) -> Tensor:
        wide = y.new_empty((*y.shape[:-1], y.shape[-1] + more))
        return y.new_empty_strided(y.shape, wide.stride()).copy_(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class EmulatedSite(nn.Module):
    """Takes the place of a LoRA layer; ``strided``: O is a view of [O | O_A]."""

    def __init__(
        self, lora_b: nn.Parameter, base: nn.Module, state: MergedAdapter, strided: bool = False
    ) -> None:
        super().__init__()
        self.lora_B, self.base_layer, self.state = lora_b, base, state
        self.strided = strided

    @property
    def weight(self) -> Tensor:
        """Some models ask a layer for its parameters."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return siblings([self], x)[0]


def siblings(sites: list[EmulatedSite], x: Tensor) -> list[Tensor]:
    """The results of sites that became one op."""
    flat = x.reshape(-1, x.shape[-1])
    results = Sites.apply(flat, [s.state for s in sites], *(s.lora_B for s in sites))
    shaped = [y.reshape(*x.shape[:-1], -1) for y in results]
    with_bias = [y if s.bias is None else y + s.bias for s, y in zip(sites, shaped, strict=True)]
    return [
        Spread.apply(y, s.state.rank) if s.strided else y
        for s, y in zip(sites, with_bias, strict=True)
    ]


def emulate(model: nn.Module, states: dict[str, MergedAdapter]) -> nn.Module:
    """Put emulated sites in the place of PEFT's layers, with the given states."""
    for path, state in states.items():
        layer: Any = model.get_submodule(path)
        site = EmulatedSite(layer.lora_B["default"].weight, layer.base_layer, state)
        for parent in list(model.modules()):  # a block may be shared by several
            for name, child in list(parent._modules.items()):
                if child is layer:
                    setattr(parent, name, site)
    return model
