"""Fixtures of several files."""

from __future__ import annotations

import pytest

from tests.passes.rewritten import FRONTENDS, Model, Rewritten, passes, values
from tests.sites import randn


@pytest.fixture(params=FRONTENDS)
def done(request) -> Rewritten:
    x = randn(5, 64)
    gm = FRONTENDS[request.param](Model(), x)
    return passes(gm, values(gm, x))
