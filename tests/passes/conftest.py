"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import fx

from falqon_fx.kernels import hardware
from falqon_fx.passes import transposes
from falqon_fx.site import transposed
from tests.cuda import as_on_a_gpu
from tests.passes.rewritten import FRONTENDS, Model, Rewritten, passes, values
from tests.sites import randn


@pytest.fixture(scope="session", params=FRONTENDS)
def graph_of_frontend(request) -> fx.GraphModule:
    return FRONTENDS[request.param](Model(), randn(5, 64))


@pytest.fixture
def done(graph_of_frontend) -> Rewritten:
    return passes(graph_of_frontend, values(graph_of_frontend, randn(5, 64)))  # they copy it


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """CPU tensors go the way of an H100's."""
    monkeypatch.setattr(transposes, "on_gpu", lambda value: True)
    monkeypatch.setattr(hardware, "memory", lambda device: 80 * 2**30)
    transposed.forget()
    with as_on_a_gpu():
        yield monkeypatch
    transposed.forget()
