"""Sequence parallelism: x is gathered in FP8, half of bfloat16's bytes, where its sites alone read
it and that is exact (`falqon_fx.ops.gather_tokens`).
"""

from __future__ import annotations

from torch import fx

from falqon_fx._compat import value_of
from falqon_fx.ops import gather_tokens as op
from falqon_fx.ops import merged_linear
from falqon_fx.passes.plan import Plan
from falqon_fx.passes.scope import Scope, erase_unread
from falqon_fx.passes.shards import Crossing, crossing, cut_of, group_of


def gather_tokens(plan: Plan) -> int:
    """Edit the rewritten graph of a plan in place; how many gathers carry FP8 now."""
    if not plan.spec.per_row or plan.spec.scale != "pow2":
        return 0
    count = 0
    for scope in plan.root.walk():
        for node in [*scope.gm.graph.nodes]:
            found = crossing(node)
            if found is not None and _is_exact(found):
                count += _replace(scope, found, str(plan.spec))
        scope.gm.recompile()
    return count


def _is_exact(found: Crossing) -> bool:
    """Whether all tokens of an x are gathered, for sites alone."""
    value, cut = value_of(found.local), cut_of(found.made)
    tokens = cut.is_shard() and not cut.is_shard(value.dim() - 1)
    sites = all(_reads_as_x(user, found.end) for user in found.end.users)
    return found.enters and tokens and sites and value.dtype in op.EXACT


def _reads_as_x(user: fx.Node, x: fx.Node) -> bool:
    return user.target is merged_linear.OP and user.args[0] is x


def _replace(scope: Scope, found: Crossing, spec_text: str) -> bool:
    group = group_of(scope, found)
    if group is None:
        return False
    dim = cut_of(found.made).dim % value_of(found.local).dim()
    graph, end = scope.gm.graph, found.end
    with graph.inserting_before(end):
        whole = graph.call_function(op.OP, (found.local, dim, *group, spec_text))
    whole.meta.update(end.meta)
    end.replace_all_uses_with(whole)
    erase_unread(found.nodes)
    return True
