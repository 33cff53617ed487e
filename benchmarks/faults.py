"""Small faults that can be put into a file: a condition negated, a number off by one, a statement
left out, two arguments swapped.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

KINDS = ("negate", "constant", "drop", "swap", "condition")
_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.Lt: ast.GtE,
    ast.Gt: ast.LtE,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
}
_OPPOSITE |= {other: one for one, other in _OPPOSITE.items()}


@dataclass(frozen=True)
class Mutant:
    """A piece of a file and what stands there instead."""

    file: str
    line: int
    kind: str
    old: str
    new: str
    start: int  # in the file's text
    end: int


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Every small fault that can be put into a file."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def place(node: ast.AST) -> tuple[int, int]:
        # Columns count bytes.
        ends = []
        for line, column in (
            (getattr(node, "lineno"), getattr(node, "col_offset")),  # noqa: B009
            (getattr(node, "end_lineno"), getattr(node, "end_col_offset")),  # noqa: B009
        ):
            row = text[starts[line - 1] : starts[line]].encode()
            ends.append(starts[line - 1] + len(row[:column].decode()))
        return ends[0], ends[1]

    def source(part: ast.AST) -> str:
        start, end = place(part)
        return text[start:end]

    tree = ast.parse(text)
    passed_over: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):  # most are given by every caller
            passed_over |= {id(value) for value in (*node.defaults, *node.kw_defaults)}
        elif isinstance(node, ast.ClassDef):  # a frozen data class is a promise to readers
            passed_over |= {id(n) for d in node.decorator_list for n in ast.walk(d)}
        elif isinstance(node, ast.keyword) and node.arg == "strict":  # lengths that are equal
            passed_over.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):  # what a message says
            passed_over |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        for kind, part, new in _faults(node, source):
            start, end = place(part)
            yield Mutant(file, part.lineno, kind, text[start:end], new, start, end)


def _faults(
    node: ast.AST, source: Callable[[ast.AST], str]
) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        opposite = _OPPOSITE[type(node.ops[0])]()
        yield (
            "negate",
            node,
            f"({ast.unparse(ast.Compare(node.left, [opposite], node.comparators))})",
        )
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield (
            "constant",
            node,
            str(not node.value if isinstance(node.value, bool) else node.value + 1),
        )
    elif isinstance(node, ast.AugAssign | ast.Continue | ast.Raise) or _is_call(node):
        yield "drop", cast(ast.stmt, node), "pass"
    elif isinstance(node, ast.If | ast.IfExp):
        yield "condition", node.test, f"(not ({source(node.test)}))"
    if isinstance(node, ast.Call) and len(node.args) > 1:
        first, second = node.args[:2]
        if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
            function, rest = source(node.func), [*node.args[2:], *node.keywords]
            given = ", ".join([source(second), source(first), *map(source, rest)])
            if isinstance(second, ast.expr) and source(first) != source(second):
                yield "swap", node, f"{function}({given})"


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def choose(file: str, text: str, each: int, dice: random.Random) -> list[Mutant]:
    """``each`` faults of a file, of as many kinds as it has."""
    found_here = [*mutants(file, text)]
    by_kind = {kind: [m for m in found_here if m.kind == kind] for kind in KINDS}
    for found in by_kind.values():
        dice.shuffle(found)
    in_turn = [m for row in range(each) for found in by_kind.values() for m in found[row : row + 1]]
    return in_turn[:each]
