"""Programs of stacked experts, and what they compute in float64 on the same operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - defines grouped_mm_fallback
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from falqon_fx.ops.lowering import gemm_dtype
from tests.emulation import E4M3, E5M2, cast

RANK, SCALING = 3, 0.5


class Stack(nn.Module):
    """Stacked weights with PEFT's adapter, each token multiplied by ``top`` experts, as
    transformers' experts implementations spell it.

    Attributes:
        spelling: "grouped" (rows sorted by expert), "fallback" (the same in float32 compiled) or
            "batched" (weights gathered).
        adapter: "baddbmm", "sum" or "" for none.
        turned: whether W is stored [E, in, out].
        b: how lora_B [out, r * E] is read as [E, out, r].
    """

    def __init__(
        self,
        experts: int = 4,
        out: int = 72,
        features: int = 64,
        rank: int = RANK,
        *,
        spelling: str = "fallback",
        adapter: str = "baddbmm",
        turned: bool = False,
        fastest: bool = True,
        dtype: torch.dtype = torch.float32,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.spelling, self.adapter = experts, spelling, adapter
        self.turned, self.fastest = turned, fastest
        self.out, self.features, self.dtype = out, features, dtype
        shape = (experts, features, out) if turned else (experts, out, features)
        weight = torch.randn(shape, dtype=dtype) / features**0.5
        self.weight = nn.Parameter(weight, requires_grad=False)
        own = adapter_dtype or dtype
        self.lora_a = nn.Parameter(torch.randn(experts * rank, features, dtype=own) / 8)
        self.lora_b = nn.Parameter(torch.randn(out, rank * experts, dtype=own) / 8)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B_e [E, out, r] and A_e [E, r, in]."""
        a = self.lora_a.reshape(self.experts, -1, self.features)
        if self.fastest:
            b = self.lora_b.reshape(self.out, -1, self.experts).permute(2, 0, 1)
        else:
            b = self.lora_b.reshape(self.out, self.experts, -1).permute(1, 0, 2)
        return b, a

    def adapted(self) -> Tensor:
        left, right = self.factors()
        if self.turned:
            left, right = right.transpose(-2, -1), left.transpose(-2, -1)
        left, right = left.to(self.dtype), right.to(self.dtype)
        if self.adapter == "baddbmm":
            return torch.baddbmm(self.weight, left, right, alpha=SCALING)
        if self.adapter == "sum":
            return self.weight + SCALING * torch.bmm(left, right)
        return self.weight

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [n, in], ids [n, top] -> [n * top, out]."""
        top, flat, weight = ids.shape[1], ids.reshape(-1), self.adapted()
        if self.spelling == "batched":
            rows = x.repeat_interleave(top, dim=0)
            if self.turned:
                return torch.bmm(rows.unsqueeze(1), weight[flat]).squeeze(1)
            return torch.bmm(weight[flat], rows.unsqueeze(-1)).squeeze(-1)
        in_order, perm = torch.sort(flat)
        counts = torch.histc(in_order.float(), bins=self.experts, min=0, max=self.experts - 1)
        offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = x[perm // top]
        weight = weight if self.turned else weight.transpose(-2, -1)
        multiply: Any = F.grouped_mm
        if self.spelling == "fallback":
            multiply = torch.ops.transformers.grouped_mm_fallback
        return multiply(rows.to(self.dtype), weight, offs=offs)[torch.argsort(perm)]


@dataclass
class Exact:
    """A value in float64 and the sum of the magnitudes of its terms."""

    value: Tensor
    gauge: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Exact:
        return cls(value.double(), value.double().abs())

    def __matmul__(self, other: Exact) -> Exact:
        return Exact(self.value @ other.value, self.gauge @ other.gauge)

    def __add__(self, other: Exact) -> Exact:
        return Exact(self.value + other.value, self.gauge + other.gauge)

    def times(self, factor: float) -> Exact:
        return Exact(self.value * factor, self.gauge * abs(factor))

    @property
    def mT(self) -> Exact:
        return Exact(self.value.mT, self.gauge.mT)

    def __getitem__(self, rows: Any) -> Exact:
        return Exact(self.value[rows], self.gauge[rows])


def exact(model: Stack, x: Tensor, ids: Tensor, grad: Tensor, pow2: bool) -> dict[str, Exact]:
    """Results of one step in float64, expert by expert, on the operands as they are cast."""
    flat, token = ids.reshape(-1), torch.arange(ids.numel()) // ids.shape[1]
    weight = (model.weight.mT if model.turned else model.weight).detach().float()
    wide = gemm_dtype(model.weight.dtype, x.device) == torch.float32
    xq = _cast(x.float(), E4M3, pow2)
    results = {
        "y": Exact.of(torch.zeros(ids.numel(), weight.shape[1])),
        "x": Exact.of(torch.zeros(x.shape)),
        "a": Exact.of(torch.zeros(model.lora_a.shape)),
        "b": Exact.of(torch.zeros(model.lora_b.shape)),
    }
    for e in range(model.experts):
        rows = torch.nonzero(flat == e).flatten()
        codes, scale = cast(weight[e], E4M3, True, pow2)
        w, g = Exact.of(codes.double() * scale.double()), grad[rows]
        _add(results["y"], rows, xq[token[rows]] @ w.mT)
        through = _cast(g.float() * scale.t(), E5M2, pow2) @ Exact.of(codes)
        if model.adapter:
            columns = slice(e, None, model.experts)  # lora_B: the experts fastest
            places = slice(e * RANK, (e + 1) * RANK)
            a = _cast(model.lora_a[places].detach().float(), E4M3, pow2)
            b = model.lora_b[:, columns].detach().float() * SCALING
            b64 = Exact.of(b if wide else b.bfloat16())
            out_a, d = xq[token[rows]] @ a.mT, Exact.of(g) @ b64
            _add(results["y"], rows, out_a @ b64.mT)
            through = through + d @ a
            grad_b, grad_a = (Exact.of(g).mT @ out_a).times(SCALING), d.mT @ xq[token[rows]]
            for name, at, part in (
                ("b", (slice(None), columns), grad_b),
                ("a", places, grad_a),
            ):
                results[name].value[at], results[name].gauge[at] = part.value, part.gauge
        results["x"].value.index_add_(0, token[rows], through.value)
        results["x"].gauge.index_add_(0, token[rows], through.gauge)
    return results


def _cast(x: Tensor, dtype: torch.dtype, pow2: bool) -> Exact:
    codes, scale = cast(x, dtype, True, pow2)
    return Exact.of(codes.double() * scale.double())


def _add(to: Exact, rows: Tensor, part: Exact) -> None:
    to.value[rows] += part.value
    to.gauge[rows] += part.gauge


_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def bound(of: Exact, terms: int, *dtypes: torch.dtype) -> Tensor:
    """A float32 sum of K terms in any order is off by K·2⁻²⁴ of the sum of their magnitudes. What
    lies between operands and a result is rounded at most ten times to the dtype of the products or
    of the result: O_A, O_A·b, their product, their sum and the result, and with scale="amax" each
    product by its scales once more (D, its scales, D·Â, the sum, dL/dx and its sum over the
    experts of a token are fewer).
    """
    off = terms * 2.0**-24 + 10 * max(_UNIT[dtype] for dtype in dtypes)
    return of.gauge * (off / (1 - off)) + 2.0**-126


SIZES = st.sampled_from([64, 72, 80, 96])


@st.composite
def programs(draw: Any) -> tuple[Stack, Tensor, Tensor, str]:
    torch.manual_seed(draw(st.integers(0, 2**31)))
    spelling = draw(st.sampled_from(["grouped", "fallback", "batched"]))
    # torch traces grouped products in bfloat16 alone.
    dtype = torch.bfloat16
    if spelling != "grouped":
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    experts = draw(st.integers(2, 9))
    model = Stack(
        experts,
        draw(SIZES),
        draw(SIZES),
        spelling=spelling,
        adapter=draw(st.sampled_from(["baddbmm", "sum", ""])),
        turned=draw(st.booleans()),
        dtype=dtype,
        adapter_dtype=draw(st.sampled_from([torch.float32, dtype])),
    )
    n, top = draw(st.integers(1, 12)), draw(st.integers(1, min(experts, 3)))
    crowd = draw(st.integers(1, experts))  # experts that any token chooses
    ids = torch.randint(0, crowd, (n, top))
    x = torch.randn(n, model.lora_a.shape[1]).to(dtype)
    return model, x, ids, draw(st.sampled_from(["pow2", "amax"]))


def rows(n: int = 9, top: int = 2, experts: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 64), torch.randint(0, experts, (n, top))
