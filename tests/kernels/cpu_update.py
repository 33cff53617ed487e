"""The update of a CPU in ATen operations, and its state."""

import pytest
import torch

from falqon_fx.kernels.cpu import native as cpu
from tests.sites import same, snapshot, update


def update_by_aten(*sites):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "library", lambda: None)
        update(*sites)


def assert_same_state(sites, others):
    for site, other in zip(sites, others, strict=True):
        code, *rest = snapshot(site.state)
        other_code, *other_rest = snapshot(other.state)
        assert same(rest, other_rest)
        # A sum of one product may start from +0 or not: zeros may differ in sign, nothing else.
        assert torch.equal(code.where(code != 0x80, 0), other_code.where(other_code != 0x80, 0))


def tensors_of(site):
    state = site.state
    return (
        *(state.code, state.scale, state.applied, site.lora_b, state.counters, state.writes),
        site.base,
    )


def flags(spec):
    """What the compiled code is told of a plan."""
    return {
        "seed": spec.seed,
        "pow2": spec.scale == "pow2",
        "stochastic": spec.rounding == "stochastic",
        "drop": spec.pending == "drop",
        "limit": None,
    }
