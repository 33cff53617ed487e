"""What the oldest torch that is promised, or its build, doesn't have: tests of it are skipped."""

from __future__ import annotations

import pytest
import torch


def _from(version: str, before: str) -> pytest.MarkDecorator:
    """A mark of tests that need a torch; ``before`` says what older ones do."""
    reason = f"before torch {version} {before}"
    return pytest.mark.skipif(torch.__version__ < version, reason=reason)


needs_fsdp2_of_integers = _from("2.12", "FSDP2 shards no integers, as which FP8 weights are kept")
# Autograd of a build for GPUs asks the driver for the card of a tensor, be it a fake one.
needs_build_without_driver = pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(),
    reason="a build of torch for GPUs takes no fake ones where there is no driver",
)
needs_meshes_in_graphs = _from("2.13", "Dynamo hides the mesh of DTensors in a graph")
