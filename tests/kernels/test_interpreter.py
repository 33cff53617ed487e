import warnings

import pytest
import triton

from falqon_fx.errors import warn_once
from falqon_fx.kernels.interpreter import decorating


def test_unchecked_version_is_announced(monkeypatch):
    warn_once.cache_clear()
    monkeypatch.setattr(triton, "__version__", "9.9.0+git")
    with pytest.warns(RuntimeWarning, match=r"9\.9\.0.*has not been checked"), decorating(True):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with decorating(interpret=False):
            pass
        with decorating(interpret=True):  # said once
            pass


def test_checked_version_is_silent_and_the_knob_is_put_back():
    before = triton.knobs.runtime.interpret
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with decorating(interpret=True):
            assert triton.knobs.runtime.interpret
    assert triton.knobs.runtime.interpret == before
