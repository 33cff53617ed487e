"""benchmarks/gpu_lens.py: what a small layer launches on a GPU, from Inductor's code for one."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._triton import has_triton

pytest.importorskip("peft")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The numbers of each run for a small layer, as the file has them."""
    file = tmp_path_factory.mktemp("lens") / "lens.json"
    size = ["--model", "tiny", "--tokens", "64", "--rank", "8"]
    sys.path.insert(0, str(BENCHMARKS))
    try:
        importlib.import_module("gpu_lens").main(
            [*size, "--no-host", "--json", str(file), "--text", str(file.with_suffix(".md"))]
        )
    finally:
        sys.path.remove(str(BENCHMARKS))
    return json.loads(file.read_text())["runs"]


def launched(run, direction):
    return Counter(
        "triton" if launch["kernel"].startswith("triton_") else launch["kernel"]
        for launch in run[direction]["launches"]
    )


def test_launches_of_peft_and_inductor(seen):
    run = seen["inductor"]
    attention = "_scaled_dot_product_flash_attention"
    assert launched(run, "forward") == {"triton": 6, "mm": 21, attention: 1}
    assert launched(run, "backward") == {"triton": 7, "mm": 35, f"{attention}_backward": 3}
    assert run["python_ops"] == 0


@pytest.mark.parametrize(
    ("name", "launches", "python_ops"), [("falqon", 95, 15), ("falqon_frozen_a", 78, 15)]
)
def test_launches_of_ours(seen, name, launches, python_ops):
    run = seen[name]
    listed = [*run["forward"]["launches"], *run["backward"]["launches"]]
    assert (run["launches"], len(listed), run["python_ops"]) == (launches, launches, python_ops)


def test_kept_for_backward(seen):
    peft = seen["inductor"]["kept_bytes"]
    assert seen["falqon_frozen_a"]["kept_bytes"] < 0.85 * peft
    assert seen["falqon"]["kept_bytes"] < 0.85 * peft


def test_inputs_are_fit_for_cuda_graphs(seen):
    for run in seen.values():
        for direction in ("forward", "backward"):
            assert run[direction]["no_cuda_graph"] == ""
            assert run[direction]["mutated_not_static"] == []


def test_no_card_is_left_behind(seen):
    assert not has_triton()
    assert torch.empty(2, requires_grad=True).sum().backward() is None
    with pytest.raises((AssertionError, RuntimeError)):
        torch.cuda.current_device()
