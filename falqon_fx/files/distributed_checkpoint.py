"""`CheckpointState`: models and optimizers in torch's distributed checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files import model_state, storage, training, trees
from falqon_fx.model.fp8_linear import refuse_parts
from falqon_fx.model.lora_layers import unwrap
from falqon_fx.site.numerics import dtype_name
from falqon_fx.site.sharded import copied, gathered, hashes, settle

_MAKE = "Make the model as for the run that was saved"


class CheckpointState:
    """A model, and its optimizer, for `torch.distributed.checkpoint` (its ``Stateful`` protocol):
    ``dcp.save({"falqon": CheckpointState(model, optimizer)}, checkpoint_id=...)``, and ``dcp.load``
    likewise into a model made as for the run that was saved.

    Sharded models are saved by as many processes as there are, each its own parts, and loaded by as
    many, or others; ``dcp.async_save`` works too. The optimizer's states, those of A and B alone,
    are gathered.

    Unlike in `save_checkpoint`, all base weights are in it. ``dcp.load`` reads into the tensors it
    is given before anything can be compared, so it is given copies, on the CPU: each save and load
    holds there once more what its process has of the model. It writes over the files of an earlier
    save in place: give each save a folder of its own; what an interrupted one mixed is refused by
    its checksums. DCP pickles its own metadata: where files come from people whom you don't trust,
    use `load_checkpoint`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = unwrap(model), optimizer
        refuse_parts(self.model, "CheckpointState")

    def state_dict(self) -> dict[str, Any]:
        """The model's tensors by name; all else, whose shapes DCP can't know before it loads, as
        the bytes of a safetensors file and text.
        """
        from safetensors.torch import save

        settle(self.model)
        sites, named = model_state.snapshot(self.model)
        packed = {name: t for name, t in named if name.startswith(model_state.SITES)}
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        tree = trees.to_plain(optimizer, ".training", packed)
        known = dict(named)  # where tensor parallelism has cut W, the digest of all of it
        model = {name: copied(known.get(name, t)) for name, t in self.model.state_dict().items()}
        kept, same = trees.unshared((name, gathered(t)) for name, t in packed.items())
        packed_bytes = save(kept)
        text = {"sites": sites, "optimizer": tree, "dtypes": _dtypes(model), "same": same}
        text["sums"] = _sums(model, packed_bytes)
        text["checksum"] = storage.json_checksum(text)
        return {"model": model, "packed": packed_bytes, "text": json.dumps(text)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write what ``dcp.load`` has read into the model and the optimizer.

        Raises:
            FalqonError: a checkpoint of another model, or of another optimizer. Nothing has been
                changed then.
        """
        storage.require("safetensors", "checkpoint")
        from safetensors.torch import load

        where, place = "the checkpoint", Path("the checkpoint")
        for part, kind in (("text", str), ("packed", bytes)):  # DCP unpickles whatever is there
            if type(state[part]) is not kind:
                problem = f"its {part!r} is {type(state[part]).__name__}, not {kind.__name__}"
                raise storage.DamagedFileError(place, problem)
        text = storage.parse_json(place, state["text"])
        if not isinstance(text, dict) or not storage.has_own_checksum(place, text):
            raise storage.DamagedFileError(place, "the checksum of its text is wrong")
        storage.check_form(place, text, "distributed")
        with storage.file_errors_explained(place):
            packed = load(state["packed"])
        packed |= trees.shared_again(text["same"], packed, where)
        saved = trees.from_plain(text["optimizer"], packed, where)
        if self.optimizer is not None:
            training.check_optimizer(self.optimizer, saved, where)
            saved = training.cut_as(self.optimizer, saved)
        _compare(state["model"], state["packed"], text, where)
        states = {n: t for n, t in packed.items() if n.startswith(model_state.SITES)}
        tensors = {**state["model"], **states}
        model_state.check(self.model, text["sites"], tensors, where)
        if self.optimizer is not None:
            training.load_all([("optimizer", self.optimizer, saved)], where)
        model_state.write(self.model, text["sites"], tensors)


def _compare(model: Mapping[str, Tensor], packed: Any, text: Mapping[str, Any], where: str) -> None:
    """Raise a `FalqonError` where what was read is not of the names, dtypes and contents of what
    was saved.
    """
    ours, theirs = _dtypes(model), text["dtypes"]
    for name in sorted(theirs.keys() ^ ours.keys()):
        there, here = (where, "the model") if name in theirs else ("the model", where)
        raise FalqonError(name, f"it is in {there} but not in {here}", _MAKE)
    for name, dtype in theirs.items():
        if dtype != ours[name]:  # DCP converts without a word
            raise FalqonError(name, f"{where} has it in {dtype}, the model in {ours[name]}", _MAKE)
    sums, found = text["sums"], _sums(model, packed)
    for name in found:  # DCP writes over the files of an earlier save
        if sums.get(name) != found[name]:
            raise FalqonError(
                name,
                f"{where} holds another than was saved with the rest: a save into the same "
                "folder was interrupted, or the file is damaged",
                "Load another, and give each save a folder of its own",
            )


def _sums(tensors: Mapping[str, Tensor], packed: Any) -> dict[str, str]:
    """The checksum of each tensor, whoever holds parts of it, and of what is packed beside them."""
    sums = {name: f"{number % 2**64:016x}" for name, number in hashes(tensors).items()}
    return {**sums, "optimizer and states": storage.checksum(packed)}


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
