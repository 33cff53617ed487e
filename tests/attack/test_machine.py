"""One folder, in which all happens in any order: saves, loads, damage, kills, casts, exports.

What a read gives is the last whole state or a `FalqonError`, with nothing changed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.files import atomic, disk, storage
from tests.attack import harness
from tests.attack.checkpoints import lora, tiny
from tests.attack.writers import Layers

KINDS = st.sampled_from(["run", "fp8", "export"])
MOMENTS = ("write_tensors", "write_manifest", "rename", "flush_to_disk", "remove")


class Folder(RuleBasedStateMachine):
    """``whole`` is what each part of the folder holds if nobody damaged it: the generation of the
    checkpoint, or a checksum of the model that loads. After a kill it is one of two.
    """

    source: Path  # of `prequantize`, made once

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        around = Path(self._temporary.name)
        harness.place_victims(around)
        self.victims = harness.surroundings(around)
        self.folder = around / "folder"
        self.folder.mkdir()
        self.generation = 0
        self.whole: dict[str, set[Any]] = {}
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        around = self.folder.parent
        assert not harness.changes(self.victims, harness.surroundings(around, ["folder"]))
        self._temporary.cleanup()

    # -- writers -----------------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        self.generation += 1
        self._save()
        self._is("run", self.generation)

    def _save(self) -> None:
        extra = {"generation": self.generation}
        falqon_fx.save_checkpoint(Layers(self.generation), self.folder / "run", extra=extra)

    @rule(moment=st.sampled_from(MOMENTS), after=st.booleans(), count=st.integers(1, 4))
    def kill_a_save(self, moment: str, after: bool, count: int) -> None:
        """What was there is there, or the new is: a load says which."""
        self.generation += 1
        child = os.fork()
        if child == 0:
            code = 1
            try:
                signal.alarm(60)
                _die_at(moment, after, count)
                self._save()
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL)
        if os.WIFEXITED(status):
            self._is("run", self.generation)
        elif "run" not in self.damaged:
            self.whole.setdefault("run", {None}).add(self.generation)
        else:  # a whole new one may be over the damaged one
            self.whole["run"].add(self.generation)
        self.load("run")

    @rule(update=st.sampled_from(["adapter", "rows"]))
    def prequantize(self, update: Any) -> None:
        """Over one that is there it is refused; in place of one that was removed it is made."""
        self._make("fp8", lambda out: self._prequantized(out, update))

    def _prequantized(self, out: Path, update: Any = "adapter") -> None:
        config = FalqonConfig(update=update, init="keep")
        falqon_fx.prequantize(self.source, out, lora(), config, workers=1, progress=False)

    @rule()
    def interrupt_and_resume(self) -> None:
        """Half of the records are lost, and the next call makes them anew."""
        out, partial = self.folder / "fp8", self.folder / "fp8.partial"
        if out.exists():
            return

        with harness.interrupted():
            self._prequantized(out)
        assert not out.exists()
        for file in sorted((partial / "records").iterdir())[::2]:
            file.unlink()
        self._make("fp8", self._prequantized)

    @rule()
    def export(self) -> None:
        torch.manual_seed(self.generation)
        import peft

        model = peft.get_peft_model(tiny(), lora())
        falqon_fx.prepare(model, progress=False)
        self._make("export", lambda out: falqon_fx.save_fp8(model, out, progress=False))

    def _make(self, kind: str, write: Callable[[Path], Any]) -> None:
        out = self.folder / kind
        before = harness.surroundings(self.folder)
        if out.exists():
            with pytest.raises(FalqonError, match="exists already"):
                write(out)
            assert not harness.changes(before, harness.surroundings(self.folder))
            return
        write(out)
        self._is(kind, self._read(kind))

    def _is(self, kind: str, state: Any) -> None:
        self.whole[kind] = {state}
        self.damaged.discard(kind)

    # -- what happens to files ---------------------------------------------------------------------

    @precondition(lambda self: self.whole)
    @rule(kind=KINDS, how=st.sampled_from([harness.flipped, harness.cut]), seed=st.integers(0, 999))
    def damage(self, kind: str, how: Callable[[bytes, random.Random], bytes], seed: int) -> None:
        files = sorted(path for path in (self.folder / kind).rglob("*") if path.is_file())
        if files:
            chance = random.Random(seed)
            file = chance.choice(files)
            file.write_bytes(how(file.read_bytes(), chance))
            self.damaged.add(kind)

    @rule(kind=KINDS)
    def remove(self, kind: str) -> None:
        shutil.rmtree(self.folder / kind, ignore_errors=True)
        self.whole.pop(kind, None)
        self.damaged.discard(kind)

    # -- readers -----------------------------------------------------------------------------------

    @rule(kind=KINDS)
    def load(self, kind: str) -> None:
        """The last whole state; where the folder is damaged or was never whole, an error, too."""
        before = harness.surroundings(self.folder)
        known = self.whole.get(kind, {None})
        refused, found = None, None
        try:
            found = self._read(kind)
        except FalqonError as error:
            refused = error
        if refused is not None:
            assert refused.problem
            assert refused.remedy
            assert kind in self.damaged or None in known, refused
        else:
            assert found in known - {None}
            if kind not in self.damaged:  # which of the two it is
                self.whole[kind] = {found}
        assert not harness.changes(before, harness.surroundings(self.folder))

    def _read(self, kind: str) -> Any:
        torch.manual_seed(0)
        if kind != "run":
            return harness.contents(falqon_fx.load(self.folder / kind))
        model = Layers(-1)
        try:
            extra = falqon_fx.load_checkpoint(model, self.folder / kind)
        except FalqonError:
            assert model.generation() == -1
            raise
        assert model.generation() == extra["generation"]
        return extra["generation"]


def _die_at(name: str, after: bool, count: int) -> None:
    """Have this process, a fork, killed at the ``count``-th call of a step of a save."""
    modules = [module for module in (storage, atomic, disk) if hasattr(module, name)]
    calls = [0]
    for module in modules:
        step = getattr(module, name)

        def dying(*arguments: Any, step: Any = step, **options: Any) -> Any:
            calls[0] += 1
            last = calls[0] == count
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = step(*arguments, **options)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        setattr(module, name, dying)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Folder]:
    torch.manual_seed(0)
    tiny().save_pretrained(tmp_path / "dense", max_shard_size="12KB")
    monkeypatch.setattr(Folder, "source", tmp_path / "dense", raising=False)
    return Folder


def run(machine: type[Folder], examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=checks,
            deadline=None,
        ),
    )


@pytest.mark.filterwarnings("ignore")
def test_a_few_sequences_on_one_folder(machine):
    run(machine, 4, 12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_sequences_on_one_folder(machine):
    run(machine, 150, 40)
