"""The README, followed from the wheel in a new environment: what is installed is all of the library
that there is. Other packages are those at hand (`make wheel-check` installs the wheel with what it
asks for, and imports it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new environment's programs."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    make = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(make, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", symlinks=True)
    paths = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site = sysconfig.get_path("purelib", "venv", paths)
    into = ["--python", str(folder / "env" / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, *into, str(wheel)], check=True)
    others = sysconfig.get_path("purelib")
    # A path in a .pth file is searched last, and the .pth files in it (of the checkout) not at all.
    (Path(site) / "others.pth").write_text(f"{others}\n")
    return folder / "env" / "bin"


def run(command: list[str], folder: Path) -> str:
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    environment |= {"MPLBACKEND": "Agg", "FALQON_CACHE": str(folder / "cache")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_readmes_first_block(programs, tmp_path):
    """From nothing to an adapter that plain PEFT reads, and an FP8 folder."""
    (tmp_path / "block.py").write_text(f"{blocks(ROOT / 'README.md')[0]}\nprint(falqon_fx)\n")
    printed = run([str(programs / "python"), "block.py"], tmp_path)
    assert f"from '{programs.parent}" in printed.splitlines()[-1]
    answers = [line.partition(" -> ")[2] for line in printed.splitlines() if " -> " in line]
    before, after, in_peft = answers
    assert len({before, after}) == 2
    assert in_peft
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((tmp_path / "fp8-model" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    losses = [float(part.split("'")[0]) for part in printed.split("{'loss': '")[1:]]
    assert len(losses) == 30
    # Batches of 8 differ among themselves; the mean of ten falls far below that of the first ten.
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_readmes_other_block_and_the_command_line(programs, tmp_path):
    given = """
import torch, types
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
import falqon_fx
size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
base = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **size))
base.save_pretrained("model")
model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
ids = torch.zeros(1, 8, dtype=torch.int64)
tokenizer = lambda text, return_tensors: types.SimpleNamespace(input_ids=ids)
"""
    block = blocks(ROOT / "README.md")[1]
    (tmp_path / "block.py").write_text(f"{given}{block}\nprint(falqon_fx)\n")
    printed = run([str(programs / "python"), "block.py"], tmp_path)
    assert f"from '{programs.parent}" in printed.splitlines()[-1]
    assert "14 sites rewritten" in printed
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    falqon = str(programs / "falqon-fx")
    assert run([falqon, "--version"], tmp_path).startswith("falqon-fx ")
    assert "14 sites rewritten" in run([falqon, "explain", "model", "--length", "8"], tmp_path)
