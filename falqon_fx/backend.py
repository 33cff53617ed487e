"""The backend: passes → inner compiler → the callable that brings each site's FP8 base along.

torch.compile(model, backend="falqon")  ──▶  falqon(gm, example_inputs)
    rewrite    the passes, in the order of `falqon_fx.passes.pipeline`
    compile    inductor (on a GPU with falqon ops opened below autograd), aot_eager or eager
    per call   look up the FP8 base of each W → run
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from falqon_fx import _compat, compile_warnings
from falqon_fx._compat import value_of
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError, SiteError
from falqon_fx.ops.base_linear import OP as BASE_LINEAR
from falqon_fx.ops.decompositions import decompositions
from falqon_fx.ops.fp8_adapter import clamped
from falqon_fx.passes import pipeline
from falqon_fx.passes.add_in_place import add_in_place
from falqon_fx.passes.call_plan import CallPlan
from falqon_fx.passes.insert_operands import BaseNodes, Operands
from falqon_fx.passes.recompute_weights import recompute_weights
from falqon_fx.passes.verify import operations
from falqon_fx.passes.work import Work
from falqon_fx.report import compiling
from falqon_fx.report.data import GraphReport
from falqon_fx.report.passlog import PassLog
from falqon_fx.report.paths import ModulePaths
from falqon_fx.report.report import RewriteReport
from falqon_fx.rows.binding import RowsBinding
from falqon_fx.site import transposed
from falqon_fx.site.agreement import agree_once, check_options, groups_of
from falqon_fx.site.agreement import reset as forget_agreements
from falqon_fx.site.base import Base, BaseParameter, CastOfAdapter, Entry, bases
from falqon_fx.site.clamped import Looks
from falqon_fx.site.found import FoundByAddress, Parameters
from falqon_fx.site.numerics import E4M3, as_scale
from falqon_fx.site.shards import LocalParameter, with_local
from falqon_fx.site.spec import SiteSpec, lowering_version
from falqon_fx.site.svd import init_where_new


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
    _check_processes(gm, config)
    paths = ModulePaths.from_call_stack() if config.include or config.exclude else None
    result = rewrite(gm, example_inputs, config, tune=True, paths=paths)
    compile_warnings.warn(result.report.graphs[0], gm, example_inputs)
    with compiling.told(result.report.graphs[0], _compat.compile_number()):
        compiled = _compile(result, example_inputs, config)
    if not result.report.sites:
        return compile_warnings.looking_for_lora(compiled, gm, example_inputs)

    def run(*args: Any) -> Any:
        if _compat.any_fake(args):  # DDP's optimizer asks for shapes
            return compiled(*result.fake_inputs(args))
        with result.naming_sites(args), result.rows.call():
            inputs = result.bind(args)
            output = compiled(*inputs)
        return output

    return compile_warnings.looking_for_lora(run, gm, example_inputs)


def _check_processes(gm: fx.GraphModule, config: FalqonConfig) -> None:
    """The processes that hold parts of one model are asked for the same.

    Raises:
        FalqonError: they are not; on each of them.
    """
    values = [value_of(node) for node in gm.graph.find_nodes(op="placeholder")]
    parameters = [v for v in values if isinstance(v, torch.nn.Parameter)]
    groups = groups_of(parameters)
    if not groups:
        return
    check_options("the model", config)
    prepared = any(node.target in (BASE_LINEAR, BASE_LINEAR.default) for node in gm.graph.nodes)
    said = {**config.texts(), "prepared": str(prepared), "lowering": lowering_version()}
    for group in groups:
        agree_once(group, said)


@dataclass(frozen=True)
class RewriteResult:
    """A rewritten graph.

    ``gm`` takes the inputs of the original graph (flat, where that is a pytree, as in export), then
    the FP8 bases of its sites. Calling the result looks these up by the parameters among the
    arguments and runs ``gm``; it takes and returns what the original graph does.
    """

    gm: fx.GraphModule
    report: RewriteReport
    operands: Operands
    config: FalqonConfig
    original: fx.Graph
    local: tuple[LocalParameter, ...] = ()

    def __call__(self, *args: Any) -> Any:
        flat = self.original.process_inputs(*args)
        with self.naming_sites(flat), self.rows.call():
            output = self.gm(*self.bind(flat))
        return self.original.process_outputs(output)

    @contextmanager
    def naming_sites(self, args: Sequence[Any]) -> Iterator[None]:
        """Errors within, in a call with flat ``args``, get the path of their site."""
        try:
            yield
        except FalqonError as error:
            site = error.site
            if isinstance(error, SiteError):
                site = self.operands.rows[error.index].slot.path
            path = ModulePaths.from_call_stack().paths(self.original, args).get(site, site)
            raise FalqonError(path, error.problem, error.remedy) from error

    def bind(self, args: Sequence[Any]) -> list[Any]:
        """The inputs of ``gm`` that belong to flat ``args``: the FP8 bases are made where there are
        none yet, and read where `prepare` made them.

        Raises:
            FalqonError: a base weight can't be cast (NaN, Inf, beyond FP8).
        """
        if self.local:
            args = with_local(args, self.local)
        values = self._plan.values(self.gm, args)
        given = self._plan.parameters(values)
        entries = None if self._gathered else self._found.get(given)
        if entries is None:
            entries = self._look_up(values, given)
        inputs, scales = [*args], iter(given.scales)
        by_row, in_fp8 = self._spec.base_per_row, self._spec.base == "fp8"
        counts, weights = list[tuple[Entry, str]](), list[Tensor]()
        for entry, code, nodes in zip(entries, given.owners, self.operands.bases, strict=True):
            if entry.base is None:
                scale = next(scales).view(torch.float32)  # as_scale, without a call a site
                code = code.view(E4M3) if in_fp8 else code  # as `site.forms.operand_of` has it
                inputs += (code, scale if by_row else scale.reshape(()))
                weights.append(code)
            else:
                inputs += (entry.base.weight, entry.base.scale)
                weights.append(entry.base.weight)
            if nodes.clamped is not None:
                inputs.append(entry.clamped.count)
                counts.append((entry, nodes.slot.path))
        for slot, places, held in self._plan.copies:
            make = functools.partial(slot.make, [weights[i] for i in places])
            of = [entries[i] for i in places]
            inputs.append(transposed.together(of, slot.name, slot.shape, make, held))
        if counts and self._looks.due(counts[-1][0].clamped.count):
            for entry, path in counts:
                entry.clamped.look(path)
        return self.rows.bind(inputs, functools.partial(self._plan.value, values=values))

    def fake_inputs(self, example_inputs: Sequence[Any]) -> list[Any]:
        """What to compile ``gm`` for: the example inputs with stand-ins for the bases."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        mode = _compat.fake_mode_of([value_of(node) for node in placeholders])
        example_inputs = list(example_inputs)
        for parameter in self.local:
            example_inputs[parameter.place] = value_of(placeholders[parameter.place])
        shapes = [node.meta["falqon_shape"] for node in placeholders if "falqon_shape" in node.meta]
        with mode:
            inputs = [*example_inputs, *(torch.empty(s, dtype=d, device=v) for s, d, v in shapes)]
        return self.rows.fake_inputs(inputs)

    @functools.cached_property
    def rows(self) -> RowsBinding:
        """What update="rows" does around each call; nothing without it."""
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        places = {node: place for place, node in enumerate(placeholders)}
        return RowsBinding(self.operands.rows, self.config, places)

    @functools.cached_property
    def _spec(self) -> SiteSpec:
        return SiteSpec.from_config(self.config)

    def _look_up(self, values: Sequence[Any], given: Parameters) -> list[Entry]:
        """The entry of each base, from the registry: the next call like this one finds it again."""
        looks = given.looks()  # before: what is written meanwhile shows in the next call
        unprepared = [nodes for nodes in self.operands.bases if nodes.slot.weight is not None]
        wanted = [self._wanted(nodes, values) for nodes in unprepared]
        found = bases.get(wanted, self._spec, wait=not self._gathered)
        made = dict(zip(map(id, unprepared), found, strict=True))
        entries = [made.get(id(n)) or self._verified(n, values) for n in self.operands.bases]
        if not self._gathered:
            self._found.put(given, looks, entries, self._note_adapters(values))
        if self._counts:
            self._note_counts(values, entries)
        return entries

    def _wanted(self, nodes: BaseNodes, values: Sequence[Any]) -> BaseParameter:
        assert nodes.slot.weight is not None
        weight = self._plan.value(nodes.given[0], values)
        return BaseParameter(nodes.slot.path, weight, nodes.slot.weight.transposed)

    def _verified(self, nodes: BaseNodes, values: Sequence[Any]) -> Entry:
        code, scale, digest = (self._plan.value(node, values) for node in nodes.given)
        base = Base(code.detach(), as_scale(scale.detach()))
        return bases.verify(nodes.slot.path, base, digest, wait=not self._gathered)

    def _note_counts(self, values: Sequence[Any], entries: Sequence[Entry]) -> None:
        of = {id(n): entry for n, entry in zip(self.operands.bases, entries, strict=True)}
        for base, adapter in self.operands.pairs:
            if adapter.alpha is not None and base.clamped is not None:
                clamped.on_device(self._plan.value(adapter.lora_b, values), of[id(base)].clamped)

    def _note_adapters(self, values: Sequence[Any]) -> int:
        """Register which A and B are added to which base, for `falqon_fx.adapters`. New ones
        get init="svd".
        """
        noted = []
        for base, adapter in self.operands.pairs:
            nodes = (base.given[0], adapter.lora_a, adapter.lora_b)
            owner, lora_a, lora_b = (self._plan.value(node, values) for node in nodes)
            noted.append((owner, lora_a, lora_b, adapter.scaling))
            wide = adapter.b is not None and adapter.b.meta["val"].dtype == torch.float32
            spec = self._spec
            if adapter.alpha is None:  # maybe where it was clamped in FP8
                spec = replace(spec, adapter="bfloat16")
            bases.remember_cast(lora_b, CastOfAdapter(str(spec), wide))
            seen = self._seen.setdefault(lora_b.untyped_storage(), set())
            offset = int(lora_b.storage_offset())
            if offset not in seen:
                if self.config.init == "svd" and base.slot.weight is not None:
                    weight = owner.t() if base.slot.weight.transposed else owner
                    init_where_new(weight, lora_a, lora_b, self.config)
                seen.add(offset)
        return bases.remember_adapters(noted)

    @functools.cached_property
    def _plan(self) -> CallPlan:
        return CallPlan.of(self.gm, self.operands, len(self.original.find_nodes(op="placeholder")))

    @functools.cached_property
    def _gathered(self) -> bool:
        """Whether FSDP gathers the parameters for each call, wherever there is memory then."""
        return any(_compat.is_fsdp(nodes.given[0]) for nodes in self.operands.bases)

    @functools.cached_property
    def _counts(self) -> bool:
        """Whether a GPU counts what it clamps of adapters in FP8."""
        return any(nodes.clamped is not None for nodes in self.operands.bases)

    @functools.cached_property
    def _looks(self) -> Looks:
        return Looks()

    @functools.cached_property
    def _found(self) -> FoundByAddress:
        return FoundByAddress()

    @functools.cached_property
    def _seen(self) -> weakref.WeakKeyDictionary[Any, set[int]]:
        return weakref.WeakKeyDictionary()


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: FalqonConfig | None = None,
    *,
    tune: bool = False,
    paths: ModulePaths | None = None,
) -> RewriteResult:
    """The passes alone, on any torch-level graph: from Dynamo, ``symbolic_trace`` or export.

    Leaves ``gm`` as it is. On a GPU ``tune`` times what could compute each group of sites.
    With ``paths`` of the model that is running, ``include`` and ``exclude`` match these, too.

    Raises:
        FalqonError: a site that can't be trained rightly as asked.
    """
    config = config or FalqonConfig()
    inputs, log = gm.graph.process_inputs(*example_inputs), PassLog()
    names = paths.paths(gm.graph, inputs) if paths else {}
    work = Work(gm, inputs, config, tune, names)
    pipeline.run(work, log)
    graph = GraphReport(
        sites=tuple(site.report for site in work.plan.sites),
        rejected=work.plan.rejected,
        left=work.plan.left,
        notes=tuple(work.notes),
        transposes=work.plan.turned.report,
        with_room=work.plan.joined.report,
        nodes_before=len(operations(work.before)),
        nodes_after=len(operations(work.after)),
        pass_seconds=log.seconds,
    )
    report = RewriteReport((graph,), config.texts())
    log.finish(report)
    return RewriteResult(work.gm, report, work.operands, config, gm.graph, work.local)


def _compile(
    result: RewriteResult, example_inputs: Sequence[Any], config: FalqonConfig
) -> Callable[..., Any]:
    inputs = result.fake_inputs(example_inputs)
    if config.inner == "eager":
        return _compat.recompute_eagerly(result.gm)
    if config.inner == "aot_eager":
        return _compat.aot_eager_compile(result.gm, inputs)
    passes, opened = {"joint_custom_post_pass": recompute_weights}, None
    if _on_gpu(result):
        passes["post_grad_custom_post_pass"] = add_in_place
        opened = decompositions()
    given = result.gm, inputs, config.inductor, config.mode
    return _compat.inductor_compile(*given, opened, passes, lowering_version())


def _on_gpu(result: RewriteResult) -> bool:
    """Whether the ops are opened for Inductor; on a CPU they are opaque to it."""
    return any(value_of(nodes.given[0]).is_cuda for nodes in result.operands.bases) or any(
        value_of(nodes.lora_b).is_cuda for nodes in result.operands.rows
    )


def _reset() -> None:
    compile_warnings.forget()
    forget_agreements()


falqon.reset = _reset  # type: ignore[attr-defined] # torch._dynamo.reset() calls it


__all__ = ["FalqonError", "RewriteResult", "falqon", "rewrite"]
