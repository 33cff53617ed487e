"""What happens around each call of a graph with update="rows": its state is looked up and handed in
under aliases, and the counters of NaN are looked at afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from falqon_fx.config import FalqonConfig
from falqon_fx.rows import drift
from falqon_fx.rows.aliases import aliases
from falqon_fx.rows.counter_watch import CounterWatch
from falqon_fx.rows.dropped import save_watch
from falqon_fx.rows.prepared import layer_of
from falqon_fx.rows.state import IN_GRAPH, SiteParameters, registry
from falqon_fx.rows.update import lock
from falqon_fx.site.numerics import as_operand

if TYPE_CHECKING:
    from falqon_fx.passes.rows import RowsNodes

Value = Callable[[fx.Node], Tensor]
_APPLIED, _COUNTERS = IN_GRAPH.index("applied"), IN_GRAPH.index("counters")


class RowsBinding:
    """Looks up the state of one graph: ``nodes`` of its slots, ``places`` of its placeholders."""

    def __init__(
        self, nodes: Sequence[RowsNodes], config: FalqonConfig, places: Mapping[fx.Node, int]
    ) -> None:
        self._nodes, self._config, self._places = nodes, config, places
        self._watch = CounterWatch([n.slot.path for n in nodes])
        self._call = threading.local()  # counters, A and B of the call that is under way

    @contextmanager
    def call(self) -> Iterator[None]:
        """One call of the graph, from `bind` to its end.

        With pending="drop" calls take turns: the graph zeroes B behind the update, and a thread in
        between would write the same step again.
        """
        if not self._nodes:
            yield
            return
        drops = self._config.pending == "drop"
        with lock if drops else nullcontext():
            yield
            for lora_a, lora_b in self._call.adapters if drops else ():
                aliases.settle(lora_a, lora_b)
        with lock:
            self._watch.copy_counters(self._call.counters)

    def bind(self, inputs: list[Any], value: Value) -> list[Any]:
        """``inputs`` with the state of each slot; state is made where there is none yet.

        Raises:
            FalqonError: a site's parameters can't be merged (NaN, Inf, beyond FP8).
        """
        if not self._nodes:
            return inputs
        with lock:
            self._watch.check()
            given = [*self._give(inputs, value)]
            self._call.counters = [state[_COUNTERS] for state in given]
            self._call.adapters = [(value(n.lora_a), value(n.lora_b)) for n in self._nodes]
            if self._config.pending == "drop":
                each = zip(self._call.adapters, given, strict=True)
                save_watch.announce((b, state[_APPLIED]) for (_, b), state in each)
        if torch.is_grad_enabled():
            self._look_at_drift(value)
        return inputs

    def _give(self, inputs: list[Any], value: Value) -> Iterator[list[Tensor]]:
        """Put aliases of each slot's state among the inputs; the memory that they are of."""
        states = iter(registry.get([*self._wanted(value)], self._config))
        for nodes in self._nodes:
            lora_a, lora_b = value(nodes.lora_a), value(nodes.lora_b)
            if nodes.base is not None:
                state = [*next(states).tensors]
                inputs.extend(aliases.detached_views(lora_a, lora_b, state))
            else:
                places = [self._places[node] for node in nodes.state]
                state = [inputs[i] for i in places]
                given = aliases.detached_views(lora_a, lora_b, state)
                for i, tensor in zip(places, given, strict=True):
                    inputs[i] = tensor
            yield state

    def _look_at_drift(self, value: Value) -> None:
        prepared = [nodes for nodes in self._nodes if nodes.base is None]
        layers = [layer_of(value(nodes.state[0])) for nodes in prepared]
        passed = [layer.path for layer in layers if layer is not None and layer.has_drifted()]
        if passed:
            drift.warn(passed)

    def fake_inputs(self, inputs: list[Any]) -> list[Any]:
        """A prepared module holds bytes, the graph gets E4M3."""
        for nodes in self._nodes:
            if nodes.base is None:
                # Of the fake bytes, whose sizes Dynamo fixed: AOTAutograd would give new symbols to
                # the sizes of a real tensor that it meets for the first time.
                place = self._places[nodes.state[0]]
                meta = nodes.state[0].meta
                known: Tensor = meta["example_value" if "example_value" in meta else "val"]
                inputs[place] = as_operand(known.detach())
        return inputs

    def _wanted(self, value: Value) -> Iterator[SiteParameters]:
        for nodes in self._nodes:
            if nodes.base is not None:
                base, lora_a, lora_b = map(value, (nodes.base, nodes.lora_a, nodes.lora_b))
                slot = nodes.slot
                assert slot.base is not None
                yield SiteParameters(
                    slot.path, base, lora_a, lora_b, slot.scaling, slot.base.transposed
                )
