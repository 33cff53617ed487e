"""The layer that `prepare` makes with update="rows"."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from falqon_fx._compat import is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.model.prepared_linear import PreparedLinear, autocast
from falqon_fx.rows import drift, ops
from falqon_fx.rows.state import STATE, MergedAdapter
from falqon_fx.site.spec import parse_rows_spec

_layers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # weak references to layers, by their bytes


def layer_of(code: Tensor) -> MergedBaseLinear | None:
    """The prepared layer with these bytes, which its graph knows."""
    found: weakref.ref[MergedBaseLinear] | None = _layers.get(code)
    return None if found is None else found()


class MergedBaseLinear(PreparedLinear):
    """The base layer of a prepared site. Run eagerly, it is the base layer alone: merged minus
    applied.
    """

    STATE = STATE

    applied: nn.Parameter
    counters: nn.Parameter
    writes: nn.Parameter
    origin: nn.Parameter

    def __init__(
        self,
        state: MergedAdapter,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool,
        path: str,
    ) -> None:
        super().__init__()
        self.path = path  # of its LoRA layer, for errors
        for name, tensor in state.stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = bias
        self.scaling, self.spec_text, self.dtype = state.scaling, str(state.spec), dtype
        self.transposed = transposed  # whether the base layer stored its weight [in, out]
        self.out_features, self.rank = state.applied.shape
        self.in_features = state.code.shape[1]
        self._calls, self._drifted = 0, False
        self._announce()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = ops.rows_base_linear(
            autocast(x),
            self.code,
            self.scale,
            self.applied,
            self.counters,
            self.writes,
            self.bias,
            self.scaling,
            self.spec_text,
        )
        return result

    def dequantized(self) -> Tensor:
        return self.merged().base().to(self.dtype)

    def merged(self) -> MergedAdapter:
        """The state as a `MergedAdapter` (without its B).

        Raises:
            FalqonError: other processes hold parts of it.
        """
        if is_dtensor(self.code):
            problem = 'it is sharded, and update="rows" writes into whole FP8 weights'
            raise FalqonError(self.path, problem, 'Train with update="adapter"')
        code, scale, applied, counters, writes, origin = (getattr(self, n).detach() for n in STATE)
        spec = parse_rows_spec(self.spec_text)
        return MergedAdapter(code, scale, applied, counters, writes, origin, self.scaling, spec)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._announce()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._announce()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._announce()

    def _announce(self) -> None:
        _layers[self.code] = weakref.ref(self)

    def has_drifted(self) -> bool:
        """Whether the FP8 weight has just passed the limit of `falqon_fx.rows.drift`; asked in each
        training call. Errors add up like the root of the number of writes, so it looks ever more
        rarely: in call 128, 256, 512, ...
        """
        self._calls += 1
        if self._drifted or self._calls < 128 or self._calls & (self._calls - 1):
            return False
        found = self.merged().drift()
        self._drifted = found is not None and found > drift.LIMIT
        return self._drifted

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}, {self.spec_text}"
        )
