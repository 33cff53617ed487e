"""Axolotl's plugin, for its version 0.19. In the YAML of a LoRA run, without ``torch_compile``:

    plugins: [falqon_fx.integrations.axolotl.FalqonPlugin]
    falqon: {prepare: true, regional: true, config: {frozen: fp8}}

``falqon`` may be left out: it holds arguments of `FalqonCallback`, ``config`` those of
`FalqonConfig`.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import nn

from falqon_fx.config import FalqonConfig
from falqon_fx.integrations.transformers import FalqonCallback


class FalqonArgs(BaseModel):
    """What Axolotl's own configuration takes beside its keys."""

    falqon: dict[str, Any] | None = None


class FalqonPlugin(BasePlugin):  # type: ignore[misc]
    """Adds a `FalqonCallback` to the trainer."""

    def get_input_args(self) -> str:
        return f"{__name__}.{FalqonArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: nn.Module) -> list[FalqonCallback]:
        arguments = {**(cfg.falqon or {})}
        config = FalqonConfig(**(arguments.pop("config", None) or {}))
        return [FalqonCallback(config, **arguments)]
