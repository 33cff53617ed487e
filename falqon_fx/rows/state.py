"""`MergedAdapter`, the state of one site, and the registry that finds it again.

State belongs to the triple (W, A, B) with its scaling, neither to W alone nor to a compiled graph:
Dynamo shares one graph between blocks and models, so the backend looks the state up per call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from falqon_fx._compat import version
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.rows import drift, dropped, update
from falqon_fx.rows.batch import Batched
from falqon_fx.rows.fingerprint import site_number
from falqon_fx.rows.ops import dequantize_base
from falqon_fx.site.base import check_weight
from falqon_fx.site.numerics import E4M3, decode_fp8
from falqon_fx.site.record import COUNTERS, FINGERPRINT_A, FINGERPRINT_W, NONFINITE, SITE, TOO_LARGE
from falqon_fx.site.spec import RowsSpec
from falqon_fx.site.svd import init_lora_a_

T = TypeVar("T")
STATE = ("code", "scale", "applied", "counters", "writes", "origin")
IN_GRAPH = STATE[:5]


@dataclass(eq=False, repr=False)
class MergedAdapter:
    """The live state of one site.

    Invariant: dq(weight[:out]) = base + scaling · applied · Â up to rounding, with Â =
    dq(weight[out:]), the A that is really used: one cast's where the base weight is at hand, else
    one for each write of a row and one more.

    Attributes:
        code: uint8 [out + r, in], the E4M3 bytes of W' = [W; A].
        scale: float32 [] or [out + r, 1]; multiplies on dequantize.
        applied: [out, r], the part of B that W' contains.
        counters: int64, see `falqon_fx.rows.update`.
        writes: int32 [out], how often each row was written.
        origin: float32 [out, 2], what is kept of a base weight that `prepare` freed
            (`falqon_fx.rows.drift`); NaN where it is at hand, or never was.
        scaling: LoRA's alpha / r.
    """

    code: Tensor
    scale: Tensor
    applied: Tensor
    counters: Tensor
    writes: Tensor
    origin: Tensor
    scaling: float
    spec: RowsSpec
    base_ref: weakref.ref[Tensor] | None = field(default=None, init=False)
    a_ref: weakref.ref[Tensor] | None = field(default=None, init=False)
    b_ref: weakref.ref[Tensor] | None = field(default=None, init=False)
    transposed: bool = field(default=False, init=False)  # the base weight is stored [in, out]
    stamp: tuple[Any, ...] = field(default=(), init=False)
    # From a checkpoint: no other config may start over beside it.
    resumed: bool = field(default=False, init=False)

    def belongs_to(self, site: SiteParameters) -> bool:
        """Whether it was made from the site's own W and A."""
        refs = (self.base_ref, self.a_ref)
        base, lora_a = (None if ref is None else ref() for ref in refs)
        return base is site.base and lora_a is site.lora_a

    def holds_what_b_lacks(self, lora_b: Tensor | None) -> bool:
        """Whether training would be lost with this state (`falqon_fx.rows.dropped`)."""
        return self.spec.pending == "drop" and dropped.lies_in_w(self.applied, lora_b)

    @property
    def weight(self) -> Tensor:
        """W' = [W; A], float8_e4m3fn [out + r, in]."""
        return self.code.view(E4M3)

    @property
    def rank(self) -> int:
        return self.applied.shape[1]

    @property
    def nonfinite_rows(self) -> int:
        """Rows of B that were not written because they held NaN or Inf (reads the device)."""
        return int(self.counters[NONFINITE])

    @property
    def too_large_rows(self) -> int:
        """How often a row stayed as it was because its next value would have been NaN, Inf or,
        where `prepare` freed the base weight, too large (reads the device). See `flush`.
        """
        return int(self.counters[TOO_LARGE])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The state as the graph takes it, in the order of `IN_GRAPH`."""
        return (self.weight, self.scale, self.applied, self.counters, self.writes)

    @property
    def stored(self) -> dict[str, Tensor]:
        """The state by the names of `STATE`, as files and prepared modules hold it: W' as bytes."""
        return {name: getattr(self, name) for name in STATE}

    def lora_b(self) -> Tensor:
        """The user's own parameter B, [out, r].

        Raises:
            FalqonError: the parameter no longer exists.
        """
        b = self.b_ref() if self.b_ref is not None else None
        if b is None:
            raise FalqonError(
                "", "this site's lora_B is gone", "Call falqon_fx.adapters(model) again"
            )
        return b.detach()

    def pending(self) -> Tensor:
        """B - applied (with pending="drop": B), float32 [out, r]: not yet in W'."""
        b = self.lora_b().to(torch.float32)
        return b if self.spec.pending == "drop" else b - self.applied.to(torch.float32)

    def dequantize(self) -> Tensor:
        """dq(W'), float32 [out + r, in]."""
        return decode_fp8(self.code, self.scale, torch.float32)

    def base(self) -> Tensor:
        """dq(W) - scaling · applied · dq(A), float32 [out, in]: the weight without its adapter."""
        return dequantize_base(self.code, self.scale, self.applied, self.scaling)

    @torch.no_grad()
    def drift(self) -> float | None:
        """The error of the FP8 weight relative to that of its first cast, as far as it can be told
        without the base weight (`falqon_fx.rows.drift`); None where that is at hand, or never was.
        """
        if drift.is_unknown(self):
            return None
        return drift.estimate(self, drift.errors(self))

    @property
    def limit(self) -> float | None:
        """The largest magnitude of a row that a step may write, by the row's scale; None: any."""
        return update.limit_of(self.spec, None if self.base_ref is None else self.base_ref())

    @torch.no_grad()
    def flush(self) -> None:
        """Write every pending row now (with pending="drop", then zero B), those among them that no
        optimizer's step may write because they are too large.
        """
        with update.lock:
            b, base = self.lora_b(), self.base_ref() if self.base_ref is not None else None
            if base is not None:
                base = base.detach().t() if self.transposed else base.detach()
            update.flush_(Batched(0, *self.tensors, b, b, base, self.scaling), self.spec)
            if self.spec.pending == "drop":
                b.zero_()


def allocate(
    out: int,
    features: int,
    rank: int,
    base_dtype: torch.dtype,
    scaling: float,
    spec: RowsSpec,
    device: torch.device,
) -> MergedAdapter:
    """An unfilled state; its shapes and dtypes are what the graph is compiled for."""
    # 16 bits hold `applied` beside a 16-bit base: what they round away of B stays pending. With
    # "drop" it would be lost, since B is zeroed: steps smaller than their last place, all of them.
    wide = base_dtype == torch.float32 or spec.pending == "drop"
    applied_dtype = torch.float32 if wide else torch.bfloat16
    scale_shape = (out + rank, 1) if spec.per_row else ()
    return MergedAdapter(
        torch.empty(out + rank, features, dtype=torch.uint8, device=device),
        torch.empty(scale_shape, dtype=torch.float32, device=device),
        torch.empty(out, rank, dtype=applied_dtype, device=device),
        torch.zeros(COUNTERS, dtype=torch.int64, device=device),
        torch.zeros(out, dtype=torch.int32, device=device),
        torch.full((out, 2), float("nan"), dtype=torch.float32, device=device),
        scaling,
        spec,
    )


def create(
    path: str,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    config: FalqonConfig,
    *,
    frees_base: bool = False,
) -> MergedAdapter:
    """Merge W and A into a new FP8 state; with init="svd" and B = 0, overwrite A first.

    ``frees_base``: the base weight will not be at hand, so keep what tells how far W' moves from
    it.

    Raises:
        FalqonError: W, A or B holds NaN or Inf, or lies beyond what an FP8 scale can carry.
    """
    spec = RowsSpec.from_config(config)
    # State outlives the call: no inference tensors, no autocast, no graph.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(base.device.type, enabled=False),
    ):
        check_values(path, base, lora_a, lora_b)
        if config.init == "svd" and not lora_b.any():
            init_lora_a_(base, lora_a, spec, config.seed)
        out, features = base.shape
        state = allocate(out, features, lora_a.shape[0], base.dtype, scaling, spec, base.device)
        site = Batched(0, *state.tensors, lora_b, lora_a, base, scaling)
        if not update.write_merged_(site, spec):
            raise FalqonError(path, *update.NOT_FINITE)
        counters = state.counters
        mixed = counters[FINGERPRINT_W] * 31 + counters[FINGERPRINT_A]
        counters[SITE] = site_number(mixed)
        if frees_base:
            drift.remember_(state.origin, state, base)
    return state


def check_values(path: str, base: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """Refuse parameters that can't be merged.

    Raises:
        FalqonError: W, A or B holds NaN or Inf or nothing (meta), or lies beyond what an FP8 scale
            can carry.
    """
    for name, tensor in (("base weight", base), ("lora_A", lora_a), ("lora_B", lora_b)):
        check_weight(path, tensor, name)


@dataclass(frozen=True)
class SiteParameters:
    """A site whose state is looked up; ``transposed`` where ``base`` is stored [in, out]."""

    path: str
    base: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    transposed: bool = False

    @property
    def weight(self) -> Tensor:
        """The base weight, [out, in]."""
        return self.base.t() if self.transposed else self.base


class Registry:
    """Finds the state of a (W, A, B) again, or makes it; holds no parameter alive."""

    def __init__(self) -> None:
        self._by_b: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def get(self, wanted: Sequence[SiteParameters], config: FalqonConfig) -> list[MergedAdapter]:
        """The states of sites, made anew where W or A changed since; none unless all can be.

        Raises:
            FalqonError: W, A or B of a site holds NaN or Inf, or lies beyond what an FP8 scale can
                carry; or a state with pending="drop" would be made anew, and its training lost.
        """
        spec = RowsSpec.from_config(config)
        found = [self._find(site, spec) for site in wanted]
        for site, state in zip(wanted, found):
            if state is None:
                check_values(site.path, site.base, site.lora_a, site.lora_b)
        return [state or self._make(site, config) for site, state in zip(wanted, found)]

    def _find(self, site: SiteParameters, spec: RowsSpec) -> MergedAdapter | None:
        known: list[MergedAdapter] = self._by_b.get(site.lora_b, [])
        stamp, found = _stamp(site.base, site.lora_a), None
        for state in [state for state in known if state.belongs_to(site)]:
            same = (state.scaling, state.transposed) == (site.scaling, site.transposed)
            if same and state.spec == spec:
                if state.stamp == stamp:
                    found = state
                    continue
            elif state.resumed and state.stamp == stamp:
                raise FalqonError(
                    site.path,
                    f"its checkpoint was trained with {state.spec} and scaling {state.scaling:g}, "
                    f"now {spec} and {site.scaling:g} are asked for",
                    "Compile with the options of the checkpoint, or call falqon_fx.restore(model) "
                    "to start anew from the base weights and the adapter",
                )
            else:
                same = False
            if state.holds_what_b_lacks(site.lora_b):
                raise FalqonError(
                    site.path, dropped.CHANGED if same else dropped.OTHER, dropped.REMEDY
                )
            if same:
                known.remove(state)  # W or A was written or moved: start from the new values
        return found

    def _make(self, site: SiteParameters, config: FalqonConfig) -> MergedAdapter:
        state = create(site.path, site.weight, site.lora_a, site.lora_b, site.scaling, config)
        state.transposed = site.transposed
        self._remember(state, site.base, site.lora_a, site.lora_b)
        return state

    def _remember(self, state: MergedAdapter, base: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        state.base_ref, state.a_ref = weakref.ref(base), weakref.ref(lora_a)
        state.b_ref = weakref.ref(lora_b)
        state.stamp = _stamp(base, lora_a)
        known = self._by_b.get(lora_b, [])
        alive = [s for s in known if s.base_ref is not None and s.base_ref() is not None]
        self._by_b[lora_b] = [*alive, state]

    def adopt(self, state: MergedAdapter, base: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        """Take a state that was saved for these parameters; only its own config may use it."""
        state.resumed = True
        self._remember(state, base, lora_a, lora_b)

    def of(self, lora_b: Tensor) -> list[MergedAdapter]:
        """The states that a parameter B takes part in."""
        return list(self._by_b.get(lora_b, []))

    def holds_what_lacks(self, lora_b: Tensor) -> bool:
        """Whether steps of a parameter B lie in the FP8 weight of a state alone."""
        return any(state.holds_what_b_lacks(lora_b) for state in self.of(lora_b))

    def within(
        self, parameters: Iterable[Tensor], names: Mapping[int, T]
    ) -> Iterator[tuple[MergedAdapter, tuple[T, ...]]]:
        """The states whose B is among ``parameters`` and whose W, A and B all have an entry in
        ``names``, by id, with these entries.
        """
        for parameter in parameters:
            for state in self.of(parameter):
                refs = (state.base_ref, state.a_ref, state.b_ref)
                members = [r() for r in refs if r is not None]
                if all(id(member) in names for member in members):
                    yield state, tuple(names[id(member)] for member in members)

    def forget(self, lora_b: Tensor) -> None:
        """Drop the states of a parameter B."""
        self._by_b.pop(lora_b, None)


def _stamp(base: Tensor, lora_a: Tensor) -> tuple[Any, ...]:
    """Identifies the W and A that a state was made from. An A that trains on a CPU moves with each
    step: the update itself sees it, and makes W' anew in place.
    """
    moves = lora_a.requires_grad and lora_a.device.type == "cpu"
    memory = tuple((t.data_ptr(), t.dtype, t.device, t.shape) for t in (base, lora_a))
    return (*memory, version(base), 0 if moves else version(lora_a))


registry = Registry()
