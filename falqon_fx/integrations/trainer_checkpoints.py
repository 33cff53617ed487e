"""What transformers' `Trainer` doesn't save by itself, in its own checkpoints."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falqon_fx.config import FalqonConfig
from falqon_fx.files import storage
from falqon_fx.files.atomic import atomic_file
from falqon_fx.files.checkpoint import MANIFEST, load_checkpoint, read_extra, save_checkpoint
from falqon_fx.model.fp8_linear import Fp8Linear, made_terms
from falqon_fx.rows import model as rows_model
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.sharded import hashes, is_sharded

FOLDER = "falqon"
BASE = "falqon_base.json"  # beside an adapter: what tells its base from others


class TrainerCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Lets the trainer resume bit for bit where its own ``checkpoint-N`` folders are not enough.

    Of a PEFT model they are: A, B and the optimizer are all that training changes. The base must be
    the same again, with a calibration of the same batches, or one that was saved once
    (`falqon_fx.save_checkpoint`) and loaded before each training: of what `prepare` made a hash
    goes into the folder, and a run that resumes on another base is warned. With
    update="rows" the FP8 weights are trained too, and what `prepare` made of a model that is not
    PEFT's has no place in a model that isn't prepared yet: then a `falqon_fx.save_checkpoint` goes
    into each folder, and is loaded from there. Optimizer, schedule and random numbers stay the
    trainer's own.

    A trainer that resumes from outside ``output_dir`` must have the folder's path in
    ``TrainingArguments(resume_from_checkpoint=...)``.
    """

    config: FalqonConfig | None = None  # of the backend, where it is known

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the trainer wrote its own files."""
        model = kwargs["model"]
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}", FOLDER)
        mine = state.is_world_process_zero and folder.parent.is_dir()
        if not (is_sharded(model) or mine):
            return
        if _trainer_lacks(model):
            save_checkpoint(model, folder, extra={"step": state.global_step}, rng=False)
            return
        base = _base_of(model)
        if mine and base["prepared"] is not None:
            with atomic_file(folder.parent / BASE) as file:
                file.write_text(json.dumps({"step": state.global_step, **base}))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the trainer loaded its own files."""
        if state.global_step == 0:
            return
        folder = self._find(args, state.global_step)
        if folder is not None:
            load_checkpoint(kwargs["model"], folder, rng=False)
            return
        rows = self.config is not None and self.config.update == "rows"
        if rows or _trainer_lacks(kwargs["model"]):
            warnings.warn(
                f"falqon: training resumes at step {state.global_step}, but no FP8 state of that "
                "step was found: FP8 weights start anew from the base weights and the adapter. Set "
                "TrainingArguments(resume_from_checkpoint=...) to the folder that holds it.",
                stacklevel=2,
            )
            return
        base = _base_of(kwargs["model"])  # all processes of a sharded model ask
        if self._on_another_base(args, state.global_step, base):
            warnings.warn(
                f"falqon: training resumes at step {state.global_step} on another base than it was "
                "saved on: what prepare() made of it differs, as with a calibration of other "
                "batches or none, so the run goes on with other numbers. Prepare the same model "
                "with the same config and batches, or save the prepared model once with "
                "falqon_fx.save_checkpoint and load that with falqon_fx.load_checkpoint before "
                "each training.",
                stacklevel=2,
            )

    def _on_another_base(
        self, args: TrainingArguments, step: int, base: dict[str, str | None]
    ) -> bool:
        """Whether the folder of that step says so. Without a calibration the base of a model that
        isn't prepared is made in its first call, the same one.
        """
        for place in self._places(args, step):
            file = place / BASE
            if not file.is_file():
                continue
            saved = storage.parse_json(file, file.read_bytes())
            if not isinstance(saved, dict):
                raise storage.DamagedFileError(file, "it is no description of a base")
            if saved.get("step") == step:
                prepared = base["prepared"] in (None, saved.get("prepared"))
                return not prepared or base["calibration"] != saved.get("calibration")
        return False

    def _places(self, args: TrainingArguments, step: int) -> Iterator[Path]:
        if isinstance(args.resume_from_checkpoint, str):
            yield Path(args.resume_from_checkpoint)
        yield Path(str(args.output_dir), f"checkpoint-{step}")

    def _find(self, args: TrainingArguments, step: int) -> Path | None:
        for place in self._places(args, step):
            folder = place / FOLDER
            if (folder / MANIFEST).is_file() and read_extra(folder).get("step") == step:
                return folder
        return None


def _trainer_lacks(model: nn.Module) -> bool:
    """Whether a model's FP8 weights must be in a checkpoint that the trainer's files are not enough
    for.
    """
    if rows_model.adapters(model):
        return True
    prepared = any(isinstance(module, Fp8Linear) for module in model.modules())
    return prepared and not hasattr(model, "get_base_model")


def _base_of(model: nn.Module) -> dict[str, str | None]:
    """Hashes of what `prepare` made of a model, and of what its calibration added; None where there
    is none of it. All processes of a sharded model call this.
    """
    digests = {
        without_wrappers(path): module.whole_digest()
        for path, module in model.named_modules()
        if isinstance(module, Fp8Linear)
    }
    made = {"prepared": digests, "calibration": made_terms(model)}
    return {
        name: storage.json_checksum(hashes(tensors)) if tensors else None
        for name, tensors in made.items()
    }
