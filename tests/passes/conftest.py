"""Fixtures of several files."""

from __future__ import annotations

import pytest
from torch import fx

from tests.passes.rewritten import FRONTENDS, Model, Rewritten, passes, values
from tests.sites import randn


@pytest.fixture(scope="session", params=FRONTENDS)
def graph_of_frontend(request) -> fx.GraphModule:
    return FRONTENDS[request.param](Model(), randn(5, 64))


@pytest.fixture
def done(graph_of_frontend) -> Rewritten:
    return passes(graph_of_frontend, values(graph_of_frontend, randn(5, 64)))  # they copy it
