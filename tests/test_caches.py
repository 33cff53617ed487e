"""Inductor's and AOTAutograd's disk caches: hit by an unchanged library, never stale.

The caches are looked up in a process that has compiled nothing yet, so each run is one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# One site, forward and backward. With CHANGED set, the lowering adds 1 to each output and the hash
# of its sources is another, as after an edit of lowering.py.
SCRIPT = """
import json
import os

import torch
from torch._dynamo.utils import counters
from falqon_fx import backend
from falqon_fx.ops import decompositions, lowering
from falqon_fx.site import spec
from tests.models import LoraLinear, fill_b

if os.environ["CHANGED"]:
    original = lowering.merged_linear

    def changed(*args):
        y, *rest = original(*args)
        return [y + 1, *rest]

    lowering.merged_linear = changed
    for module in (spec, decompositions, backend):
        module.lowering_version = lambda: "0123456789ab"

torch.manual_seed(0)
model = LoraLinear(16, 24)
fill_b(model)
x = torch.randn(8, 16).requires_grad_()
y = torch.compile(model, backend="falqon")(x)
y.sum().backward()
hits = {
    "fxgraph_cache_hit": counters["inductor"]["fxgraph_cache_hit"],
    "autograd_cache_hit": counters["aot_autograd"]["autograd_cache_hit"],
}
print(json.dumps({"sum": y.double().sum().item(), "hits": hits}))
"""


@dataclass
class Run:
    total: float
    hits: dict[str, int]


def run(folder: Path, changed: str = "") -> Run:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of workers to start
        "CHANGED": changed,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    return Run(result["sum"], result["hits"])


@pytest.fixture(scope="module")
def cold(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inductor")
    return folder, run(folder)


def test_an_unchanged_library_hits_the_caches(cold):
    folder, first = cold
    again = run(folder)
    assert first.hits == {"fxgraph_cache_hit": 0, "autograd_cache_hit": 0}
    assert again.hits == {"fxgraph_cache_hit": 2, "autograd_cache_hit": 1}  # forward, backward
    assert again.total == first.total


def test_a_changed_lowering_is_not_served_from_the_caches(cold):
    """Of 8 x 24 outputs each is 1 more; sums of about 200 float32 values in float64."""
    folder, first = cold
    changed = run(folder, changed="yes")
    assert changed.hits == {"fxgraph_cache_hit": 0, "autograd_cache_hit": 0}
    assert changed.total == pytest.approx(first.total + 8 * 24, abs=1e-3)
