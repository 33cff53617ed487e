"""`explain`: what the backend would rewrite in a model and why not, without touching the model."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

from falqon_fx import _compat
from falqon_fx.backend import RewriteResult, rewrite
from falqon_fx.config import FalqonConfig
from falqon_fx.cost import cards
from falqon_fx.cost import model as cost
from falqon_fx.errors import FalqonError
from falqon_fx.model.lora_layers import unwrap
from falqon_fx.model.mesh import MeshPlan
from falqon_fx.model.mesh_bytes import on_mesh
from falqon_fx.model.opaque import codes_of, opaque_linears, standing_in, told
from falqon_fx.model.sensitivity import cast_costs, sensitivity
from falqon_fx.model.sorting import sort_layers
from falqon_fx.passes.describe import innermost
from falqon_fx.report.data import Cost, GraphBreak, GraphReport, Site
from falqon_fx.report.listing import listing
from falqon_fx.report.paths import ModulePaths
from falqon_fx.report.report import RewriteReport
from falqon_fx.site.names import modules_of, tensors_of
from falqon_fx.site.sharded import refuse_sharded


def explain(
    model: nn.Module,
    *args: Any,
    config: FalqonConfig | None = None,
    mesh: MeshPlan | Mapping[str, Any] | DeviceMesh | None = None,
    calibration: Iterable[Any] | None = None,
    **kwargs: Any,
) -> RewriteReport:
    """What ``torch.compile(model, backend="falqon")`` would do with this call; compiles nothing.

    The model runs through Dynamo and the passes on fake tensors: no parameter, buffer or random
    state changes, the user's own compilations neither see nor feel it, and no memory for
    activations is needed. A model on the meta device will do. Sizes that
    ``torch._dynamo.mark_dynamic`` marks on the arguments appear as symbols.

    Where the config of a Hugging Face model asks for a cache, this call gets ``use_cache=False``
    on the meta device, where a cache can't be made; the report says so. So it does of linear layers
    on weights whose class fake tensors can't stand for, as bitsandbytes' are: they don't run, and
    are taken to be products (`falqon_fx.model.opaque`).

    With ``mesh``, processes as a `MeshPlan`, as sizes (``{"fsdp": 8, "tp": 2}``) or a DeviceMesh,
    the report also has what FSDP2, tensor parallelism or DDP would hold and move there. It is
    arithmetic: no process is started, no GPU needed.

    With ``calibration``, batches of inputs as `prepare` takes them, the report also has what the
    casts of each layer are expected to cost (`falqon_fx.model.sensitivity`): the model itself runs
    over them, forward and backward, and is as it was afterwards. ``report.most_sensitive(8)`` is
    what to give to ``exclude``.

    Raises:
        FalqonError: what compiling would raise; a mesh or a calibration that says nothing; or the
            model's path through its own code depends on the values of its inputs, as with PEFT's
            aLoRA; or other processes hold parts of it; or it holds such a weight in a layer that
            is no linear one.
    """
    inner, config = unwrap(model), config or FalqonConfig()
    costly: dict[str, float] = {}
    if calibration is not None:
        every = config.leaving(())
        costly = sensitivity(cast_costs(inner, sort_layers(inner, every)[0], calibration, every))
        config = config.leaving(tuple(costly)[: config.sensitive()])
    plan = None if mesh is None else MeshPlan.of(mesh)
    if plan is not None:
        plan.check(config)
    refuse_sharded(inner, "explain", "Call it before fully_shard or parallelize_module")
    kwargs, notes = _without_cache(inner, kwargs)
    opaque = opaque_linears(inner)
    with _compat.fake_mode() as mode, standing_in(opaque):

        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            stand_in = mode.from_tensor(value)
            _compat.copy_dynamic_marks(value, stand_in)
            return stand_in

        tensors = {name: fake(t) for name, t in _tensors(inner)} | codes_of(opaque)
        tensors = {f"model.{name}": t for name, t in tensors.items()}
        args, kwargs = _compat.tree_map(fake, (args, kwargs))
        tracer = _Tracer(inner, config)
        # Around Dynamo, not inside of it: tracing the exchange of each tensor takes longer than the
        # model itself.
        try:
            torch.func.functional_call(tracer, tensors, args, kwargs)
        except _compat.NO_VALUES as error:
            raise FalqonError(
                "explain",
                f"the model looks at the values of its inputs ({error}), of which explain makes "
                "shapes alone",
                "Compile the model: the backend warns of each layer that it leaves as it was",
            ) from error
    predict = _Predictor(config, _device(inner))
    spread = None
    if plan is not None:
        spread = on_mesh(inner, plan, config, tracer.graphs, predict.card, predict)
    return RewriteReport(
        tuple(predict(graph) for graph in tracer.graphs),
        config.texts(),
        tuple(_modules(inner)),
        (*notes, *told(opaque), *predict.notes),
        spread,
        costly,
    )


class _Tracer(nn.Module):
    """Runs a model under Dynamo and keeps the report of each graph."""

    def __init__(self, model: nn.Module, config: FalqonConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.graphs: list[GraphReport] = []

    def forward(self, *args: Any, **kwargs: Any) -> None:
        model = self.model

        def call() -> Any:
            return model(*args, **kwargs)

        look = _Look(ModulePaths(model), self.config, self.graphs)  # names of the stand-ins
        try:
            _compat.trace_alone(call, look.backend)
        finally:
            vars(look).clear()


class _Look:
    """The backend of one trace. Dynamo keeps it, and what it returns, for longer than that: all
    that it knows of the model hangs on it alone, and is taken off it in the end.
    """

    def __init__(self, names: ModulePaths, config: FalqonConfig, graphs: list[GraphReport]) -> None:
        self.names, self.config, self.graphs = names, config, graphs
        self.traced: list[tuple[fx.GraphModule, GraphReport, set[tuple[str, ...]]]] = []

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        index = len(self.traced)
        result = rewrite(gm, example_inputs, self.config, paths=self.names)
        self.traced.append((gm, _report(result, gm), set()))

        def run(*inputs: Any) -> Any:
            # Dynamo shares a graph between layers that are alike: each gets a report of its own.
            gm, report, seen = self.traced[index]
            names = self.names.of(inputs)
            if names not in seen:
                passes = {} if seen else report.pass_seconds
                own = self.names.report(report, gm.graph, inputs)
                self.graphs.append(replace(own, pass_seconds=passes))
                seen.add(names)
            return gm.forward(*inputs)

        return run


def _report(result: RewriteResult, gm: fx.GraphModule) -> GraphReport:
    (graph,) = result.report.graphs
    why = _compat.graph_break(gm)
    return replace(
        graph,
        ended_by=None if why is None else GraphBreak(_first_line(why[0]), innermost(why[1])),
        before=tuple(listing(gm)),
        after=tuple(listing(result.gm)),
    )


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0]


class _Predictor:
    """Adds predicted costs to the sites of a graph; equal sites are computed once."""

    def __init__(self, config: FalqonConfig, device: torch.device) -> None:
        self.config = config
        self.card, self.notes = _card(config, device)
        self.known: dict[object, Cost] = {}

    def __call__(self, graph: GraphReport) -> GraphReport:
        if self.card is None:
            return graph
        together = Counter(site.group for site in graph.sites)
        adapted = Counter(site.group for site in graph.sites if site.adapters)
        return replace(
            graph,
            sites=tuple(
                replace(site, cost=self._cost(site, together[site.group], adapted[site.group]))
                for site in graph.sites
            ),
        )

    def _cost(self, site: Site, siblings: int, adapted: int) -> Cost | None:
        if self.card is None:
            return None
        shape = cost.shape_of(site, self.card, siblings, adapted)
        key = (shape, site.kernel, site.tokens_hint)
        if key not in self.known:
            variant = cost.variant_of(site, self.card)
            self.known[key] = cost.predict(shape, variant, self.card, site.tokens_hint)
        return self.known[key]


def _card(config: FalqonConfig, device: torch.device) -> tuple[cards.Card | None, list[str]]:
    if config.card is not None:
        return cards.find(config.card), []
    card = cards.at_hand(device)
    if card is not None:
        return card, []
    problem, remedy = cards.unknown(device)
    return None, [f"no times are predicted: {problem}. {remedy}"]


def _device(model: nn.Module) -> torch.device:
    return next((t.device for _, t in _tensors(model)), torch.device("cpu"))


def _without_cache(
    model: nn.Module, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    wanted = getattr(getattr(model, "config", None), "use_cache", False)
    if not wanted or "use_cache" in kwargs or _device(model).type != "meta":
        return kwargs, ()
    takes = inspect.signature(model.forward).parameters
    if "use_cache" not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return kwargs, ()
    note = "use_cache=False was passed: a key-value cache can't be made on the meta device"
    return {**kwargs, "use_cache": False}, (note,)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(names[0], tensor) for tensor, names in tensors_of(model).values()]


def _modules(model: nn.Module) -> Iterator[str]:
    for path, module in modules_of(model):
        if any(parameter is not None for parameter in vars(module)["_parameters"].values()):
            yield path
