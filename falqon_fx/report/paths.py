"""The paths that the layers of one graph have in the whole model.

Behind a graph break Dynamo knows paths only from the module whose ``forward`` it then traces, and
shares that graph between layers that are alike. The parameters of a call tell which layer it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from falqon_fx import _compat
from falqon_fx.report.data import GraphReport, Rejected
from falqon_fx.site.names import join, model_of_call, modules_of, tensors_of


class ModulePaths:
    """The parameters and buffers of a model by identity, and its modules by path."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(modules_of(model))
        self._names = {key: names for key, (_, names) in tensors_of(model).items()}

    @classmethod
    def from_call_stack(cls) -> ModulePaths:
        """The paths in the outermost module whose call is running, found in Python's call stack."""
        return cls(model_of_call())

    def of(self, inputs: Sequence[Any]) -> tuple[str, ...]:
        """The name of each of a graph's inputs, "" for what is no parameter or buffer."""
        return tuple(self._names.get(id(value), [""])[0] for value in inputs)

    def paths(self, graph: fx.Graph, inputs: Sequence[Any]) -> dict[str, str]:
        """Paths in the whole model by those in a graph that Dynamo calls with ``inputs``.

        What lies in the traced module itself goes by the name of a parameter in the graph.
        """
        placeholders = graph.find_nodes(op="placeholder")
        found: list[tuple[list[str], list[_Place]]] = []
        for node, value in zip(placeholders, inputs, strict=True):
            inner, names = _compat.source_path(node).split("."), self._names.get(id(value), [])
            if places := _places(inner, names):
                found.append((inner, places))
        # Of the places of a tied parameter the one where the others are.
        certain = {places[0].outer for _, places in found if len(places) == 1}
        paths: dict[str, str] = {}
        for inner, places in found:
            place = next((p for p in places if p.outer in certain), places[0])
            for path, whole in place.paths(inner):
                paths.setdefault(path, whole)
        return paths

    def report(self, report: GraphReport, graph: fx.Graph, inputs: Sequence[Any]) -> GraphReport:
        """A graph's report with the paths of the whole model."""
        paths = self.paths(graph, inputs)

        def named(items: Sequence[Rejected]) -> Iterator[Rejected]:
            return (replace(r, site=paths.get(r.site, r.site)) for r in items)

        return replace(
            report,
            sites=tuple(replace(s, path=paths.get(s.path, s.path)) for s in report.sites),
            rejected=tuple(map(self._refusal, named(report.rejected))),
            left=tuple(named(report.left)),
            notes=tuple(replace(n, site=paths.get(n.site, n.site)) for n in report.notes),
        )

    def _refusal(self, item: Rejected) -> Rejected:
        """Where PEFT wraps a parameter instead of a layer (ParamWrapper): why, and under the
        parameter's name as its ``targeted_parameter_names`` has it.
        """
        module = self._modules.get(item.site)
        parameter = None if module is None else vars(module).get("parameter_name")
        if not parameter:
            return item
        site = f"{item.site}.{parameter}".replace(".base_layer.", ".")
        if getattr(module, "traced", False):
            return replace(item, site=site)
        return replace(item, site=site, reason=_PARAMETER, remedy=_TRACE_OR_LEAVE)


@dataclass(frozen=True)
class _Place:
    """Where in the model the graph's name of a parameter lies: all of it below ``outer``; without
    its first part where that is the name of a variable that holds the module at ``outer``.
    """

    outer: str
    variable: bool

    def paths(self, inner: Sequence[str]) -> Iterator[tuple[str, str]]:
        """The paths in a graph that end with the parameter ``inner``, and those in the model."""
        for i in range(1, len(inner)):
            yield ".".join(inner[:i]), join(self.outer, ".".join(inner[self.variable : i]))
        whole = ".".join(inner)
        yield whole, _without_lora(self.outer) or whole


def _places(inner: Sequence[str], names: Sequence[str]) -> list[_Place]:
    """The places where a parameter with these ``names`` in the model can lie."""
    for variable in (False, True) if len(inner) > 1 else (False,):
        outers = [_outside(inner[variable:], name.split(".")) for name in names]
        if places := [_Place(outer, variable) for outer in outers if outer is not None]:
            return places
    return []


def _outside(inner: Sequence[str], name: Sequence[str]) -> str | None:
    """The part of a parameter's name that lies around what a graph calls ``inner``; None where
    ``inner`` is no part of the name.

    Names may be left out within: to a function that gets lora_A["default"] as an argument
    "q_proj.lora_A.default.weight" is (lora_A, weight).
    """
    end = len(name)
    for part in reversed(inner):
        places = [i for i in range(end) if name[i] == part]
        if not places or (end == len(name) and places[-1] != end - 1):
            return None
        end = places[-1]
    return ".".join(name[:end])


def _without_lora(path: str) -> str:
    """The path of the layer that holds an adapter's part."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part in ("lora_A", "lora_B"):
            return ".".join(parts[:i])
    return path


_PARAMETER = (
    "PEFT adapts this parameter by a parametrization that each forward pass registers and takes "
    "off again, so Dynamo compiles its code anew in each step, up to its limit"
)
_TRACE_OR_LEAVE = (
    "It runs unmerged, as it was. falqon_fx.integrations.peft.trace_param_wrappers(model) before "
    "the first step makes one graph of it; or leave it out: name the linear layers in "
    'target_modules instead of "all-linear"'
)
