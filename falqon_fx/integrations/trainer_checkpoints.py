"""What transformers' `Trainer` doesn't save by itself, in its own checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falqon_fx.config import FalqonConfig
from falqon_fx.files.checkpoint import MANIFEST, load_checkpoint, read_extra, save_checkpoint
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows import model as rows_model
from falqon_fx.site.sharded import is_sharded

FOLDER = "falqon"


class TrainerCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Lets the trainer resume bit for bit where its own ``checkpoint-N`` folders are not enough.

    Of a PEFT model they are: A, B and the optimizer are all that training changes. With
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
        if (mine or is_sharded(model)) and _trainer_lacks(model):
            save_checkpoint(model, folder, extra={"step": state.global_step}, rng=False)

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

    def _find(self, args: TrainingArguments, step: int) -> Path | None:
        places = [Path(str(args.output_dir), f"checkpoint-{step}")]
        if isinstance(args.resume_from_checkpoint, str):
            places.insert(0, Path(args.resume_from_checkpoint))
        for place in places:
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
