"""Whether the tests notice a broken pass: small faults are put into each file of passes/, one at a
time and in a copy, and the tests of that file run until the first failure.

    python benchmarks/mutations.py                       # all files, an hour of one core
    python benchmarks/mutations.py plan.py match/pair.py --seed 1
    python benchmarks/mutations.py plan.py --left        # what nothing noticed, with new tests
    python benchmarks/mutations.py --page                # the page again, from the JSON file

Torch is imported once: each run is a fork of this process. A fault that no test notices "survives".
It may be harmless (another order, a branch for speed): say so in the JSON file, as its "why", which
stays there when the fault is tried again. All others are gaps ("since": the test that was written
for one). Files that are run replace their own verdicts in the newest JSON file of this machine, so
a run can be cut into slices.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import operator
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import common
import pytest

_NORMALIZE, _MATCH = "passes/test_normalize.py", "passes/test_match.py"
_MATCHED = (_MATCH, "passes/test_match_peft.py", "passes/test_match_refused.py")
# Their numbers are compared by two processes.
_TWO_PROCESSES = ("passes/test_localize.py", "distributed/test_fast.py")
_DIALECTS = ("test_dialects.py", "test_dialects_refused.py")
_FROZEN = ("passes/test_frozen.py", "passes/test_frozen_left.py")
_EXPERTS = ("test_merged_experts.py", "test_prepared_experts.py")
_VERIFY = tuple(f"passes/test_verify{n}.py" for n in ("", "_operands", "_outliers", "_frontends"))
# What tests a file, the most telling first. `--shared` adds the tests of all passes.
TESTS: Mapping[str, tuple[str, ...]] = {
    "autotune.py": ("passes/test_autotune.py",),
    "checks.py": (
        "passes/test_plan.py",
        "passes/test_match_refused.py",
        "test_errors.py",
        "distributed/test_one_process.py",
    ),
    "copy_graph.py": ("passes/test_verify_frontends.py", "passes/test_rewrite.py"),
    "describe.py": ("passes/test_kernels.py", "test_explain.py", "test_report.py"),
    "dialects.py": (_NORMALIZE, *_DIALECTS, _MATCH),
    "gather_tokens.py": ("test_gather_tokens.py", *_TWO_PROCESSES),
    "hoist.py": _TWO_PROCESSES,
    "insert_operands.py": ("passes/test_insert_operands.py", *_VERIFY),
    "localize.py": _TWO_PROCESSES,
    "match/computed.py": (_MATCH, "passes/test_match_refused.py", *_DIALECTS),
    "match/dataflow.py": (*_MATCHED, *_DIALECTS),
    "match/delta.py": (*_DIALECTS, *_MATCHED),
    "match/experts.py": _EXPERTS,
    "match/frozen.py": _FROZEN,
    "match/pair.py": (*_MATCHED, *_DIALECTS),
    "match/unmatched.py": ("passes/test_match_refused.py", *_DIALECTS, *_MATCHED[:2]),
    "modes.py": ("passes/test_modes.py", *_MATCHED[1:2]),
    "normalize.py": (_NORMALIZE, _MATCH),
    "pipeline.py": (*_VERIFY, "passes/test_localize.py", "test_passlog.py"),
    "slots.py": ("passes/test_plan.py",),
    "plan.py": (
        "passes/test_plan.py",
        "passes/test_siblings.py",
        "passes/test_insert_operands.py",
        "test_explain_costs.py",
        "test_merged_experts.py",
    ),
    "propagate.py": (_NORMALIZE, "passes/test_rewrite.py", "test_errors.py"),
    "recompute_weights.py": ("passes/test_recompute_weights.py",),
    "rewrite.py": (
        "passes/test_rewrite.py",
        "passes/test_siblings.py",
        *_FROZEN,
        "passes/test_match_peft.py",
        "test_merged_experts.py",
    ),
    "rows.py": ("passes/test_insert_operands.py", *_VERIFY, "passes/test_plan.py"),
    "scope.py": (_NORMALIZE, *_MATCHED),
    "shards.py": _TWO_PROCESSES,
    "siblings.py": ("passes/test_siblings.py", "passes/test_frozen.py"),
    "terms.py": (_NORMALIZE, *_EXPERTS, _MATCH),
    "verify.py": (*_VERIFY, "passes/test_verify_experts.py"),
    "verify_experts.py": ("passes/test_verify_experts.py", "test_merged_experts.py"),
    "verify_nodes.py": _VERIFY,
    "vocabulary.py": (_NORMALIZE, _MATCH, *_DIALECTS),
    "work.py": (*_VERIFY, "passes/test_autotune.py"),
    "writes.py": ("passes/test_writes.py",),
}
SHARED = ("passes", "test_patterns.py", *_DIALECTS)
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


def left(result: Path, file: str, text: str) -> tuple[list[Mutant], list[dict[str, Any]]]:
    """The faults of a file that nothing noticed so far, and the verdicts on the others."""
    known = [v for v in common.read_json(result)["verdicts"] if v["file"] == file]
    gaps = [v for v in known if v["by"] is None and "why" not in v]
    found = []
    for gap in gaps:  # which may stand some lines further down by now
        what = operator.attrgetter("kind", "old", "new")
        alike = [m for m in mutants(file, text) if what(m) == (gap["kind"], gap["old"], gap["new"])]
        found += sorted(alike, key=lambda m, line=gap["line"]: abs(m.line - line))[:1]
    return found, [v for v in known if v not in gaps]


def make_copy(folder: Path) -> None:
    """The project with passes/ and kernels/ where they are imported from."""
    for name in ("falqon_fx", "tests", "examples", "benchmarks", "docs"):
        shutil.copytree(common.ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("passes", "kernels"):
        shutil.copytree(common.ROOT / name, folder / "falqon_fx" / name)
    shutil.copy(common.ROOT / "pyproject.toml", folder)


class _First:
    """The first test that fails, for the process that forked this one."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self.pipe, report.nodeid.partition("::")[2].partition("[")[0].encode())

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            os.write(self.pipe, b"its import")


def warm_up(copy: Path) -> None:
    """Import once what no fault changes: torch, and of the copy what lies below the passes."""
    sys.dont_write_bytecode = True  # a changed file may keep its size and time
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for the processes that tests start
    for name in ("torch._inductor.compile_fx", "transformers", "peft", "hypothesis", "falqon_fx"):
        importlib.import_module(name)
    assert not any(name.startswith("falqon_fx.passes") for name in sys.modules)
    gc.freeze()


def failure(copy: Path, tests: Sequence[str], limit: int, among: str = "") -> str | None:
    """What fails first of the tests in the copy, or of those ``among`` them; in a fork."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # ends what loops: a failure
        signal.alarm(20 * limit)  # and what waits, on a machine however busy
        os.chdir(copy)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        told = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", among]
        os._exit(pytest.main([*told, *(f"tests/{t}" for t in tests)], [_First(write)]))
    os.close(write)
    with os.fdopen(read) as pipe:
        name = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return f"no end within {limit} s"
    if code == pytest.ExitCode.USAGE_ERROR:  # what conftest.py imports
        return "its import"
    return (name or f"exit code {code}") if code else None


def tried(copy: Path, mutant: Mutant, tests: Sequence[str], limit: int) -> str | None:
    """What fails first with the fault."""
    target = copy / "falqon_fx" / "passes" / mutant.file
    text = target.read_text(encoding="utf-8")
    target.write_text(text[: mutant.start] + mutant.new + text[mutant.end :], encoding="utf-8")
    found = failure(copy, tests, limit)
    target.write_text(text, encoding="utf-8")
    return found


def record(result: Path, file: str, verdicts: Sequence[dict[str, Any]]) -> None:
    """Put the verdicts of a file in the place of its earlier ones; a reason why a fault is harmless
    stays.
    """
    kept = common.read_json(result)["verdicts"] if result.exists() else []
    key = operator.itemgetter("file", "kind", "old", "new", "line")
    why = {key(v): v["why"] for v in kept if "why" in v}
    new = [v | ({"why": why[key(v)]} if key(v) in why and not v["by"] else {}) for v in verdicts]
    rest = [v for v in kept if v["file"] != file]
    verdicts = sorted([*rest, *new], key=operator.itemgetter("file"))
    environment = common.environment() | {"command": "python benchmarks/mutations.py"}
    common.write_json(result, {"environment": environment, "verdicts": verdicts})


def write_page(result: Path) -> None:
    """The page beside a JSON file: how many of each file are noticed, and each that is not."""
    content = common.read_json(result)
    verdicts = content["verdicts"]
    rows = []
    for file in TESTS:
        own = [v for v in verdicts if v["file"] == file]
        if not own:
            continue
        harmless = sum("why" in v for v in own)
        rows.append((f"`{file}`", len(own), sum(v["by"] is not None for v in own), harmless))
    noticed, harmless = (sum(int(row[column]) for row in rows) for column in (2, 3))
    title = f"Faults in passes/: {noticed} of {len(verdicts)} noticed, {harmless} harmless"
    page = common.markdown(
        title, content["environment"], ("file", "faults", "noticed", "harmless"), rows
    )
    header = ("where", "is", "as a fault", "why nothing notices")
    table = common.markdown_table(
        header,
        [
            (f"`{v['file']}:{v['line']}`", *map(_cell, (v["old"], v["new"])), _why(v))
            for v in verdicts
            if v["by"] is None
        ],
    )
    left = sorted(TESTS.keys() - {v["file"] for v in verdicts})
    rest = [f"Not tried: {', '.join(f'`{file}`' for file in left)}.", ""] if left else []
    result.with_suffix(".md").write_text("\n".join([page, *rest, *table, ""]), encoding="utf-8")


def _why(verdict: Mapping[str, Any]) -> str:
    """Why nothing notices a fault; of a gap, which test was written for it and not tried yet."""
    if "since" in verdict:
        return f"gap, `{verdict['since']}` was written for it since"
    return str(verdict.get("why", "gap"))


def _cell(code: str) -> str:
    return f"`{' '.join(code.split())}`".replace("|", r"\|")


def main() -> None:
    about = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("files", nargs="*", help="below passes/ (default: all)")
    parser.add_argument("--each", type=int, default=5, help="faults in a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=300, help="seconds of CPU for one fault")
    parser.add_argument("--shared", action="store_true", help="the tests of all passes, too")
    parser.add_argument("--left", action="store_true", help="only what nothing noticed so far")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    arguments = parser.parse_args()
    result = common.latest_or_new("mutations")
    if not arguments.page:
        run(arguments, result)
    write_page(result)


def run(arguments: argparse.Namespace, result: Path) -> None:
    """Try the faults of each file that is asked for."""
    commit = common.versions()["commit"]
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        make_copy(copy)
        warm_up(copy)
        for file in arguments.files or TESTS:
            tests = [*TESTS[file], *(SHARED if arguments.shared else ())]
            text = (copy / "falqon_fx" / "passes" / file).read_text(encoding="utf-8")
            verdicts = []
            chosen = choose(file, text, arguments.each, random.Random(arguments.seed))
            if arguments.left:
                chosen, verdicts = left(result, file, text)
            for mutant in chosen:
                by = tried(copy, mutant, tests, arguments.limit)
                verdicts.append({**asdict(mutant), "by": by, "commit": commit})
                fault = f"{file}:{mutant.line} {mutant.kind}: {mutant.old!r} -> {mutant.new!r}"
                print(f"noticed by {by}:" if by else "SURVIVED", fault, flush=True)
            noticing = " or ".join({v["by"] for v in verdicts if (v["by"] or "").isidentifier()})
            if noticing and (failed := failure(copy, tests, arguments.limit, noticing)):
                raise SystemExit(f"{failed} of {file} fails without a fault")
            record(result, file, verdicts)


if __name__ == "__main__":
    main()
