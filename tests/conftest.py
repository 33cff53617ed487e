"""Settings of the whole test run: hypothesis profiles and threads; what several files look at."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from falqon_fx import RewriteReport, RewriteResult, backend
from falqon_fx.rows import state as rows_state
from falqon_fx.site import base as base_module

# A compiled example takes seconds and its time varies: no deadline. `make test-all` takes "all".
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=False,
    print_blob=True,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("all", settings.get_profile("ci"), max_examples=400)
# FUZZ_EXAMPLES cuts the run into slices: a tenth of it for what compiles, and for sequences.
_many = int(os.environ.get("FUZZ_EXAMPLES", "5000"))
settings.register_profile("fuzz", settings.get_profile("ci"), max_examples=_many)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Workers of pytest-xdist share the cores, and so do the processes that tests start. A process that
# compiles starts no pool of others for Triton, which would import torch before it does anything.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, len(os.sched_getaffinity(0)) // _workers)
_threads = int(os.environ.get("OMP_NUM_THREADS", _threads))  # as asked: threads that wait spin
torch.set_num_threads(_threads)
os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ["COLUMNS"] = "100"  # reports are as wide as the terminal
# Dynamo times the guards of each graph behind an emptied cache, which takes 20 ms.
torch._dynamo.guards.profile_guard_manager = lambda *args: 0.0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    _trace_nothing()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _trace_nothing()


def _trace_nothing() -> None:
    """pytest listens to all loggers, and torch writes out each graph where somebody listens to its
    structured trace: a tenth of a test's time.
    """
    trace = logging.getLogger("torch.__trace")
    trace.handlers[:] = [h for h in trace.handlers if type(h).__module__.startswith("torch.")]


def pytest_collection_finish() -> None:
    """Tests that collect garbage do not go through all that was imported, each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """No graph of another test, and the same random numbers in each."""
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generated sources go to a folder of the tests, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FALQON_CACHE", str(tmp_path_factory.mktemp("falqon-cache")))
        yield


@pytest.fixture
def _h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors on "cuda" are those of an H100."""
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RewriteReport]:
    """The report of each graph that the backend rewrites."""
    reports: list[RewriteReport] = []
    rewrite = backend.rewrite

    def counting(*args: Any, **options: Any) -> RewriteResult:
        result = rewrite(*args, **options)
        reports.append(result.report)
        return result

    monkeypatch.setattr(backend, "rewrite", counting)
    return reports


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of the zoo passed, where more of it ran than the fast tests."""
    passed = {
        report.nodeid.partition("[")[2].rstrip("]")
        for report in terminalreporter.stats.get("passed", [])
        if "test_zoo.py::test_decoder[" in report.nodeid
    }
    if len(passed) > 20:
        from tests import zoo

        able = zoo.families().keys() - zoo.PEFT_CANNOT.keys()
        share = len(passed & able) / len(able)
        text = f"zoo: {len(passed & able)} of {len(able)} families that PEFT can adapt passed"
        terminalreporter.write_line(f"{text} ({share:.1%})")


@pytest.fixture
def created(monkeypatch):
    """The path of each site whose weight is cast to FP8, as it happens."""
    paths: list[str] = []
    make, create = base_module.Bases._make, rows_state.create

    def making(self: Any, site: base_module.BaseParameter, spec: Any) -> Any:
        paths.append(site.path)
        return make(self, site, spec)

    def creating(path: str, *args: Any) -> rows_state.MergedAdapter:
        paths.append(path)
        return create(path, *args)

    monkeypatch.setattr(base_module.Bases, "_make", making)
    monkeypatch.setattr(rows_state, "create", creating)
    return paths
