"""On a GPU, time what could compute each group of sites, before the graph is compiled.

Each group runs once, forward and backward, on random operands of its shapes: the choices between
kernels (`falqon_fx.kernels.products.choice`) fall here, not in the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falqon_fx._compat import hint, value_of, without_fake_mode
from falqon_fx.errors import FalqonError, NoKernelError
from falqon_fx.kernels.spec import aligned, rank_of
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.ops.products import launches
from falqon_fx.passes import room
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.rewrite import adapter_inputs
from falqon_fx.passes.rows import RowsSlot, adds_pending
from falqon_fx.passes.terms import Param
from falqon_fx.passes.transposes import slot_of
from falqon_fx.site import nvfp4
from falqon_fx.site.forms import scale_shape
from falqon_fx.site.numerics import E4M3, dtype_name
from falqon_fx.site.spec import SiteSpec

if TYPE_CHECKING:
    from falqon_fx.kernels.gemm.tiles import GemmProblem

Group = tuple[SitePlan, ...]


def autotune(plan: Plan, *, time: bool = True) -> Plan:
    """``plan`` with what won in its reports; without ``time``, what won when it was timed before.

    Equal groups are timed once. A plan for a CPU, or for kernel="dequantize", comes back as it is.

    Raises:
        FalqonError: the kernels that the config asks for don't take a group.
    """
    chosen = [i for i, group in enumerate(plan.groups) if _has_choices(group, group[0].spec)]
    done: set[Operands] = set()
    groups = [*plan.groups]

    def reported(group: Group, operands: Operands) -> Group:
        if time and operands not in done:
            try:
                time_products(operands, group[0].spec)
            except NoKernelError as error:
                path, remedy = group[0].report.path, 'kernel="auto" takes what there is'
                raise FalqonError(path, str(error), remedy) from error
            done.add(operands)
        return _reported(group, operands, group[0].spec)

    for i in _track(chosen) if time and chosen else chosen:
        operands = Operands.of(groups[i], plan)
        groups[i] = reported(groups[i], operands)
        if operands.joined and not _by_library(groups[i]):  # what is left is chosen without it
            groups[i] = reported(groups[i], replace(operands, joined=False))
    return room.keep_where_read(replace(plan, groups=tuple(groups)), _by_library)


def _by_library(group: Group) -> bool:
    """Whether the library makes O of a group's sites with adapters, as far as that is known."""
    if group[0].spec.kernel in room.LIBRARIES:
        return True
    return all(s.report.kernel.startswith(room.LIBRARIES) for s in group if s.adapters)


@dataclass(frozen=True)
class Adapter:
    """The rank of an adapter, that of A_c and the columns of W_S behind it, the dtypes of A and B,
    and whether they train.
    """

    rank: int
    error: int
    columns: int
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    train_a: bool
    train_b: bool

    @property
    def rows(self) -> int:
        """The rows of Â."""
        return rank_of(self.rank, self.error, self.columns)

    @property
    def width(self) -> int:
        """The columns of b."""
        return self.rows + self.columns


@dataclass(frozen=True)
class SiteOperands:
    """W [out, in], a bias or none, and adapters. ``merged``: W and Â are rows of one tensor, W'."""

    out: int
    bias_dtype: torch.dtype | None
    adapters: tuple[Adapter, ...]
    merged: bool


@dataclass(frozen=True)
class Operands:
    """What a group of sites is computed from: x [tokens, features], and `SiteOperands`.

    ``adds_b``: O has the term O_A · bᵀ. ``own_x``: the adapters read another x than the sites.
    ``turned``: Wᵀ is kept, with so many columns behind it; -1 where it is not. ``joined``: so is W,
    with room for the adapters.
    """

    device: torch.device
    tokens: int
    features: int
    x_dtype: torch.dtype
    out_dtype: torch.dtype
    sites: tuple[SiteOperands, ...]
    adds_b: bool
    own_x: bool
    turned: int
    joined: bool = False

    @classmethod
    def of(cls, group: Group, plan: Plan) -> Operands:
        """The operands of a planned group."""
        x, config = value_of(group[0].match.x), plan.config
        return cls(
            x.device,
            group[0].report.tokens_hint,
            hint(x.shape[-1]),
            x.dtype,
            value_of(group[0].match.anchor).dtype,
            tuple(_site_operands(site) for site in group),
            config.update == "adapter" or adds_pending(config.pending),
            bool(adapter_inputs(group)),
            _turned(group, plan),
            room.slot_of(group, plan.joined.slots) is not None,
        )

    @property
    def gemm_dtype(self) -> torch.dtype:
        """The dtype of O_A and b."""
        return gemm_dtype(self.out_dtype, self.device)

    def problems(self, spec: SiteSpec) -> list[GemmProblem]:
        """The product that makes O of each site, as `falqon_fx.ops.products.merged_product` asks
        for it.
        """
        of_a = [adapter.rows for site in self.sites for adapter in site.adapters]
        ranks = [[adapter.width for adapter in site.adapters] for site in self.sites]
        if of_a and not self.adds_b and not self.own_x and spec.base != "nvfp4":
            alone = len(self.sites) == len(of_a) == 1 and self.sites[0].merged
            return [self._problem(self.sites, spec, of_a, 0, alone)] * len(self.sites)
        found: dict[int, GemmProblem] = {}
        if spec.adapter == "fp8":
            ranks = [[aligned(rank) for rank in own] for own in ranks]
        for members in launches([self.adds_b and bool(own) for own in ranks]):
            rank = max(sum(ranks[i]) for i in members) if self.adds_b else 0
            sites = [self.sites[i] for i in members]
            problem = self._problem(sites, spec, [], rank, len(members) == 1)
            found |= dict.fromkeys(members, problem)
        return [found[i] for i in range(len(self.sites))]

    def _problem(
        self,
        sites: Sequence[SiteOperands],
        spec: SiteSpec,
        of_a: Sequence[int],
        rank: int,
        one_tensor: bool,
    ) -> GemmProblem:
        from falqon_fx.kernels.gemm.tiles import GemmProblem

        biases = {site.bias_dtype for site in sites if site.bias_dtype is not None}
        bias = "none" if not biases else dtype_name(biases.pop()) if len(biases) == 1 else "float32"
        fields: dict[str, Any] = {
            "x_scale": spec.granularity,
            "w_scale": "row" if spec.base_per_row else "tensor",
            "out_dtype": dtype_name(self.out_dtype),
            "a_dtype": dtype_name(self.gemm_dtype),
            "bias": bias,
            "accumulation": spec.accumulation,
        }
        if spec.adapter == "fp8" and rank:
            fields |= {"a_dtype": dtype_name(self.out_dtype), "tail": True}
        return GemmProblem(
            n=self.tokens,
            k=aligned(self.features),
            rows=(*(site.out for site in sites), *of_a),
            a_pieces=len(of_a),
            x="int8" if spec.base == "int8" else "e4m3",
            rank=rank,
            one_tensor=one_tensor,
            packed=spec.base == "nvfp4",
            **fields,
        )


def time_products(operands: Operands, spec: SiteSpec) -> None:
    """Make the choices between kernels for a group: run its ops once, forward and backward."""
    trains = torch.is_grad_enabled()
    # The caller traces with fake tensors, maybe in autocast.
    with without_fake_mode(), torch.autocast(operands.device.type, enabled=False):
        x, arguments = _random_arguments(operands, spec)
        _time_casts(operands, arguments, spec)
        with torch.set_grad_enabled(trains):
            ys = torch.ops.falqon.merged_linear(x, *arguments)[: len(operands.sites)]
            if trains:
                lora = [*arguments[8], *arguments[9]]
                wanted = [x, *(t for t in lora if t.requires_grad)]
                torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys])


def _time_casts(operands: Operands, arguments: Sequence[Any], spec: SiteSpec) -> None:
    scale, lora_a, lora_b, owner = (arguments[i] for i in (1, 8, 9, 11))
    if lora_a and lora_a[0].is_cuda:
        scales = [scale[i] for i in owner] if spec.adapter == "fp8" else []
        given = lora_a, lora_b, [1.0] * len(lora_a), scales, *_fixed(operands)
        torch.ops.falqon.proxy_update(*given, False, str(spec))


def _fixed(operands: Operands) -> list[list[Tensor]]:
    """What a calibration has made for the adapters, as zeros; where it has not for all of them,
    nothing.
    """
    each = [(site.out, a) for site in operands.sites for a in site.adapters]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, device=operands.device)

    errors = [(zeros(a.error, operands.features), zeros(out, a.error)) for out, a in each]
    columns = [zeros(out, a.columns) for out, a in each]
    some = all(a.error for _, a in each), all(a.columns for _, a in each)
    of_errors = [[*column] for column in zip(*errors, strict=True)] if some[0] else [[], []]
    return [*of_errors, columns if some[1] else []]


def _random_arguments(operands: Operands, spec: SiteSpec) -> tuple[Tensor, tuple[Any, ...]]:
    """x and the other arguments of ``falqon::merged_linear``."""
    from falqon_fx.kernels.products.in_k import with_room_for
    from falqon_fx.kernels.transpose.kept import transposed_together, with_room

    device, features = operands.device, operands.features
    # The stream of torch's own random numbers stays where it is.
    numbers = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=numbers, dtype=torch.bfloat16, device=device)
        return values.to(dtype)

    def ones(shape: tuple[int, ...]) -> Tensor:
        return torch.ones(shape, dtype=torch.float32, device=device)

    weight, bias, a, b, lora_a, lora_b = (list[Tensor]() for _ in range(6))
    owner, alpha, channels = list[int](), list[Tensor](), list[Tensor]()
    for i, site in enumerate(operands.sites):
        rows = [site.out, *(adapter.rows for adapter in site.adapters)]
        parts = draw(sum(rows), features, dtype=spec.operand).split(rows)
        w, *own_a = parts if site.merged else [part.clone() for part in parts]
        packs = spec.base == "nvfp4"
        weight.append(nvfp4.cast(w.to(torch.float32), ones(())) if packs else w)
        a += own_a
        if site.bias_dtype is not None:
            bias.append(draw(site.out, dtype=site.bias_dtype))
        for each in site.adapters:
            in_a, in_b = (each.rank, features), (site.out, each.rank)
            lora_a.append(draw(*in_a, dtype=each.a_dtype).requires_grad_(each.train_a))
            lora_b.append(draw(*in_b, dtype=each.b_dtype).requires_grad_(each.train_b))
            of_b = site.out, each.width
            b += [draw(*of_b, dtype=operands.gemm_dtype)] if operands.adds_b else []
            owner.append(i)
            if each.columns:
                channels.append(torch.arange(each.columns, dtype=torch.int32, device=device))
    x = draw(operands.tokens, features, dtype=operands.x_dtype).requires_grad_()
    own_x = [x] * len(owner) if operands.own_x else []
    if spec.adapter == "fp8":
        b = [factor.to(E4M3) for factor in b]
        alpha = [torch.ones(len(code), dtype=torch.float32, device=device) for code in a]
    scales = [ones(scale_shape(len(w), spec)) for w in weight]
    of_a = [ones((len(code), 1) if spec.per_row else ()) for code in a]
    columns = (weight, scales, bias, a, of_a, b, alpha)
    keep_x = any(t.requires_grad for t in lora_a)
    turned = []
    if operands.turned >= 0:
        turned = [with_room(transposed_together(weight), operands.turned)]
    joined = []
    if operands.joined:
        adapted = [w for i, w in enumerate(weight) if i in owner]
        joined = [with_room_for(adapted, sum(aligned(code.shape[1]) for code in b))]
    copies = turned, joined, channels
    numbers_of = (owner, [1.0] * len(owner), keep_x, *copies, operands.out_dtype, str(spec))
    return x, (*columns, [], lora_a, lora_b, own_x, *numbers_of)


def _turned(group: Group, plan: Plan) -> int:
    slot = slot_of(group, plan.turned.slots)
    return -1 if slot is None else slot.room


def _site_operands(site: SitePlan) -> SiteOperands:
    adapters = tuple(
        Adapter(
            hint(b.shape[1]),
            m.correction.rank,
            m.correction.width,
            a.dtype,
            b.dtype,
            a.requires_grad and not m.fixed,
            b.requires_grad and not m.fixed,
        )
        for m, a, b in ((m, m.lora_a.value, m.lora_b.value) for m in site.match.added)
    )
    bias = site.match.base.bias
    value = bias.value if isinstance(bias, Param) else None if bias is None else value_of(bias)
    return SiteOperands(
        hint(site.base.out),
        None if value is None else value.dtype,
        adapters,
        isinstance(site.base, RowsSlot),
    )


def _has_choices(group: Group, spec: SiteSpec) -> bool:
    on_gpu = value_of(group[0].match.x).device.type == "cuda" and torch.cuda.is_available()
    return on_gpu and spec.kernel != "dequantize" and not group[0].report.experts


def _reported(group: Group, operands: Operands, spec: SiteSpec) -> Group:
    """The group with what computes O of each site in its report, where that has been timed."""
    from falqon_fx.kernels.products.dispatch import forward_choice

    sites = []
    for site, problem in zip(group, operands.problems(spec), strict=True):
        choice = forward_choice(operands.device, problem, spec.kernel, operands.joined)
        report = site.report
        if choice is not None and report.architecture:
            report = replace(report, kernel=choice.winner, kernel_reason=str(choice))
        sites.append(replace(site, report=report))
    return tuple(sites)


def _track(groups: Sequence[int]) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        yield from bar.track(groups, description="falqon: timing kernels")
