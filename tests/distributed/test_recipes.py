"""The recipes of examples/distributed/ as pasted, on two processes without a GPU."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from safetensors.torch import load_file

import falqon_fx
from tests.distributed.ranks import ENVIRONMENT

pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[2] / "examples" / "distributed"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
STEPS = 10


def run(module: str, *arguments: object) -> list[str]:
    """What ``python -m module`` prints, line by line."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout.splitlines()


def torchrun(recipe: str, out: Path, steps: int = STEPS) -> list[float]:
    """The losses that a recipe prints."""
    lines = run(*TORCHRUN, RECIPES / recipe, "--steps", steps, "--out", out)
    return [float(line) for line in lines if line]  # a progress bar ends in an empty one


def llama() -> Any:
    """The model of the recipes."""
    sys.path.append(str(RECIPES))
    import work

    return work.lora_model(None)


def check_adapter(folder: Path) -> None:
    """It loads in plain PEFT, and B was trained."""
    base = llama().unload()
    model = PeftModel.from_pretrained(base, folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == len([n for n, _ in model.named_parameters() if "lora_" in n])
    assert all(tensor.any() for tensor in saved.values())


def test_ddp(tmp_path: Path):
    losses = torchrun("ddp.py", tmp_path)
    assert len(losses) == STEPS
    check_adapter(tmp_path / "adapter")


def test_fsdp2(tmp_path: Path):
    """Also that a second run goes on where the first one ended."""
    assert len(torchrun("fsdp2.py", tmp_path)) == STEPS
    check_adapter(tmp_path / "adapter")
    assert falqon_fx.load(tmp_path / "fp8") is not None
    (tmp_path / "fp8").rename(tmp_path / "before")
    assert len(torchrun("fsdp2.py", tmp_path, STEPS + 2)) == 2


def test_titan(tmp_path: Path):
    assert len(torchrun("titan.py", tmp_path)) == STEPS
    model = llama()  # without shards and checkpoint wrappers
    falqon_fx.prepare(model, progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    state = {"falqon": falqon_fx.CheckpointState(model, torch.optim.AdamW(trained))}
    dcp.load(state, checkpoint_id=tmp_path / "steps" / str(STEPS))
    assert all(p.any() for p in trained)


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_trainer(tmp_path: Path, config: str):
    given = ("--config_file", RECIPES / f"{config}.yaml", "--main_process_port", "0")
    arguments = (RECIPES / "trainer.py", "--steps", STEPS, "--out", tmp_path)
    run("accelerate.commands.launch", *given, __file__, *arguments)
    state = json.loads((tmp_path / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert len([entry for entry in state["log_history"] if "loss" in entry]) == STEPS
    check_adapter(tmp_path / "adapter")


def main() -> Any:
    """The recipe that the command line names. accelerate shards on accelerators alone: it is told
    that these processes have one.
    """
    from accelerate import DistributedType
    from transformers import TrainingArguments

    def told(arguments: TrainingArguments) -> None:
        made(arguments)
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU

    made = TrainingArguments.__post_init__
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        TrainingArguments.__post_init__ = told
    del sys.argv[0]
    sys.path.insert(0, str(RECIPES))
    return runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
