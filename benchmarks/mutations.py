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
import compileall
import contextlib
import gc
import importlib
import operator
import os
import py_compile
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import pytest
from faults import Mutant, choose, mutants

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
    "adapter_dtype.py": ("passes/test_adapter_dtype.py",),
    "add_in_place.py": ("passes/test_add_in_place.py",),
    "autotune.py": ("passes/test_autotune.py",),
    "call_plan.py": ("passes/test_insert_operands.py", "passes/test_transposes.py"),
    "checks.py": (
        "passes/test_plan.py",
        "passes/test_match_refused.py",
        "test_errors.py",
        "distributed/test_one_process.py",
        "test_fp8_adapter.py",
        "distributed/test_bad_input.py",
    ),
    "copy_graph.py": ("passes/test_verify_frontends.py", "passes/test_rewrite.py"),
    "describe.py": ("passes/test_kernels.py", "test_explain.py", "test_calibration.py"),
    "dialects.py": (_NORMALIZE, *_DIALECTS, _MATCH),
    "gather_tokens.py": ("test_gather_tokens.py", *_TWO_PROCESSES),
    "hoist.py": _TWO_PROCESSES,
    "insert_operands.py": ("passes/test_insert_operands.py", *_VERIFY),
    "localize.py": _TWO_PROCESSES,
    "match/computed.py": (_MATCH, "passes/test_match_refused.py", *_DIALECTS),
    "match/dataflow.py": (*_MATCHED, "passes/test_modes.py", *_DIALECTS),
    "match/delta.py": (*reversed(_DIALECTS), *_MATCHED),
    "match/experts.py": _EXPERTS,
    "match/frozen.py": _FROZEN,
    "match/pair.py": (*_MATCHED, *_DIALECTS),
    "match/unmatched.py": (
        "passes/test_match_refused.py",
        *reversed(_DIALECTS),
        *_MATCHED[:2],
        "passes/test_localize.py",
    ),
    "modes.py": ("passes/test_modes.py", *_MATCHED[1:2]),
    "normalize.py": (_NORMALIZE, _MATCH, "test_conv1d.py"),
    "pipeline.py": (*_VERIFY, "passes/test_localize.py", "test_naming.py", "test_passlog.py"),
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
    "quantized.py": ("test_quantized_bases.py",),
    "room.py": ("passes/test_room.py",),
    "rows.py": ("passes/test_insert_operands.py", *_VERIFY, "passes/test_plan.py"),
    "saturation.py": ("test_saturation.py",),
    "scope.py": (_NORMALIZE, *_MATCHED, "test_conv1d.py"),
    "shards.py": _TWO_PROCESSES,
    "siblings.py": ("passes/test_siblings.py", "passes/test_frozen.py"),
    "slots.py": ("passes/test_transposes.py",),
    "terms.py": (_NORMALIZE, *_EXPERTS, _MATCH),
    "transposes.py": ("passes/test_transposes.py",),
    "verify.py": (*_VERIFY, "passes/test_verify_experts.py"),
    "verify_experts.py": ("passes/test_verify_experts.py", "test_merged_experts.py"),
    "verify_nodes.py": _VERIFY,
    "vocabulary.py": (_NORMALIZE, _MATCH, *reversed(_DIALECTS), *_FROZEN),
    "work.py": (*_VERIFY, "passes/test_autotune.py"),
    "writes.py": ("passes/test_writes.py",),
}
SHARED = ("passes", "test_patterns.py", *_DIALECTS)


def left(result: Path, file: str, text: str) -> tuple[list[Mutant], list[dict[str, Any]]]:
    """The faults of a file that nothing noticed so far, and the verdicts on the others."""
    known = [v for v in common.read_json(result)["verdicts"] if v["file"] == file]
    gaps = [v for v in known if v["by"] is None and "why" not in v]
    what, found = operator.attrgetter("kind", "old", "new"), []
    for gap in gaps:  # which may stand some lines further down by now
        alike = [m for m in mutants(file, text) if what(m) == (gap["kind"], gap["old"], gap["new"])]
        places = [abs(m.line - gap["line"]) for m in alike]
        found += [alike[places.index(min(places))]] if alike else []
    return found, [v for v in known if v not in gaps]


def make_copy(folder: Path) -> None:
    """The project with passes/ and kernels/ where they are imported from."""
    for name in ("falqon_fx", "tests", "examples", "benchmarks", "docs"):
        shutil.copytree(common.ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc"))
    for name in ("passes", "kernels"):
        shutil.copytree(common.ROOT / name, folder / "falqon_fx" / name)
    shutil.copy(common.ROOT / "pyproject.toml", folder)
    for name in ("falqon_fx", "tests"):  # by hash: a changed file may keep its size and time
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder / name, quiet=1, invalidation_mode=by_hash)


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


class _Imported:
    """The modules that tests import, apart from those of the copy."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.known = pipe, {*sys.modules}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        files = {n: str(getattr(m, "__file__", "")) for n, m in sys.modules.items()}
        new = (n for n, f in files.items() if not f.startswith(str(session.config.rootpath)))
        with os.fdopen(self.pipe, "w", closefd=False) as pipe:
            pipe.write("\n".join(name for name in new if name not in self.known))


def warm_up(copy: Path, tests: Sequence[str]) -> None:
    """Import once what no fault changes: torch, of the copy what lies below the passes, and what
    the tests import.
    """
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # for the processes that tests start
    for name in ("torch._inductor.compile_fx", "transformers", "peft", "hypothesis", "falqon_fx"):
        importlib.import_module(name)
    told, _ = forked(copy, tests, _Imported, 600, "--collect-only")
    for name in told.split():
        if not name.startswith("falqon_fx"):
            with contextlib.suppress(ImportError):  # what only stands there as a module
                importlib.import_module(name)
    assert not any(name.startswith("falqon_fx.passes") for name in sys.modules)
    gc.freeze()


def forked(
    copy: Path, tests: Sequence[str], plugin: Callable[[int], object], limit: int, *options: str
) -> tuple[str, int]:
    """What a plugin says of the tests in the copy, and how their process ended."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))  # ends what loops: a failure
        signal.alarm(20 * limit)  # and what waits, on a machine however busy
        os.chdir(copy)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        quick = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain"]
        files = (f"tests/{test}" for test in tests)
        os._exit(pytest.main([*quick, *options, *files], [plugin(write)]))
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    return told, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def failure(copy: Path, tests: Sequence[str], limit: int, among: str = "") -> str | None:
    """What fails first of the tests in the copy, or of those ``among`` them; in a fork."""
    name, code = forked(copy, tests, _First, limit, "-k", among)
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
        files = arguments.files or [*TESTS]
        warm_up(copy, [*dict.fromkeys(test for file in files for test in TESTS[file])])
        for file in files:
            tests = [*TESTS[file], *(SHARED if arguments.shared else ())]
            text = (copy / "falqon_fx" / "passes" / file).read_text(encoding="utf-8")
            verdicts: list[dict[str, Any]] = []
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
