"""One pass of a model over its inputs, before its layers are cast: what each layer reads."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress, SpinnerColumn, TextColumn
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor, version
from falqon_fx.errors import FalqonError
from falqon_fx.model.agreement import check_same_on_all_ranks
from falqon_fx.model.lora_layers import LinearLayer
from falqon_fx.report.compiling import EVERY, say
from falqon_fx.site.base import Base
from falqon_fx.site.compensate import error_factors, heaviest_channels

DEFAULT = 16  # ranks and channels, where a calibration is given and they are not
_BATCHES = (
    "Give batches of this model's inputs: a dict is passed as keyword arguments, a tuple or list "
    "as positional ones, a tensor as the only one"
)


@dataclass(eq=False)
class Moment:
    """Σ x · xᵀ [in, in] over the ``tokens`` that a layer read, float32; layers that read one tensor
    share it.
    """

    total: Tensor
    tokens: int = 0
    seen: weakref.ref[Tensor] | None = None  # what was added last, and its version
    at: int = 0

    def add(self, x: Tensor) -> None:
        if self.seen is not None and self.seen() is x and self.at == version(x):
            return  # by a layer beside this one
        flat = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.total.addmm_(flat.t(), flat)
        self.tokens += flat.shape[0]
        self.seen, self.at = weakref.ref(x), version(x)

    @property
    def mean(self) -> Tensor:
        """E[x · xᵀ]."""
        return self.total / self.tokens


@dataclass
class _Reader:
    """Adds up what the layers read. Those that read one tensor in the first batch share a moment
    from then on; one that reads another later adds that to it, too.
    """

    moments: dict[int, Moment] = field(default_factory=dict)  # by the layer's module
    _first: list[Moment] = field(default_factory=list)

    def read(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0] if given else None
        if not isinstance(x, Tensor):
            return
        moment = self.moments.get(id(module))
        if moment is None:
            live = (m for m in self._first if m.seen is not None and m.seen() is x)
            moment = next((m for m in live if m.at == version(x)), None)
            if moment is None:
                moment = Moment(torch.zeros(2 * x.shape[-1:], device=x.device))
                self._first.append(moment)
            self.moments[id(module)] = moment
        moment.add(x)


def read_batches(
    model: nn.Module, layers: Sequence[LinearLayer], batches: Iterable[Any], progress: bool
) -> dict[int, Moment]:
    """The moments of what ``layers`` read as the model runs over all batches, by their modules.

    The model is in evaluation mode meanwhile, without gradients and compiled code; its modes and
    the random states are put back, the hooks removed. Layers that nothing came to have no moment.

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
    reader, count = _Reader(), 0
    with quietly(model), _reading(layers, reader), _shown(progress) as show:
        for batch in batches_of(batches):
            run_batch(model, batch, count)
            count += 1
            show(count, max((m.tokens for m in reader.moments.values()), default=0))
    if not count:
        raise FalqonError("calibration", "there is no batch in it", _BATCHES)
    if not reader.moments:
        raise FalqonError("calibration", "no layer to be cast was reached by its batches", _BATCHES)
    _add_up(layers, reader.moments)
    _check(layers, reader.moments)
    return reader.moments


def check_any(layers: Sequence[LinearLayer]) -> None:
    """Raise where there is nothing to calibrate."""
    if not layers:
        raise FalqonError(
            "calibration",
            "the model has no layer that is to be cast: its base weights are gone, or left out",
            "Calibrate a model that has its base weights, before or with prepare",
        )


@contextmanager
def _reading(layers: Sequence[LinearLayer], reader: _Reader) -> Iterator[None]:
    hooks = [layer.module.register_forward_pre_hook(reader.read) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def quietly(model: nn.Module, *, grad: bool = False) -> Iterator[None]:
    """The model in evaluation mode, without compiled code; its modes and the random states are put
    back.
    """
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    model.eval()
    try:
        with (
            torch.set_grad_enabled(grad),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _shown(show: bool) -> Iterator[Any]:
    """What tells of batches and tokens: on a terminal as they come, in a log now and then."""
    last = time.perf_counter()
    text = "calibrating: {} batches, {} tokens"
    columns = SpinnerColumn(), TextColumn("{task.description}")
    with Progress(*columns, disable=not show, transient=True) as bar:
        task = bar.add_task("calibrating")

        def tell(batches: int, tokens: int) -> None:
            nonlocal last
            bar.update(task, description=text.format(batches, tokens))
            if show and not bar.console.is_terminal and time.perf_counter() - last > EVERY:
                last = time.perf_counter()
                say(f"falqon: {text.format(batches, tokens)}")

        yield tell


def batches_of(batches: Iterable[Any]) -> Iterator[Any]:
    """Each batch.

    Raises:
        FalqonError: there can't be any.
    """
    try:
        each = iter(batches)
    except TypeError as error:
        raise FalqonError("calibration", f"{batches!r} is not iterable", _BATCHES) from error
    yield from each


def run_batch(model: nn.Module, batch: Any, number: int) -> Any:
    """What the model makes of a batch.

    Raises:
        FalqonError: it can't run it.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        kwargs = {str(name): there(value) for name, value in batch.items()}
    elif isinstance(batch, Tensor):
        args = [there(batch)]
    elif isinstance(batch, tuple | list):
        args = [there(value) for value in batch]
    else:
        kind = type(batch).__name__
        raise FalqonError("calibration", f"its batch {number} is a {kind}", _BATCHES)
    try:
        return model(*args, **kwargs)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        problem = f"the model can't run its batch {number} ({type(e).__name__}: {e})"
        raise FalqonError("calibration", problem, _BATCHES) from e


def _add_up(layers: Sequence[LinearLayer], moments: dict[int, Moment]) -> None:
    """Of several processes each has read batches of its own: all get the sums.

    Raises:
        FalqonError: other layers were reached in another process, or it has raised.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    reached = [layer for layer in layers if id(layer.module) in moments]
    each = {id(moments[id(layer.module)]): moments[id(layer.module)] for layer in reached}
    order = {key: i for i, key in enumerate(each)}
    texts = [
        f"{layer.site} reads input {order[id(moments[id(layer.module)])]}" for layer in reached
    ]
    check_same_on_all_ranks("\n".join(texts))
    for moment in each.values():
        count = torch.tensor(float(moment.tokens), device=moment.total.device)
        for tensor in (moment.total, count):
            dist.all_reduce(tensor)
        moment.tokens = int(count)


def _check(layers: Sequence[LinearLayer], moments: Mapping[int, Moment]) -> None:
    for layer in layers:
        moment = moments.get(id(layer.module))
        if moment is not None and not math.isfinite(float(moment.total.sum())):
            raise FalqonError(
                layer.site,
                "what it reads in the calibration holds NaN or Inf, or squares beyond float32",
                "Look at the batches, or at the layers before it: their results are no numbers",
            )


@dataclass
class Calibration:
    """What is to be bought back of the casts, and with what: ``ranks`` of W's error, ``channels``
    of x's. Without batches nothing.

    Attributes:
        tokens: how many were read.
        left: by layer, see `falqon_fx.model.prepare_report.PrepareReport`.
    """

    batches: Iterable[Any] | None = None
    ranks: int = 0
    channels: int = 0
    tokens: int = 0
    left: dict[str, float] = field(default_factory=dict)
    _moments: dict[int, Moment] = field(default_factory=dict)

    @classmethod
    def asked(
        cls, batches: Iterable[Any] | None, compensate: int | None, outliers: int | None
    ) -> Calibration:
        """What the arguments of `prepare` ask for.

        Raises:
            FalqonError: they say nothing together.
        """
        for name, value in (("compensate", compensate), ("outliers", outliers)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise FalqonError(name, f"{value!r} is no number of them", "Give 0 or more")
            if value and batches is None:
                raise FalqonError(
                    name,
                    "it is chosen by what the layers read, and there is no calibration",
                    f"Call prepare(model, calibration=batches, {name}={value})",
                )
        if batches is None:
            return cls()
        ranks, channels = (DEFAULT if n is None else n for n in (compensate, outliers))
        if not (ranks or channels):
            raise FalqonError(
                "calibration",
                "it is for nothing: compensate=0, outliers=0",
                "Leave it out, or ask for one of them",
            )
        return cls(batches, ranks, channels)

    def refuse(self, problem: str) -> None:
        """Raise where anything is asked for that there can't be."""
        if self.batches is not None:
            raise FalqonError("calibration", problem, "Leave it out")

    def read(self, model: nn.Module, layers: Sequence[LinearLayer], progress: bool) -> None:
        """Run the model over the batches; nothing without any.

        Raises:
            FalqonError: see `read_batches`; more ranks or channels than a layer has.
        """
        if self.batches is None:
            return
        check_any(layers)
        self._check_sizes(layers)
        self._moments = read_batches(model, layers, self.batches, progress)
        self.tokens = max(moment.tokens for moment in self._moments.values())

    def _check_sizes(self, layers: Sequence[LinearLayer]) -> None:
        for layer in layers:
            out, features = layer.weight.shape
            for name, count, most in (
                ("compensate", self.ranks, min(out, features)),
                ("outliers", self.channels, features),
            ):
                if count > most:
                    raise FalqonError(
                        layer.site,
                        f"it is {out} x {features}, so {name}={count} is more than it has",
                        f"Set {name}={most} or less, or leave the layer out with exclude=",
                    )

    @torch.no_grad()
    def buy(self, layer: LinearLayer, base: Base) -> dict[str, Tensor]:
        """The terms of a layer whose W [out, in] was cast to ``base``, see `Fp8Linear`; none where
        nothing came to it, or zeros alone.
        """
        moment = self._moments.pop(id(layer.module), None)
        if moment is None or not float(moment.total.diagonal().sum()) > 0:
            return {}
        weight, mean, left = layer.weight.detach(), moment.mean, 1.0
        terms: dict[str, Tensor] = {}
        if self.ranks:
            error = weight.to(torch.float32) - base.dequantize()
            factors = error_factors(error, mean, self.ranks)
            left = factors.left
            terms |= {"error_a": factors.a, "error_b": factors.b}
        if self.channels:
            channels = heaviest_channels(mean, weight, self.channels)
            terms |= {"channels": channels, "columns": weight[:, channels]}
        self.left[layer.site] = left
        floats = {name: term.to(torch.bfloat16) for name, term in terms.items()}
        return {**floats, **({"channels": terms["channels"]} if self.channels else {})}
