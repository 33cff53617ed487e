"""The long run with torch's own backends, without falqon-fx: what each compilation leaves then."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from tests.attack.held import compilations
from tests.attack.long_run import LongRun


class TorchRun(LongRun):
    """The same model, steps and events; where an event is falqon-fx's alone, what is nearest."""

    def __init__(self, folder: Path, inner: str, prepared: bool) -> None:
        super().__init__(folder, inner, prepared=False)

    def compile(self) -> None:
        torch._dynamo.reset()
        compilations.listen()
        self.call = torch.compile(self.model, backend=self.inner, dynamic=False)

    def save(self, folder: Path) -> None:
        parts = (self.model, self.optimizer, self.scheduler)
        folder.mkdir(exist_ok=True)
        states = [part.state_dict() for part in parts]
        torch.save([*states, torch.get_rng_state(), self.step, self.losses], folder / "state.pt")

    def load(self, folder: Path) -> None:
        *states, random, self.step, self.losses = torch.load(folder / "state.pt")
        for part, state in zip((self.model, self.optimizer, self.scheduler), states, strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(random)

    def prepare_or_restore(self) -> None:
        self.compile()

    def merge_a_copy(self) -> None:
        assert copy.deepcopy(self.model).merge_and_unload()(self.x()).isfinite().all()

    def explain(self) -> None:
        model, x = copy.deepcopy(self.model), self.x()
        torch.compile(model, backend="eager", dynamic=False)(x)

    def watch(self) -> None:
        self.evaluate()

    def fail_to_save(self) -> None:
        """There is nothing of falqon-fx's to fail."""

    def fail_to_load(self) -> None:
        """As above."""
