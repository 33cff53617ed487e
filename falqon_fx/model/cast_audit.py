"""What the casts of adapters take after each optimizer step, for those who watch it
(`falqon_fx.watch`); else nothing is computed. Graphs need not be others for it: what they cast are
the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.model.prepare import Adapter, adapters
from falqon_fx.ops.fp8_adapter import to_range
from falqon_fx.report.data import CastAudit
from falqon_fx.site.base import CastOfAdapter, bases
from falqon_fx.site.casts import cast_fp8
from falqon_fx.site.numerics import E4M3, decode_fp8, round_to_fp8
from falqon_fx.site.sharded import local
from falqon_fx.site.spec import parse_spec


class CastMeter:
    """Measures the casts of a model's adapters; of a sharded model those of this process's parts.

    Attributes:
        steps: how many optimizer steps it was asked about.
    """

    def __init__(self, model: nn.Module) -> None:
        self.steps = 0
        self._model = model
        self._norms: dict[str, Tensor] = {}  # of the bases, which are constant
        self._open: list[tuple[str, int]] = []
        self._table: Tensor | None = None

    @torch.no_grad()
    def look(self, optimizer: torch.optim.Optimizer) -> bool:
        """Measure what an optimizer has just stepped; False where that is none of the model's
        adapters. Nothing waits for a device before `read`.
        """
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        sites = {
            path: site
            for path, site in adapters(self._model).items()
            if isinstance(site, Adapter) and stepped & {id(t) for t in _parameters(site)}
        }
        lines = {path: line for path, site in sites.items() if (line := self._measure(path, site))}
        if not lines:
            return False
        self.steps += 1
        self._open = [(path, sites[path].saturated) for path in lines]
        self._table = torch.stack([torch.stack(line) for line in lines.values()])
        return True

    def read(self) -> Iterator[CastAudit]:
        """What the last `look` measured, once."""
        if self._table is None:
            return
        lines, self._table = self._table.tolist(), None  # the step's one look at the device
        for (path, saturated), (a, lost_a, b, lost_b, learned, base) in zip(self._open, lines):
            share = learned**0.5 / base if base else None
            losses = (_ratio(lost_a, a), _ratio(lost_b, b))
            yield CastAudit(path, self.steps, *losses, share, saturated)

    def _measure(self, path: str, site: Adapter) -> list[Tensor] | None:
        """|A|², |dq(Â) - A|², the same two of s·B, |s·B·A|² and |W|; the last two are 0 where they
        aren't known. None where no graph has cast this site yet.
        """
        known = [(bases.cast_of(b), local(a), local(b), s) for a, b, s in site.adapters]
        if any(cast is None for cast, *_ in known):
            return None
        squares = [_squares(cast, a, b, s, site) for cast, a, b, s in known if cast is not None]
        sums = [torch.stack(column).sum() for column in zip(*squares)]
        if site.experts:
            return [*sums, torch.zeros_like(sums[0]), torch.zeros_like(sums[0])]
        if path not in self._norms:
            self._norms[path] = site.base().norm()
        wide_b = torch.cat([s * b.float() for _, _, b, s in known], dim=1)
        wide_a = torch.cat([a.float() for _, a, _, _ in known])
        # |B·A|² = Σ (Bᵀ·B) ⊙ (A·Aᵀ): matrices of the rank.
        learned = ((wide_b.t() @ wide_b) * (wide_a @ wide_a.t())).sum().clamp(min=0)
        return [*sums, learned, self._norms[path]]


def _parameters(site: Adapter) -> Iterator[Tensor]:
    for a, b, _ in site.adapters:
        yield from (a, b)


def _ratio(lost: float, whole: float) -> float:
    return (lost / whole) ** 0.5 if whole else 0.0


def _squares(
    cast: CastOfAdapter, lora_a: Tensor, lora_b: Tensor, scaling: float, site: Adapter
) -> list[Tensor]:
    """|A|², |dq(Â) - A|², |s·B|², |b - s·B|² of one adapter."""
    spec = parse_spec(cast.spec_text)
    a, b = lora_a.detach().float(), lora_b.detach().float() * scaling
    codes, scale = cast_fp8(a, spec.operand, cast.spec_text)
    of_a = decode_fp8(codes, scale, torch.float32)
    if spec.adapter == "fp8":
        s = local(site.scale)
        scaled, alpha = to_range(of_a, b, s)
        of_b = round_to_fp8(scaled, E4M3) * s / alpha
    else:
        of_b = b if cast.wide else b.to(torch.bfloat16).float()
    parts: list[Any] = [a, of_a - a, b, of_b - b]
    return [part.square().sum() for part in parts]
