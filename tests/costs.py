"""What the tests of costs share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from falqon_fx.cost.step.decoder import MODELS, decoder_of
from falqon_fx.cost.step.figures import figures_for
from falqon_fx.cost.step.layer import Step

SEVEN = decoder_of("llama-7b")
STEP = Step(SEVEN, 1, 4096, 64)
EXPERTS = MODELS["qwen3-30b-a3b"]
H100 = figures_for("H100")

OURS_WIN = ["own_gemm=1e18", "summed_gemm=1e18"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "head_dim": None,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(sizes))
    return file
