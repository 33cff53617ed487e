"""transformers' `Trainer` on the first layers of SmolLM2 under torchrun and ``accelerate launch``:
what the loop by hand trains.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import ENVIRONMENT

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("trainer_script.py")
FSDP = """
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""
DDP = """
distributed_type: MULTI_GPU
mixed_precision: 'no'
num_machines: 1
num_processes: 2
"""


def run(folder: Path, *launcher: str, alone: bool = False) -> Any:
    command = [*launcher, str(SCRIPT), str(folder), *(["alone"] if alone else [])]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, **ENVIRONMENT},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "result.pt")


def launched(folder: Path, config: str) -> tuple[str, ...]:
    file = folder / "accelerate.yaml"
    file.write_text(config)
    port = str(29600 + os.getpid() % 1000)
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(file))
    return (*launch, "--main_process_port", port)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("alone"), alone=True)


@pytest.mark.parametrize("how", ["torchrun", "accelerate DDP", "accelerate FSDP2"])
def test_it_trains_as_a_loop_by_hand(tmp_path: Path, expected: Any, how: str):
    """The adapter bit for bit. The logged loss is the mean of two float32 numbers. Under FSDP2 also
    a loop with accelerate's own regional compilation.
    """
    launcher: tuple[str, ...] = ("-m", "torch.distributed.run", "--standalone")
    launcher = (*launcher, "--nproc-per-node", "2")
    if how != "torchrun":
        launcher = launched(tmp_path, FSDP if how == "accelerate FSDP2" else DDP)
    runs = run(tmp_path, *launcher)
    of_hand, by_hand, _ = expected["by hand"]
    assert ("accelerate" in runs) == (how == "accelerate FSDP2")
    for name, (losses, adapter, sharded) in runs.items():
        assert sharded == (how == "accelerate FSDP2"), name
        assert losses == pytest.approx(of_hand, rel=2 * 2.0**-24, abs=0.0), name
        assert adapter.keys() == by_hand.keys(), name
        assert all(torch.equal(adapter[key], by_hand[key]) for key in by_hand), name
