"""`falqon_fx.integrations.trainer_checkpoints`, where it used to be."""

from falqon_fx.integrations.trainer_checkpoints import TrainerCheckpoints

__all__ = ["TrainerCheckpoints"]
