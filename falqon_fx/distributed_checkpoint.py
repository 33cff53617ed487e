"""`CheckpointState`: models and optimizers in torch's distributed checkpoints."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from falqon_fx import model_state, trees
from falqon_fx.prepare import unwrap


class CheckpointState:
    """A model, and its optimizer, for `torch.distributed.checkpoint` (its ``Stateful`` protocol):
    ``dcp.save({"falqon": CheckpointState(model, optimizer)}, checkpoint_id=...)``, and ``dcp.load``
    likewise into a model made as for the run that was saved.

    Unlike in `save_checkpoint`, all base weights are in it. ``dcp.load`` reads into the model's
    parameters itself, before anything can be compared. DCP pickles its own metadata: where files
    come from people whom you don't trust, use `load_checkpoint`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = unwrap(model), optimizer

    def state_dict(self) -> dict[str, Any]:
        """The model's tensors by name; all else, whose shapes DCP can't know before it loads, as
        the bytes of a safetensors file and text.
        """
        from safetensors.torch import save

        sites, named = model_state.collect(self.model)
        packed = {name: t for name, t in named if name.startswith(model_state.SITES)}
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        tree = trees.separate(optimizer, ".training", packed)
        return {
            "model": self.model.state_dict(),
            "packed": save(trees.unshared(packed.items())[0]),
            "text": json.dumps({"sites": sites, "optimizer": tree}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write what ``dcp.load`` has read into the model and the optimizer.

        Raises:
            FalqonError: a checkpoint of another model.
        """
        from safetensors.torch import load

        text, packed = json.loads(state["text"]), load(state["packed"])
        bases = {site.get("base") for site in text["sites"]}
        tensors = {name: t for name, t in state["model"].items() if name not in bases}
        tensors |= {n: t for n, t in packed.items() if n.startswith(model_state.SITES)}
        model_state.apply(self.model, text["sites"], tensors, "the checkpoint")
        if self.optimizer is not None:
            self.optimizer.load_state_dict(trees.join(text["optimizer"], packed))
