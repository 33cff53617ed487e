"""The frozen layers of a graph that others have quantized: they stay as they are, and are named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx, nn

from falqon_fx._compat import is_checkpoint, source_path
from falqon_fx.passes.describe import source_of
from falqon_fx.passes.match.frozen import part_of_adapter, site_of
from falqon_fx.passes.match.unmatched import is_ours, only_moves
from falqon_fx.passes.plan import Plan
from falqon_fx.passes.scope import param_of
from falqon_fx.report.data import Rejected
from falqon_fx.site.quantized import ALREADY, REMEDY, quantized_as


def quantized_layers(plan: Plan) -> Iterator[Rejected]:
    """The layers of which nothing has been said yet, whatever multiplies by their weights."""
    if plan.config.frozen == "leave":
        return
    known = {site_of(item.site) for item in (*plan.rejected, *plan.left)}
    for weight, readers in _readers(plan).items():
        if any(map(is_ours, readers)):  # `prepare` cast it
            continue
        path = (source_path(weight) or str(weight.target)).rpartition(".")[0]
        param = param_of(weight, plan.root)
        assert param is not None
        kind = quantized_as(param.value)
        selected = plan.config.selects(site_of(path)) and not part_of_adapter(path)
        if kind is not None and selected and site_of(path) not in known:
            known.add(site_of(path))
            yield Rejected(path, ALREADY.format(kind), REMEDY, source_of(readers[0]))


def _readers(plan: Plan) -> dict[fx.Node, list[fx.Node]]:
    """What reads each parameter of the graph that is a matrix, or a view of it."""
    found: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for scope in plan.root.walk():
        for node in scope.gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                continue
            param = param_of(node, scope)
            if param is None or not isinstance(param.value, nn.Parameter) or param.value.dim() < 2:
                continue
            reads = [user for user in node.users if not is_checkpoint(user.target)]
            while reads:
                reader = reads.pop()
                found[scope.outer(node)].append(reader)
                reads += reader.users if only_moves(reader) else ()
    return found
