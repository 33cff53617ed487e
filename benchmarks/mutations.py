"""Whether the tests notice a broken pass: small faults are put into each file of passes/, one at a
time and in a copy, and the tests of that file run until the first failure.

    python benchmarks/mutations.py                       # all files, hours
    python benchmarks/mutations.py plan.py --each 3

A fault that no test notices "survives". It may be harmless (another order, a branch for speed);
all others are gaps. `--seed` picks other faults.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import common
import pytest

# The tests of a file first, then those that all passes share.
TESTS = {
    # Their numbers are compared by two processes.
    "localize.py": ("passes/test_localize.py", "distributed/test_fast.py"),
    "hoist.py": ("passes/test_localize.py", "distributed/test_fast.py"),
    "shards.py": ("passes/test_localize.py", "distributed/test_fast.py"),
    "gather_tokens.py": ("passes/test_localize.py", "test_gather_tokens.py"),
    "normalize.py": ("passes/test_normalize.py", "passes/test_match.py"),
    "dialects.py": ("passes/test_normalize.py", "test_dialects.py"),
    "scope.py": ("passes/test_normalize.py", "passes/test_match.py"),
    "pipeline.py": ("passes/test_verify.py", "test_passlog.py"),
    "copy_graph.py": ("passes/test_verify.py",),
    "vocabulary.py": ("passes/test_normalize.py", "passes/test_match.py"),
    "propagate.py": ("passes/test_normalize.py", "passes/test_rewrite.py"),
    "match/frozen.py": ("passes/test_frozen.py",),
    "match": (
        "passes/test_match.py",
        "passes/test_match_peft.py",
        "passes/test_match_refused.py",
        "passes/test_frozen.py",
    ),
    "plan.py": ("passes/test_plan.py", "passes/test_siblings.py"),
    "slots.py": ("passes/test_plan.py", "passes/test_insert_operands.py"),
    "checks.py": ("passes/test_plan.py", "passes/test_match.py"),
    "siblings.py": ("passes/test_siblings.py",),
    "insert_operands.py": ("passes/test_insert_operands.py",),
    "rewrite.py": ("passes/test_rewrite.py", "passes/test_siblings.py"),
    "verify.py": ("passes/test_verify.py",),
    "recompute_weights.py": ("passes/test_recompute_weights.py",),
    "rows.py": ("passes/test_writes.py", "passes/test_insert_operands.py"),
    "writes.py": ("passes/test_writes.py",),
    "modes.py": ("passes/test_modes.py",),
    "autotune.py": ("passes/test_autotune.py",),
    "describe.py": ("passes/test_kernels.py", "test_report.py"),
}
SHARED = ("passes", "test_patterns.py", "test_dialects.py")
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

    tree = ast.parse(text)
    defaults = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.arguments)
        for value in (*node.defaults, *node.kw_defaults)
    }
    for node in ast.walk(tree):
        if id(node) in defaults:
            continue  # most are given by every caller
        for kind, part, new in _faults(node, text):
            start, end = place(part)
            yield Mutant(file, part.lineno, kind, text[start:end], new, start, end)


def _faults(node: ast.AST, text: str) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    def source(part: ast.AST) -> str:
        return ast.get_source_segment(text, part) or ""

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
    by_kind = {kind: [m for m in mutants(file, text) if m.kind == kind] for kind in KINDS}
    for found in by_kind.values():
        dice.shuffle(found)
    in_turn = [m for row in range(each) for found in by_kind.values() for m in found[row : row + 1]]
    return in_turn[:each]


def make_copy(folder: Path) -> None:
    """The project with passes/ and kernels/ where they are imported from."""
    for name in ("falqon_fx", "tests", "examples", "benchmarks", "docs"):
        shutil.copytree(common.ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("passes", "kernels"):
        shutil.copytree(common.ROOT / name, folder / "falqon_fx" / name)
    shutil.copy(common.ROOT / "pyproject.toml", folder)


def tests_of(file: str, own: bool) -> list[str]:
    """What runs for a file, its ``own`` tests alone or those of all passes behind them."""
    first = TESTS.get(file) or TESTS[file.partition("/")[0]]
    return [f"tests/{name}" for name in (*first, *(() if own else SHARED))]


def fails(copy: Path, tests: list[str], limit: int) -> bool:
    """Whether the tests fail in the copy; in a fork, so that torch is imported once for all."""
    child = os.fork()
    if not child:
        signal.alarm(limit)  # ends what loops: a failure
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def noticed(copy: Path, mutant: Mutant, tests: list[str], limit: int) -> bool:
    """Whether the tests fail with the fault."""
    target = copy / "falqon_fx" / "passes" / mutant.file
    text = target.read_text(encoding="utf-8")
    target.write_text(text[: mutant.start] + mutant.new + text[mutant.end :], encoding="utf-8")
    found = fails(copy, tests, limit)
    target.write_text(text, encoding="utf-8")
    return found


def main() -> None:
    about = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("files", nargs="*", help="below passes/ (default: all)")
    parser.add_argument("--each", type=int, default=5, help="faults in a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one fault")
    parser.add_argument("--own", action="store_true", help="only the tests of the file")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True  # a changed file may keep its size and time
    for name in ("torch._dynamo", "transformers", "peft"):
        importlib.import_module(name)

    folder = common.ROOT / "passes"
    known = sorted(str(f.relative_to(folder)) for f in folder.rglob("*.py"))
    files = arguments.files or [f for f in known if f in TESTS or f.startswith("match/")]
    verdicts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        make_copy(Path(place))
        for file in files:
            tests = tests_of(file, arguments.own)
            if fails(Path(place), tests, arguments.limit):
                raise SystemExit(f"{file}: its tests fail, or take too long, without a fault")
            text = (folder / file).read_text(encoding="utf-8")
            for mutant in choose(file, text, arguments.each, random.Random(arguments.seed)):
                seen = noticed(Path(place), mutant, tests, arguments.limit)
                verdicts.append({**asdict(mutant), "noticed": seen})
                fault = f"{file}:{mutant.line} {mutant.kind}: {mutant.old!r} -> {mutant.new!r}"
                print("noticed " if seen else "SURVIVED", fault, flush=True)
    print(f"{sum(v['noticed'] for v in verdicts)} of {len(verdicts)} noticed")
    content = {"environment": common.environment(), "verdicts": verdicts}
    common.write_json(common.result_path("mutations", ".json"), content)


if __name__ == "__main__":
    main()
