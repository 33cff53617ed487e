"""OneTrainer's scripts/train.py with falqon, called in OneTrainer's folder (at 23df3832e8).

    python .../onetrainer_train.py --config-path config.json --config-value compile=true

The config trains a LoRA (not fused, no SVD quantization) on weights that are not quantized. Its
blocks are compiled with falqon where they would be with Inductor; files and backups are as ever.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from torch import Tensor, nn

sys.path[:0] = ["scripts", "."]

from modules.module import LoRAModule as lora  # noqa: E402
from modules.util.checkpointing_util import CheckpointLayer  # noqa: E402


class NumberedLoRA(lora.LoRAModule):  # type: ignore[misc]
    """With alpha / rank as a number in the graph; the buffer that is saved stays."""

    scaling: float

    def hook_to_module(self) -> None:
        self.scaling = float(self.alpha) / self.rank
        super().hook_to_module()

    def delta_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        delta: Tensor = self.lora_up(self.dropout(self.lora_down(x))) * self.scaling
        return delta


def compile_with_falqon(layer: nn.Module, **arguments: Any) -> None:
    """What OneTrainer calls on each block."""
    nn.Module.compile(layer, backend="falqon", **arguments)


if __name__ == "__main__":
    lora.LoRAModule = NumberedLoRA
    CheckpointLayer.compile = compile_with_falqon
    runpy.run_path("scripts/train.py", run_name="__main__")
