"""What the layers of a model read: Σ x · xᵀ of each tensor, in passes that memory has room for."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor, version
from falqon_fx.errors import FalqonError
from falqon_fx.model.agreement import check_same_on_all_ranks, has_others
from falqon_fx.model.batches import (
    FORM,
    Tell,
    batches_of,
    input_of,
    lasting,
    quietly,
    run_batch,
)
from falqon_fx.model.lora_layers import LinearLayer
from falqon_fx.site.compensate import damped_root

_LEAST_ROOM = 2**30  # bytes of moments that are held at a time, however small the model


@dataclass(eq=False)
class Moment:
    """Σ x · xᵀ [in, in] over the ``tokens`` that a layer read, float32; layers that read one tensor
    share it.
    """

    total: Tensor
    tokens: int = 0
    seen: weakref.ref[Tensor] | None = None  # what was added last, and its version
    at: int = 0
    _rest: dict[int, Moment] = field(default_factory=dict)

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add what a layer reads; of what ``mask`` [...] says is padding nothing, also where the
        layer reads all tokens in one row.
        """
        if self.seen is not None and self.seen() is x and self.at == version(x):
            return  # by a layer beside this one
        read = x.detach()
        if mask is not None and x.dim() == 2 and len(x) == mask.numel():
            mask = mask.reshape(-1)
        if mask is not None and mask.shape == x.shape[:-1]:
            read = read[mask.to(x.device) != 0]
        flat = read.reshape(-1, x.shape[-1]).to(torch.float32)
        self.total.addmm_(flat.t(), flat)
        self.tokens += flat.shape[0]
        self.seen, self.at = weakref.ref(x), version(x)

    @property
    def mean(self) -> Tensor:
        """E[x · xᵀ]."""
        return self.total / self.tokens

    @property
    def squares(self) -> Tensor:
        """E[x_c²] [in]."""
        return self.total.diagonal() / self.tokens

    def without_largest(self, count: int) -> Moment:
        """That of x with zeros in its ``count`` channels with the largest E[x_c²], made once for
        all layers that share it.
        """
        if count not in self._rest:
            left = torch.ones_like(self.squares).index_fill(0, self.squares.topk(count).indices, 0)
            self._rest[count] = Moment(self.total * left * left[:, None], self.tokens)
        return self._rest[count]

    @functools.cached_property
    def order(self) -> Tensor:
        """The channels by E[x_c²], the largest last."""
        return self.squares.argsort()

    @functools.cached_property
    def root(self) -> Tensor:
        """`damped_root` of the mean with its channels in `order`, made once for all layers that
        share it.
        """
        return damped_root(self.mean[self.order][:, self.order])


@dataclass
class _Reader:
    """Adds up what the layers read, in moments of ``room`` bytes together (the first in any case);
    ``waiting`` are the modules that found no room.

    Layers that read one tensor in the first batch share a moment from then on; one that reads
    another later adds that to it, too.
    """

    room: int
    mask: Tensor | None = None  # the attention_mask of the batch at hand
    moments: dict[int, Moment] = field(default_factory=dict)  # by the layer's module
    waiting: set[int] = field(default_factory=set)
    _first: list[Moment] = field(default_factory=list)

    def read(self, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x = input_of(given, named)
        if not isinstance(x, Tensor) or id(module) in self.waiting:
            return
        moment = self.moments.get(id(module)) or self._moment(x)
        if moment is None:
            self.waiting.add(id(module))
            return
        self.moments[id(module)] = moment
        moment.add(x, self.mask)

    def _moment(self, x: Tensor) -> Moment | None:
        """That of a layer beside this one, a new one, or none."""
        live = (m for m in self._first if m.seen is not None and m.seen() is x)
        moment = next((m for m in live if m.at == version(x)), None)
        size = 4 * x.shape[-1] ** 2
        if moment is None and (size <= self.room or not self._first):
            self.room -= size
            total = torch.zeros(2 * x.shape[-1:], dtype=torch.float32, device=x.device)
            moment = Moment(total)
            self._first.append(moment)
        return moment


def moments_of(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batches: Iterable[Any],
    show: Tell,
    room: int | None = None,
) -> Iterator[tuple[LinearLayer, Moment]]:
    """The layers that the batches reach, each with the moment of what it read.

    Moments of at most ``room`` bytes are held at a time, by default 1 GiB or, where that is more,
    half the bytes of the layers' weights: where that is too little for all layers, the model runs
    over the batches again for those that are left. It is in evaluation mode meanwhile, without
    gradients and compiled code; its modes and the random states are put back, the hooks removed.

    Raises:
        FalqonError: no batch, one that the model can't take, NaN or Inf in what a layer reads, no
            layer that was reached, or layers that are cut over processes.
    """
    for layer in layers:
        if is_dtensor(layer.module.weight):
            raise FalqonError(
                layer.site,
                "its base weight is cut over processes, and its cast error is one of all of it",
                "Calibrate in one process, and leave the layer whole",
            )
    if room is None:
        room = max(_LEAST_ROOM, sum(layer.weight.nbytes for layer in layers) // 2)
    if sum(4 * layer.weight.shape[1] ** 2 for layer in layers) > room:
        batches = lasting(batches)
    waiting, number = list(layers), 0
    while waiting:
        number += 1
        reader = _Reader(room)
        _pass(model, waiting, batches, reader, show, number)
        reached = [layer for layer in waiting if id(layer.module) in reader.moments]
        waiting = [layer for layer in waiting if id(layer.module) in reader.waiting]
        _add_up(reached, waiting, reader.moments)
        _check(reached, reader.moments)
        reader._first.clear()
        for layer in reached:
            yield layer, reader.moments.pop(id(layer.module))


def _pass(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batches: Iterable[Any],
    reader: _Reader,
    show: Tell,
    number: int,
) -> None:
    """Run the model over all batches once."""
    count = 0
    with quietly(model), _reading(layers, reader):
        for batch in batches_of(batches):
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            reader.mask = mask if isinstance(mask, Tensor) else None
            run_batch(model, batch, count)
            count += 1
            tokens = max((m.tokens for m in reader.moments.values()), default=0)
            again = f", pass {number}" if number > 1 else ""
            show(f"{count} batches, {tokens} tokens{again}")
    if not count:
        raise FalqonError("calibration", "there is no batch in it", FORM)
    if not reader.moments:
        raise FalqonError("calibration", "no layer to be cast was reached by its batches", FORM)


@contextmanager
def _reading(layers: Sequence[LinearLayer], reader: _Reader) -> Iterator[None]:
    hooks = [
        layer.module.register_forward_pre_hook(reader.read, with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_up(
    reached: Sequence[LinearLayer], waiting: Sequence[LinearLayer], moments: dict[int, Moment]
) -> None:
    """Give all processes the sums, since each has read batches of its own.

    Raises:
        FalqonError: other layers were reached in another process, or it has raised.
    """
    if not has_others():
        return
    each = {id(moments[id(layer.module)]): moments[id(layer.module)] for layer in reached}
    order = {key: i for i, key in enumerate(each)}
    texts = [
        f"{layer.site} reads input {order[id(moments[id(layer.module)])]}" for layer in reached
    ]
    texts += [f"{layer.site} waits" for layer in waiting]
    check_same_on_all_ranks("\n".join(texts))
    for moment in each.values():
        count = torch.tensor(moment.tokens, dtype=torch.int64, device=moment.total.device)
        for tensor in (moment.total, count):
            dist.all_reduce(tensor)
        moment.tokens = int(count)


def _check(reached: Sequence[LinearLayer], moments: dict[int, Moment]) -> None:
    for layer in reached:
        if not math.isfinite(float(moments[id(layer.module)].total.sum())):
            raise FalqonError(
                layer.site,
                "what it reads in the calibration holds NaN or Inf, or squares beyond float32",
                "Look at the batches, or at the layers before it: their results are no numbers",
            )
