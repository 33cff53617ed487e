"""Inductor's and AOTAutograd's disk caches: hit by an unchanged library, never stale.

Two processes look them up, of which the first has nothing to find.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One site, forward and backward. At last the lowering adds 1 to each output and the hash of its
# sources is another, as after an edit of lowering.py.
SCRIPT = """
import json
import sys

import torch
from torch._dynamo.utils import counters
from falqon_fx import backend
from falqon_fx.ops import decompositions, lowering
from falqon_fx.site import spec
from tests.models import LoraLinear, fill_b


def run():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = LoraLinear(16, 24)
    fill_b(model)
    x = torch.randn(8, 16).requires_grad_()
    y = torch.compile(model, backend="falqon")(x)
    y.sum().backward()
    hits = (
        counters["inductor"]["fxgraph_cache_hit"],
        counters["aot_autograd"]["autograd_cache_hit"],
    )
    return y.double().sum().item(), hits


found = {"as it is": run()}
if "change" in sys.argv:
    original = lowering.merged_linear

    def changed(*args):
        y, *rest = original(*args)
        return [y + 1, *rest]

    lowering.merged_linear = changed
    for module in (spec, decompositions, backend):
        module.lowering_version = lambda: "0123456789ab"
    found["changed"] = run()
print(json.dumps(found))
"""


def process(folder: Path, *arguments: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of workers to start
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",  # for so few files
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # processes that share no header
def test_an_unchanged_library_hits_the_caches_and_a_changed_lowering_does_not(tmp_path):
    """Of 8 x 24 outputs each is 1 more: sums of about 200 float32 values in float64."""
    total, hits = process(tmp_path)["as it is"]
    assert hits == [0, 0]
    found = process(tmp_path, "change")
    assert found["as it is"] == [total, [2, 1]]  # forward and backward; both of them
    again, hits = found["changed"]
    assert hits == [0, 0]
    assert again == pytest.approx(total + 8 * 24, abs=1e-3)
