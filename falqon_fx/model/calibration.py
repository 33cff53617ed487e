"""What a calibration buys back of the casts of a model's layers, and with how much."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.batches import lasting, shown
from falqon_fx.model.lora_layers import LinearLayer
from falqon_fx.model.moments import Moment, moments_of
from falqon_fx.model.sensitivity import CastCost, cast_costs, check_any
from falqon_fx.site.allot import Offer, allot
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.compensate import ErrorFactors, error_factors, heaviest_channels
from falqon_fx.site.numerics import INT8
from falqon_fx.site.rounding import round_along
from falqon_fx.site.spec import SiteSpec

Asked = int | Literal["auto"]
DEFAULT = 16  # ranks and channels, where a calibration is given and they are not
MOST = 4 * DEFAULT  # of a layer with "auto"


@dataclass
class _Terms:
    """What could be bought for one layer: as many ranks and channels as are offered."""

    factors: ErrorFactors | None
    base: Base | None  # W as it is to be cast; None: to nearest
    channels: Tensor
    shares: Tensor  # of the channels, of what the cast of x costs
    columns: Tensor
    apart: bool  # whether q(x) has zeros in the channels, see `falqon_fx.ops.cast_errors`
    width: int  # of x

    def take(self, ranks: int, channels: int) -> dict[str, Tensor]:
        """The parameters of `Fp8Linear`."""
        terms: dict[str, Tensor] = {}
        if self.factors is not None and ranks:
            factors = self.factors.first(ranks)
            of_a = factors.a
            if self.apart:
                of_a = of_a.index_fill(1, self.channels[:channels].long(), 0.0)
            terms |= {"error_a": of_a, "error_b": factors.b}
        elif self.apart and channels:
            # What brings x_S to O stands behind an adapter, and one of q, k and v without any would
            # have its channels in the step of all three.
            none = self.columns.new_zeros
            terms |= {"error_a": none(1, self.width), "error_b": none(len(self.columns), 1)}
        if channels:
            order = self.channels[:channels].argsort()
            terms["columns"] = self.columns[:, order]
        terms = {name: term.to(torch.bfloat16).contiguous() for name, term in terms.items()}
        return terms | ({"channels": self.channels[order]} if channels else {})

    @property
    def made(self) -> tuple[int, int]:
        """Ranks and channels that there are."""
        return len(self.factors.shares) if self.factors else 0, len(self.channels)

    def left(self, ranks: int) -> float:
        """The share of W's cast error that the ranks leave in the output."""
        return self.factors.first(ranks).left if self.factors and ranks else 1.0

    def rest(self, cost: CastCost, ranks: int, channels: int) -> CastCost:
        """What the casts cost beside so many of them."""
        of_weight = cost.of_weight * self.left(ranks) ** 2
        of_x = cost.of_x * (1 - float(self.shares[:channels].sum()))
        return CastCost(of_weight + of_x, of_weight, of_x)


@dataclass
class Calibration:
    """What is to be bought back of the casts, and with what: ``ranks`` of W's error, ``channels``
    of x's. Without batches nothing.

    Attributes:
        said: which of the two the caller gave; else a layer that has fewer gets all of its own.
        tokens: how many were read.
        left, bought: by layer, see `falqon_fx.model.prepare_report.PrepareReport`.
    """

    batches: Iterable[Any] | None = None
    ranks: Asked = 0
    channels: Asked = 0
    said: frozenset[str] = frozenset()
    tokens: int = 0
    left: dict[str, float] = field(default_factory=dict)
    bought: dict[str, tuple[int, int]] = field(default_factory=dict)
    _terms: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _bases: dict[str, Base] = field(default_factory=dict)
    _costs: dict[str, CastCost] | None = None
    _found: dict[str, _Terms] = field(default_factory=dict)  # read before they are asked for

    @classmethod
    def asked(
        cls,
        batches: Iterable[Any] | None,
        compensate: Asked | None,
        outliers: Asked | None,
        config: FalqonConfig,
    ) -> Calibration:
        """What the arguments of `prepare` ask for; a calibration may also be for the sensitive
        layers that ``config`` leaves out.

        Raises:
            FalqonError: they say nothing together.
        """
        given = {"compensate": compensate, "outliers": outliers}
        said = {name: value for name, value in given.items() if value is not None}
        for name, value in said.items():
            if value != "auto" and (type(value) is not int or value < 0):
                raise FalqonError(
                    name, f"{value!r} is no number of them", 'Give 0 or more, or "auto"'
                )
            if value and batches is None:
                raise FalqonError(
                    name,
                    "it is chosen by what the layers read, and there is no calibration",
                    f"Call prepare(model, calibration=batches, {name}={value!r})",
                )
        if batches is None:
            return cls()
        other: Asked = "auto" if "auto" in (compensate, outliers) else DEFAULT
        ranks, channels = (other if n is None else n for n in (compensate, outliers))
        if config.base_dtype == "int8" and channels == "auto":
            # One step holds all of x: a channel that one of q, k and v has in it all have.
            channels = DEFAULT
            said.pop("outliers", None)
        if not (ranks or channels or config.sensitive()):
            raise FalqonError(
                "calibration",
                "it is for nothing: compensate=0, outliers=0",
                "Leave it out, or ask for one of them",
            )
        if config.sensitive() or other == "auto":
            batches = lasting(batches)
        return cls(batches, ranks, channels, frozenset(said))

    def refuse(self, problem: str) -> None:
        """Raise where anything is asked for that there can't be."""
        if self.batches is not None:
            raise FalqonError("calibration", problem, "Leave it out")

    def costs(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        config: FalqonConfig,
        progress: bool,
    ) -> dict[str, CastCost]:
        """What the casts of ``layers`` cost, see `cast_costs`; those of some of them, asked for
        later, are among these.
        """
        if self._costs is None:
            assert self.batches is not None
            with shown(progress) as show:
                self._costs = cast_costs(
                    model, layers, self.batches, config, together=True, show=show
                )
        return self._costs

    @torch.inference_mode(False)  # or the terms would be of no use outside of it
    def rest(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        config: FalqonConfig,
        progress: bool,
    ) -> dict[str, CastCost]:
        """What the casts of ``layers`` cost, see `costs`, beside the terms that they would get.

        Raises:
            FalqonError: see `read`.
        """
        costs = self.costs(model, layers, config, progress)
        if not (self.ranks or self.channels):
            return costs
        self._found = self._read(model, layers, config, progress)
        chosen = self._chosen(layers, self._found, costs)
        terms = self._found
        return costs | {s: t.rest(costs[s], *chosen[s]) for s, t in terms.items() if s in costs}

    @torch.inference_mode(False)
    def read(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        config: FalqonConfig,
        progress: bool,
    ) -> None:
        """Run the model over the batches, and make the terms of all layers; nothing without any.

        Raises:
            FalqonError: see `moments_of`; more ranks or channels than a layer has.
        """
        if self.batches is None or not (self.ranks or self.channels):
            return
        auto = "auto" in (self.ranks, self.channels)
        costs = self.costs(model, layers, config, progress) if auto else {}
        found = self._found or self._read(model, layers, config, progress)
        self._found = {}
        chosen = self._chosen(layers, found, costs)
        for site, (ranks, channels) in chosen.items():
            self._terms[site] = found[site].take(ranks, channels)
            if (base := found[site].base) is not None and ranks:
                self._bases[site] = base
            self.left[site], self.bought[site] = found[site].left(ranks), (ranks, channels)

    @torch.no_grad()
    def _read(
        self,
        model: nn.Module,
        layers: Sequence[LinearLayer],
        config: FalqonConfig,
        progress: bool,
    ) -> dict[str, _Terms]:
        assert self.batches is not None
        check_any(layers)
        self._check_sizes(layers)
        spec, found = SiteSpec.from_config(config), dict[str, _Terms]()
        with shown(progress) as show:
            counted = itertools.count(1)
            for layer, moment in moments_of(model, layers, self.batches, show):
                self.tokens = max(self.tokens, moment.tokens)
                if bool((moment.squares > 0).any()):  # not zeros alone
                    found[layer.site] = self._offered(layer, moment, spec)
                del moment  # the next may come of another pass, for which there is to be room
                show(f"what {next(counted)} of {len(layers)} layers read is taken apart")
        return found

    def _offered(self, layer: LinearLayer, moment: Moment, spec: SiteSpec) -> _Terms:
        """The terms of a layer. The product is found for W as it is cast to nearest; what it leaves
        of W is rounded along x (`round_along`), and the product found anew for the error of that.
        Where each layer's ranks are still to be chosen, W itself is rounded.
        """
        weight = layer.weight.detach()
        ranks, channels = self._most(layer)
        factors, base, apart = None, None, spec.operand == INT8
        with torch.autocast(weight.device.type, enabled=False):
            of_weight = None if apart else weight
            picked, shares = heaviest_channels(moment.squares, of_weight, channels)
            if apart:
                moment = moment.without_largest(channels)
            if ranks and bool((moment.squares > 0).any()):
                order, root = moment.order, moment.root
                wide = weight.to(torch.float32)[:, order]
                error = wide - cast_base(weight, spec).dequantize()[:, order]
                factors = error_factors(error, root, ranks)
                if spec.base != "nvfp4":  # whose neighbours share a scale
                    part = 0.0 if self.ranks == "auto" else factors.b @ factors.a
                    base = round_along(wide - part, root, spec)
                    error = wide - base.dequantize()
                    factors = error_factors(error, root, ranks, size=factors.size)
                    code = torch.empty_like(base.code)
                    code[:, order] = base.code
                    base = Base(code.cpu(), base.scale.cpu())  # until all layers are cast
                factors.a[:, order] = factors.a.clone()
        return _Terms(factors, base, picked, shares, weight[:, picked], apart, weight.shape[1])

    def _most(self, layer: LinearLayer) -> tuple[int, int]:
        """How many ranks and channels are made for a layer."""
        out, features = layer.weight.shape
        ranks = MOST if self.ranks == "auto" else self.ranks
        channels = MOST if self.channels == "auto" else self.channels
        return min(ranks, out, features), min(channels, features)

    def _chosen(
        self,
        layers: Sequence[LinearLayer],
        found: Mapping[str, _Terms],
        costs: Mapping[str, CastCost],
    ) -> dict[str, tuple[int, int]]:
        """Ranks and channels of each layer: with "auto" those that buy most for the bytes that
        `DEFAULT` of each would take.
        """
        sizes = {layer.site: tuple(layer.weight.shape) for layer in layers if layer.site in found}
        offers: list[Offer] = []
        budget = 0
        for site, (out, features) in sizes.items():
            cost = costs.get(site, CastCost(0.0, 0.0, 0.0))
            factors, channels = found[site].factors, found[site].shares
            if self.ranks == "auto" and factors is not None:
                budget += DEFAULT * (out + features)
                offers.append(Offer((site, 0), factors.shares, cost.of_weight, out + features))
            if self.channels == "auto":
                budget += DEFAULT * out
                offers.append(Offer((site, 1), channels, cost.of_x, out))
        bought = allot(offers, budget)

        return {
            site: (bought.get((site, 0), made[0]), bought.get((site, 1), made[1]))
            for site, made in ((site, found[site].made) for site in sizes)
        }

    def _check_sizes(self, layers: Sequence[LinearLayer]) -> None:
        for layer in layers:
            out, features = layer.weight.shape
            for name, count, most in (
                ("compensate", self.ranks, min(out, features)),
                ("outliers", self.channels, features),
            ):
                if name in self.said and count != "auto" and count > most:
                    raise FalqonError(
                        layer.site,
                        f"it is {out} x {features}, so {name}={count} is more than it has",
                        f"Set {name}={most} or less, or leave the layer out with exclude=",
                    )

    def terms(self, layer: LinearLayer) -> dict[str, Tensor]:
        """The terms of a layer, see `Fp8Linear`; none where nothing came to it, or zeros alone."""
        return self._terms.pop(layer.site, {})

    def base(self, layer: LinearLayer) -> Base | None:
        """The base that the terms of a layer were made for; None where that is W to nearest."""
        base, device = self._bases.pop(layer.site, None), layer.weight.device
        return base and Base(base.code.to(device), base.scale.to(device))
