"""What the oldest torch that is promised doesn't have: tests of it are skipped there."""

from __future__ import annotations

import pytest
import torch


def _from(version: str, before: str) -> pytest.MarkDecorator:
    """A mark of tests that need a torch; ``before`` says what older ones do."""
    reason = f"before torch {version} {before}"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


needs_fsdp2_of_integers = _from("2.12", "FSDP2 shards no integers, as which FP8 weights are kept")
needs_meshes_in_graphs = _from("2.13", "Dynamo hides the mesh of DTensors in a graph")
