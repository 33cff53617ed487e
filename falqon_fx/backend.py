"""The backend: passes → inner compiler → the callable that brings each site's state along.

torch.compile(model, backend="falqon")  ──▶  falqon(gm, example_inputs)
    rewrite    normalize → match → plan → autotune → rewrite → insert updates → verify
    compile    inductor (falqon ops opened below autograd), aot_eager or eager
    per call   look up the state of each (W, A, B) → run → look at the NaN counters
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from falqon_fx import _compat, serving
from falqon_fx.aliases import aliases
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError, SiteError
from falqon_fx.merged import STATE, Wanted, registry
from falqon_fx.naming import Names
from falqon_fx.nonfinite import NonfiniteWatch
from falqon_fx.numerics import as_e4m3
from falqon_fx.ops import decompositions
from falqon_fx.passes.autotune import autotune
from falqon_fx.passes.insert_updates import insert_updates
from falqon_fx.passes.match import match
from falqon_fx.passes.normalize import Scope, attribute, normalize, value_of
from falqon_fx.passes.plan import Plan, plan
from falqon_fx.passes.recompute_weights import recompute_weights
from falqon_fx.passes.rewrite import SlotNodes
from falqon_fx.passes.rewrite import rewrite as rewrite_sites
from falqon_fx.passes.verify import operations, verify, wiring
from falqon_fx.passlog import PassLog
from falqon_fx.report import GraphReport, RewriteReport
from falqon_fx.spec import lowering_version


def falqon(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="falqon", options={...})``.

    Raises:
        FalqonError: a bad option, or a site that can't be trained rightly; the message names the
            site and the remedy.
    """
    config = FalqonConfig.from_options({"mode": mode, **(options or {})} if mode else options)
    result = rewrite(gm, example_inputs, config)
    _warn(result.report.graphs[0], gm, example_inputs)
    compiled = _compile(result, example_inputs, config)
    if not result.slots:
        return compiled

    watch = NonfiniteWatch([nodes.slot.path for nodes in result.slots])

    def run(*args: Any) -> Any:
        if any(_compat.is_fake(value) for value in args):  # DDP's optimizer asks for shapes
            return compiled(*result.fake_inputs(args))
        watch.look()
        with result.naming_sites(args):
            inputs = result.bind(args)
            output = compiled(*inputs.all)
        watch.remember(inputs.counters)
        return output

    return run


@dataclass(frozen=True)
class RewriteResult:
    """A rewritten graph.

    ``gm`` takes the inputs of the original graph (flat, where that is a pytree, as in export), then
    the state of the unprepared sites. Calling the result looks that state up by the parameters
    among the arguments and runs ``gm``; it takes and returns what the original graph does.
    """

    gm: fx.GraphModule
    report: RewriteReport
    slots: tuple[SlotNodes, ...]
    config: FalqonConfig
    original: fx.Graph

    def __call__(self, *args: Any) -> Any:
        flat = self.original.process_inputs(*args)
        with self.naming_sites(flat):
            output = self.gm(*self.bind(flat).all)
        return self.original.process_outputs(output)

    @contextmanager
    def naming_sites(self, args: Sequence[Any]) -> Iterator[None]:
        """Errors within, in a call with flat ``args``, get the path of their site."""
        try:
            yield
        except FalqonError as error:
            site = error.site
            if isinstance(error, SiteError):
                site = self.slots[error.index].slot.path
            path = Names.of_call().paths(self.original, args).get(site, site)
            raise FalqonError(path, error.problem, error.remedy) from error

    def bind(self, args: Sequence[Any]) -> Inputs:
        """The inputs of ``gm`` that belong to flat ``args``; state is made where there is none yet.

        Raises:
            FalqonError: a site's parameters can't be merged (NaN, Inf, beyond FP8).
        """
        everything, counters = list(args), []
        states = iter(registry.get([*self._wanted(args)], self.config))
        for nodes in self.slots:
            lora_b = self._value(nodes.lora_b, args)
            if nodes.base is not None:
                given = aliases.give(lora_b, next(states).tensors)
                everything.extend(given)
            else:
                places = [self._places[node] for node in nodes.state]
                given = aliases.give(lora_b, [args[i] for i in places])
                for i, tensor in zip(places, given, strict=True):
                    everything[i] = tensor
            counters.append(given[STATE.index("counters")])
        return Inputs(everything, counters)

    def fake_inputs(self, example_inputs: Sequence[Any]) -> list[Any]:
        """What to compile ``gm`` for: the example inputs with stand-ins for the state."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        mode = _compat.fake_mode_of([value_of(node) for node in placeholders])
        shapes = [node.meta["falqon_shape"] for node in placeholders if "falqon_shape" in node.meta]
        with mode:
            inputs = [*example_inputs, *(torch.empty(s, dtype=d, device=v) for s, d, v in shapes)]
        for nodes in self.slots:
            if nodes.base is None:  # a prepared module holds bytes, the graph gets E4M3
                # Of the fake bytes, whose sizes Dynamo fixed: AOTAutograd would give new symbols to
                # the sizes of a real tensor that it meets for the first time.
                code = nodes.state[0]
                inputs[self._places[code]] = as_e4m3(value_of(code).detach())
        return inputs

    def _wanted(self, args: Sequence[Any]) -> Iterator[Wanted]:
        for nodes in self.slots:
            if nodes.base is not None:
                base, lora_a, lora_b = (
                    self._value(node, args) for node in (nodes.base, nodes.lora_a, nodes.lora_b)
                )
                slot = nodes.slot
                assert slot.base is not None
                flip = slot.base.transposed
                yield Wanted(slot.path, base, lora_a, lora_b, slot.scaling, flip)

    def _value(self, node: fx.Node, args: Sequence[Any]) -> Tensor:
        if node.op == "placeholder":
            value = args[self._places[node]]
        else:
            value = attribute(self.gm, str(node.target))
        assert isinstance(value, Tensor)
        return value

    @functools.cached_property
    def _places(self) -> dict[fx.Node, int]:
        return {n: i for i, n in enumerate(self.gm.graph.find_nodes(op="placeholder"))}


@dataclass(frozen=True)
class Inputs:
    """What one call hands to the graph, and the counters of its sites."""

    all: list[Any]
    counters: list[Tensor]


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: FalqonConfig | None = None
) -> RewriteResult:
    """The passes alone, on any torch-level graph: from Dynamo, ``symbolic_trace`` or export.

    Leaves ``gm`` as it is.

    Raises:
        FalqonError: a site that can't be trained rightly as asked.
    """
    config = config or FalqonConfig()
    clock = PassLog()
    with clock("copy"):
        copy = clock.gm = _copy(gm)
    with clock("normalize"):
        root: Scope = normalize(copy, gm.graph.process_inputs(*example_inputs))
        before = wiring(root)
    with clock("match"):
        matches, rejected = match(root)
    with clock("plan"):
        chosen: Plan = plan(root, matches, rejected, config)
    for site in chosen.sites:
        serving.announce(site.report.out_features, site.report.in_features, site.report.path)
    with clock("autotune"):
        chosen = autotune(chosen)
    with clock("rewrite"):
        slots = rewrite_sites(chosen)
    with clock("insert_updates"):
        insert_updates(chosen, slots)
    with clock("verify"):
        after = verify(chosen, slots, before)
    graph = GraphReport(
        sites=tuple(site.report for site in chosen.sites),
        rejected=chosen.rejected,
        nodes_before=len(operations(before)),
        nodes_after=len(operations(after)),
        pass_seconds=clock.seconds,
    )
    report = RewriteReport((graph,))
    clock.finish(report)
    return RewriteResult(copy, report, slots, config, gm.graph)


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Dynamo goes on using the graph it gave us, so the passes edit a copy."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping, return_output_node=True)
    assert output is not None
    value, old_output = cast(tuple[Any, fx.Node], output)
    node = graph.output(value, getattr(old_output, "type", None))
    node.meta.update(old_output.meta)
    copy = fx.GraphModule(gm, graph)
    copy.meta.update(gm.meta)
    _compat.copy_dynamo_attributes(gm, copy)
    for _, name, body in list(_compat.checkpoint_bodies(copy)):
        setattr(copy, name, _copy(body))
    return copy


def _compile(
    result: RewriteResult, example_inputs: Sequence[Any], config: FalqonConfig
) -> Callable[..., Any]:
    inputs = result.fake_inputs(example_inputs)
    if config.inner == "eager":
        return _compat.recompute_eagerly(result.gm)
    if config.inner == "aot_eager":
        return _compat.aot_eager_compile(result.gm, inputs)
    return _compat.inductor_compile(
        result.gm,
        inputs,
        config.inductor,
        config.mode,
        decompositions(),
        recompute_weights,
        lowering_version(),
    )


def _warn(graph: GraphReport, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    if graph.rejected or any(site.dropout > 0 for site in graph.sites):
        graph = Names.of_call().report(graph, gm.graph, inputs)
    dropped = [site for site in graph.sites if site.dropout > 0]
    if dropped:
        _warn_once(
            f"falqon: adapter dropout p={dropped[0].dropout:g} is ignored at {len(dropped)} sites "
            f'(first: {dropped[0].path}): a merged weight has none. Set dropout="reject" to leave '
            "such sites alone."
        )
    for item in graph.rejected:
        _warn_once(f"falqon: left as it was: {item}")
    if not graph.sites and not graph.rejected and len(gm.graph.nodes) > 0:
        _warn_once(
            "falqon: no LoRA layer in a compiled graph; it runs as with the inner compiler alone. "
            "See falqon_fx.explain."
        )


@functools.cache
def _warn_once(text: str) -> None:
    """Python's own "once" forgets whenever someone uses `warnings.catch_warnings`, as torch does in
    each compilation.
    """
    warnings.warn(text, stacklevel=4)


falqon.reset = _warn_once.cache_clear  # type: ignore[attr-defined] # torch._dynamo.reset() calls it


__all__ = ["FalqonError", "RewriteResult", "falqon", "rewrite"]
