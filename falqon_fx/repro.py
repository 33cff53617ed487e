"""One site alone: rebuilt with random data and checked against exact arithmetic.

The op multiplies FP8 values, and products of two of them are exact in float64. So the reference is
the same casts (x per token, W' as stored) with products and sums in float64; what is left is the
op's own rounding. It sums at most K products in float32, in any order, and rounds to the GEMM's
dtype a few times (u = 2⁻⁸ for bfloat16, else 2⁻²⁴):

    |y - y₆₄| ≤ (K · 2⁻²⁴ + 4 u) · Σ |x_q| |w_q|   + the same of the pending term
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx import lowering
from falqon_fx.config import FalqonConfig
from falqon_fx.merged import create
from falqon_fx.numerics import E4M3
from falqon_fx.report import Site
from falqon_fx.spec import SiteSpec, parse_spec


@dataclass(frozen=True)
class Checked:
    """Largest error by its bound, by result; a value above 1 is a wrong kernel."""

    ratios: dict[str, float]

    @property
    def right(self) -> bool:
        """NaN counts as wrong."""
        return all(ratio <= 1.0 for ratio in self.ratios.values())

    def __str__(self) -> str:
        parts = [f"{name}: {ratio:.3f} of its bound" for name, ratio in self.ratios.items()]
        return f"{'right' if self.right else 'WRONG'}; {', '.join(parts)}"


def check(
    out: int,
    features: int,
    rank: int,
    tokens: int,
    scaling: float,
    dtype: str,
    adapter_dtype: str,
    spec: str,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> Checked:
    """Run one site of the given shape on random data: forward, dL/dB."""
    plan = parse_spec(spec)
    generator = torch.Generator().manual_seed(seed)
    kind, adapter = (getattr(torch, name) for name in (dtype, adapter_dtype))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    base = (random(out, features) / features**0.5).to(kind)
    lora_a = (random(rank, features) / features**0.5).to(adapter)
    lora_b = (random(out, rank) * 0.1).to(adapter)
    state = create("repro", base, lora_a, lora_b, scaling, _config(plan))
    lora_b += (random(out, rank) * 0.01).to(adapter)  # pending: not in W' yet
    x, grad = random(tokens, features).to(kind), random(tokens, out).to(kind)

    leaf = lora_b.clone().requires_grad_()
    weight, scale, applied = ([tensor] for tensor in state.tensors[:3])
    y, out_a = torch.ops.falqon.merged_linear(
        x, weight, scale, applied, [leaf], [], [scaling], kind, spec
    )
    y.backward(grad)
    assert leaf.grad is not None

    q, rest = lowering.quantize(x.float(), E4M3, plan)
    x_q, merged = q.double() * rest, state.dequantize().double()
    gemm = lowering.gemm_dtype(kind)
    unit = 2.0**-8 if gemm == torch.bfloat16 else 2.0**-24
    exact_a = x_q @ merged[out:].t()
    size_a = x_q.abs() @ merged[out:].abs().t()
    exact, size = x_q @ merged[:out].t(), x_q.abs() @ merged[:out].abs().t()
    if plan.pending == "apply":
        pending = lora_b.double() - state.applied.double()
        exact = exact + scaling * exact_a @ pending.t()
        size = size + abs(scaling) * size_a @ pending.abs().t()
    exact_b = scaling * grad.double().t() @ out_a.double()
    size_b = abs(scaling) * grad.double().abs().t() @ out_a.double().abs()

    def ratio(value: Tensor, wanted: Tensor, gauge: Tensor, terms: int) -> float:
        bound = (terms * 2.0**-24 + 4 * unit) * gauge
        return float(((value.double() - wanted).abs() / bound.clamp(min=1e-30)).max())

    return Checked(
        {
            "O": ratio(y.detach(), exact, size, features + rank),
            "O_A": ratio(out_a, exact_a, size_a, features),
            "dL/dB": ratio(leaf.grad, exact_b, size_b, tokens),
        }
    )


def _config(plan: SiteSpec) -> FalqonConfig:
    return FalqonConfig(
        granularity=plan.granularity,  # type: ignore[arg-type]
        scale=plan.scale,
        pending=plan.pending,  # type: ignore[arg-type]
        grad_dtype=plan.grad,  # type: ignore[arg-type]
        topk="all",
        seed=plan.seed,
    )


def arguments(site: Site, tokens: int | None = None) -> dict[str, object]:
    """The arguments of `check` that rebuild a site."""
    return {
        "out": site.out_features,
        "features": site.in_features,
        "rank": site.rank,
        "tokens": min(site.tokens_hint or 64, 4096) if tokens is None else tokens,
        "scaling": site.scaling,
        "dtype": site.out_dtype,
        "adapter_dtype": site.adapter_dtype,
        "spec": site.spec,
    }


def script(site: Site) -> str:
    """A program that rebuilds a site and exits with 0 where it is right, else with 3."""
    lines = [f"    {name}={value!r}," for name, value in arguments(site).items()]
    return "\n".join(
        [
            f'"""The site {site.path}, alone, on random data. Exits with 3 where it is wrong."""',
            "",
            "import sys",
            "",
            "from falqon_fx.repro import check",
            "",
            "result = check(",
            *lines,
            ")",
            "print(result)",
            "sys.exit(0 if result.right else 3)",
            "",
        ]
    )
