"""FP8 states in the checkpoints of transformers' `Trainer`, so that a run resumes bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falqon_fx.checkpoint import MANIFEST, load_checkpoint, read_extra, save_checkpoint

FOLDER = "falqon"


class TrainerCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Writes a `falqon_fx.save_checkpoint` into each ``checkpoint-N`` folder and loads it where the
    trainer resumes from one; optimizer, schedule and random numbers stay the trainer's own.

    A trainer that resumes from outside ``output_dir`` must have the folder's path in
    ``TrainingArguments(resume_from_checkpoint=...)``.
    """

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the trainer wrote its own files."""
        model = kwargs["model"]
        folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}", FOLDER)
        if state.is_world_process_zero and folder.parent.is_dir():
            save_checkpoint(model, folder, extra={"step": state.global_step}, rng=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the trainer loaded its own files."""
        if state.global_step == 0:
            return
        folder = self._find(args, state.global_step)
        if folder is None:
            warnings.warn(
                f"falqon: training resumes at step {state.global_step}, but no FP8 state of that "
                "step was found: FP8 weights start anew from the base weights and the adapter. Set "
                "TrainingArguments(resume_from_checkpoint=...) to the folder that holds it.",
                stacklevel=2,
            )
        else:
            load_checkpoint(kwargs["model"], folder, rng=False)

    def _find(self, args: TrainingArguments, step: int) -> Path | None:
        places = [Path(str(args.output_dir), f"checkpoint-{step}")]
        if isinstance(args.resume_from_checkpoint, str):
            places.insert(0, Path(args.resume_from_checkpoint))
        for place in places:
            folder = place / FOLDER
            if (folder / MANIFEST).is_file() and read_extra(folder).get("step") == step:
                return folder
        return None
