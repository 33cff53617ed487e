"""Find sites that DDP's optimizer cut in two when it compiles a model in pieces, one a bucket.

What enters and leaves a piece are plain inputs and outputs, so a cut site is recognized by its B:
out > rank, and what feeds it or the sum that reads it is in another piece. Other trained layers, a
head say, are never cut.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from falqon_fx.passes.match.dataflow import strip_elementwise
from falqon_fx.passes.scope import Scope
from falqon_fx.passes.terms import Add, Cast, Dropout, Linear, Param, Prepared, Scale


def cut_sites(root: Scope, whole: set[fx.Node]) -> Iterator[tuple[Scope, Param]]:
    """B of each cut site; ``whole`` are the nodes of the uncut ones."""
    for scope in root.walk():
        for node in scope.gm.graph.nodes:
            term = scope.term(node)
            if node in whole or not isinstance(term, Linear) or term.weight.transposed:
                continue
            out, rank = term.weight.value.shape
            if rank < out and term.weight.value.requires_grad and _is_cut(scope, node, term):
                yield scope, term.weight


def _is_cut(scope: Scope, node: fx.Node, b: Linear) -> bool:
    inner = strip_elementwise(scope, b.x).end
    a = scope.term(inner)
    here = isinstance(a, Linear)  # A is in this piece
    if not here and inner.op != "placeholder":
        return False
    end = _above(scope, node)
    for user in end.users:
        total = scope.term(user)
        if isinstance(total, Add):
            base = total.left if total.right is end else total.right
            base = strip_elementwise(scope, base).end
            source = strip_elementwise(scope, a.x).end if isinstance(a, Linear) else inner
            # x + B(A(x)) is a residual connection, no site.
            outside = base.op == "placeholder" and base is not source
            return outside or (not here and isinstance(scope.term(base), Linear | Prepared))
    return here and any(user.op == "output" for user in end.users)


def _above(scope: Scope, node: fx.Node) -> fx.Node:
    """The last cast, scaling or dropout that a node alone goes through."""
    while len(node.users) == 1:
        (user,) = node.users
        if not isinstance(scope.term(user), Cast | Scale | Dropout):
            break
        node = user
    return node
