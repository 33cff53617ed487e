"""Pass 4: on a GPU, time what could compute each group of sites, before the graph is compiled.

Each group runs once, forward and backward, on random operands of its shapes: the choices between
kernels (`falqon_fx.kernels.choice`) fall here, not in the first step. One of them shapes the graph:
whether O is a tensor of its own, or a view of [O | O_A] from one library call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from falqon_fx._compat import hint, without_fake_mode
from falqon_fx.merged import allocate
from falqon_fx.numerics import E4M3
from falqon_fx.passes.kernels import choose
from falqon_fx.passes.normalize import value_of
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.strides import may_be_strided
from falqon_fx.passes.terms import Param
from falqon_fx.spec import SiteSpec

Group = tuple[SitePlan, ...]


def autotune(plan: Plan) -> Plan:
    """``plan`` with what won in its reports, and the groups whose O is a view in ``strided``.

    Equal groups are timed once. A plan for a CPU, or for kernel="dequantize", comes back as it is.
    """
    timed = [i for i, group in enumerate(plan.groups) if _has_choices(group, plan.spec)]
    if not timed:
        return plan
    tuned: dict[tuple[Operands, bool], Tuned] = {}
    groups, strided = [*plan.groups], set()
    for i in _track(timed):
        views = all(may_be_strided(s.match.anchor, hint(s.slot.rank)) for s in groups[i])
        key = (Operands.of(groups[i]), views)
        if key not in tuned:
            tuned[key] = time_products(*key, plan.spec)
        if tuned[key].strided:
            strided.add(groups[i][0].report.group)
        groups[i] = tuple(_reported(site, tuned[key]) for site in groups[i])
    return replace(plan, groups=tuple(groups), strided=frozenset(strided))


@dataclass(frozen=True)
class Operands:
    """What a group of sites is computed from: x [tokens, features], and of each site its out, rank,
    and the dtypes of the base weight, of B and of the bias.
    """

    device: torch.device
    tokens: int
    features: int
    x_dtype: torch.dtype
    out_dtype: torch.dtype
    sites: tuple[tuple[int, int, torch.dtype, torch.dtype, torch.dtype | None], ...]

    @classmethod
    def of(cls, group: Group) -> Operands:
        """Those of a planned group."""
        first, x = group[0].match, value_of(group[0].match.x)
        return cls(
            x.device,
            group[0].report.tokens_hint,
            hint(x.shape[-1]),
            x.dtype,
            value_of(first.anchor).dtype,
            tuple(
                (
                    hint(site.slot.out),
                    hint(site.slot.rank),
                    getattr(torch, site.report.base_dtype),
                    site.match.lora_b.value.dtype,
                    _bias_dtype(site),
                )
                for site in group
            ),
        )

    def __str__(self) -> str:
        sites = [(self.x_dtype, self.out_dtype), *self.sites]
        kinds = " ".join(",".join(str(part) for part in site) for site in sites)
        return f"n={self.tokens} k={self.features} {kinds}".replace("torch.", "")


@dataclass(frozen=True)
class Tuned:
    """``strided``: O is to be a view; ``why``: the choice between the two in words, or ""."""

    strided: bool
    why: str


def time_products(operands: Operands, views: bool, spec: SiteSpec) -> Tuned:
    """Make the choices between kernels for a group; with ``views`` the one for O's memory too."""
    from falqon_fx.kernels.choice import choices_for

    device, trains, why = operands.device, torch.is_grad_enabled(), ""
    # The caller traces with fake tensors, maybe in autocast.
    with without_fake_mode(), torch.autocast(device.type, enabled=False):
        given = Given.random(operands, spec)
        if views and operands.tokens:
            outputs = ("own", "strided")
            runs = {o: partial(given.step, replace(spec, output=o)) for o in outputs}
            with torch.no_grad():
                choice = choices_for(device).get(f"O's memory, {operands}, {spec}", runs)
            spec, why = replace(spec, output=choice.winner), str(choice)
        with torch.set_grad_enabled(trains):
            given.step(spec)
    return Tuned(spec.output == "strided", why)


@dataclass(frozen=True)
class Given:
    """The arguments of a group's ops: ``columns`` are W', its scale, applied, B and bias."""

    x: Tensor
    columns: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
    out_dtype: torch.dtype

    @classmethod
    def random(cls, operands: Operands, spec: SiteSpec) -> Given:
        """Random ones; the stream of torch's own random numbers stays where it is."""
        device = operands.device
        numbers = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype) -> Tensor:
            values = torch.randn(shape, generator=numbers, dtype=torch.bfloat16, device=device)
            return values.to(dtype)

        given = cls(
            draw(operands.tokens, operands.features, dtype=operands.x_dtype).requires_grad_(),
            ([], [], [], [], []),
            operands.out_dtype,
        )
        for out, rank, base_dtype, b_dtype, bias_dtype in operands.sites:
            state = allocate(out, operands.features, rank, base_dtype, 1.0, spec, device)
            weight = draw(out + rank, operands.features, dtype=E4M3)
            lora_b = draw(out, rank, dtype=b_dtype).requires_grad_()
            row = [weight, state.scale.fill_(1), state.applied.zero_(), lora_b]
            if bias_dtype is not None:
                row.append(draw(out, dtype=bias_dtype))
            for column, tensor in zip(given.columns, row, strict=False):
                column.append(tensor)
        return given

    def step(self, spec: SiteSpec) -> None:
        """Forward, and backward where gradients are on."""
        scaling = [1.0] * len(self.columns[0])
        rest = (*self.columns, scaling, self.out_dtype, str(spec))
        *ys, _ = torch.ops.falqon.merged_linear(self.x, *rest)
        if torch.is_grad_enabled():
            torch.autograd.grad(ys, [self.x, *self.columns[3]], [torch.ones_like(y) for y in ys])


def _has_choices(group: Group, spec: SiteSpec) -> bool:
    on_gpu = value_of(group[0].match.x).device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and spec.kernel != "dequantize"


def _reported(site: SitePlan, tuned: Tuned) -> SitePlan:
    kernel, why = choose(site.report, value_of(site.match.x).device)
    if tuned.strided:
        kernel, why = "scaled_mm:merged", tuned.why
    return replace(site, report=replace(site.report, kernel=kernel, kernel_reason=why))


def _bias_dtype(site: SitePlan) -> torch.dtype | None:
    bias = site.match.base.bias
    if bias is None:
        return None
    value: Tensor = bias.value if isinstance(bias, Param) else value_of(bias)
    return value.dtype


def _track(groups: Sequence[int]) -> Iterator[int]:
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield from bar.track(groups, description="falqon: timing kernels")
