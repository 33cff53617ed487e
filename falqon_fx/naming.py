"""The paths that the layers of one graph have in the whole model.

Behind a graph break Dynamo knows paths only from the module whose ``forward`` it then traces, and
shares that graph between layers that are alike. The parameters of a call tell which layer it is.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from falqon_fx import _compat
from falqon_fx.report import GraphReport, Rejected


class Names:
    """The parameters and buffers of a model by identity, and its modules by path."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, Any] = dict(model.named_modules())
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(tensor): name for name, tensor in tensors}

    @classmethod
    def of_call(cls) -> Names:
        """Of the outermost module whose call runs right now."""
        found: nn.Module = nn.Module()
        for frame, _ in traceback.walk_stack(None):
            module = frame.f_locals.get("self")
            found = module if isinstance(module, nn.Module) else found
        inside = getattr(found, "_orig_mod", found)  # what torch.compile returns wraps the model
        assert isinstance(inside, nn.Module)
        return cls(inside)

    def of(self, inputs: Sequence[Any]) -> tuple[str, ...]:
        """The name of each of a graph's inputs, "" for what is no parameter or buffer."""
        return tuple(self._names.get(id(value), "") for value in inputs)

    def paths(self, graph: fx.Graph, inputs: Sequence[Any]) -> dict[str, str]:
        """Paths in the whole model by those in a graph that Dynamo calls with ``inputs``.

        What lies in the traced module itself goes by the name of a parameter in the graph.
        """
        paths: dict[str, str] = {}
        placeholders = graph.find_nodes(op="placeholder")
        for node, name in zip(placeholders, self.of(inputs), strict=True):
            inner = _compat.source_path(node)
            if inner and f".{name}".endswith(f".{inner}"):
                outer = name.removesuffix(inner)
                paths.setdefault(inner, outer.rstrip(".") or inner)
                parts = inner.split(".")[:-1]
                for i in range(1, len(parts) + 1):
                    path = ".".join(parts[:i])
                    paths.setdefault(path, outer + path)
        return paths

    def report(self, report: GraphReport, graph: fx.Graph, inputs: Sequence[Any]) -> GraphReport:
        """A graph's report with the paths of the whole model."""
        paths = self.paths(graph, inputs)
        sites = (replace(site, path=paths.get(site.path, site.path)) for site in report.sites)
        refused = (replace(r, site=paths.get(r.site, r.site)) for r in report.rejected)
        return replace(report, sites=tuple(sites), rejected=tuple(map(self._refusal, refused)))

    def _refusal(self, item: Rejected) -> Rejected:
        """Where PEFT wraps a parameter instead of a layer (ParamWrapper): why, and under the
        parameter's name as its ``targeted_parameter_names`` has it.
        """
        parameter = getattr(self._modules.get(item.site), "parameter_name", None)
        if not parameter:
            return item
        site = f"{item.site}.{parameter}".replace(".base_layer.", ".")
        return replace(item, site=site, reason=_PARAMETER, remedy=_LEAVE_OR_RUN_EAGERLY)


_PARAMETER = (
    "PEFT adapts this parameter by a parametrization that each forward pass registers and takes "
    "off again, so Dynamo compiles its code anew in each step, up to its limit"
)
_LEAVE_OR_RUN_EAGERLY = (
    "It runs unmerged, as it was. falqon_fx.integrations.peft.run_param_wrappers_eagerly(model) "
    "before the first step spares the compilations; so does leaving it out: name the linear "
    'layers in target_modules instead of "all-linear"'
)
