"""Every kind of file that is read: a folder, how it is read, and the files that are damaged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.cost import cards
from falqon_fx.kernels.cache import store
from falqon_fx.kernels.products.choice import Choices
from falqon_fx_cli.main import main
from tests.attack import harness
from tests.attack.checkpoints import fp8_of_others, lora, tiny
from tests.models import fill_b, tiny_mlp


@dataclass
class Kind:
    """``attack`` reads the folder with a damaged file in it. What it makes of a file without a
    checksum (``unsealed``) may be something else; what it writes lies in ``own``.
    """

    files: list[Path]
    attack: Callable[[], harness.Verdict]
    unsealed: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    around: Path = Path()  # what is watched

    def one(self, path: Path, content: bytes) -> harness.Verdict:
        own = [str(Path("kind", name)) for name in self.own]
        with harness.damaged(path, content):
            before = harness.surroundings(self.around, own)
            found = self.attack()
            changed = harness.changes(before, harness.surroundings(self.around, own))
        if changed:
            return f"bad: wrote {changed}"
        unsealed = path.name in self.unsealed and found.startswith("bad: neither")
        return "another" if unsealed else found


def of_checkpoint(folder: Path, update: Any = "adapter", prepared: bool = True) -> Kind:
    """Into a model of other values, with an optimizer and a scheduler."""
    saved, loaded = (_run(seed, update, prepared) for seed in (0, 1))
    parts = dict(zip(("optimizer", "scheduler"), saved[1:], strict=True))
    falqon_fx.save_checkpoint(saved[0], folder, **parts, extra={"step": 3, "t": torch.ones(3)})
    state = functools.partial(_state, loaded)
    load = functools.partial(
        falqon_fx.load_checkpoint, loaded[0], folder, optimizer=loaded[1], scheduler=loaded[2]
    )
    reset, whole = _resetter(loaded), _state(saved)

    def attack() -> harness.Verdict:
        reset()
        return harness.verdict(load, state, whole)

    return Kind(sorted(folder.iterdir()), attack)


def of_distributed(folder: Path) -> Kind:
    """What `CheckpointState` gets from torch's distributed checkpoint, whose own files are torch's
    to check: its text, what is packed, and each tensor.
    """
    saved, loaded = (_run(seed, "adapter", True) for seed in (0, 1))
    state = falqon_fx.CheckpointState(*saved[:2]).state_dict()
    packed, text, model = folder / "packed", folder / "text", state["model"]
    packed.write_bytes(state["packed"])
    text.write_text(state["text"], encoding="utf-8")
    tensors = {name: folder / f"tensor-{i}" for i, name in enumerate(model)}
    for name, file in tensors.items():
        file.write_bytes(bytes(model[name].contiguous().view(torch.uint8).flatten().tolist()))
    reset = _resetter(loaded)

    def read(name: str) -> torch.Tensor:
        """As long as the tensor is, since DCP reads into tensors of the model's sizes."""
        size = model[name].nbytes
        content = tensors[name].read_bytes()[:size].ljust(size, b"\0")
        return torch.frombuffer(bytearray(content), dtype=model[name].dtype).view_as(model[name])

    def load() -> None:
        found = {"packed": packed.read_bytes(), "text": text.read_text(errors="replace")}
        state = {**found, "model": {name: read(name) for name in tensors}}
        falqon_fx.CheckpointState(*loaded[:2]).load_state_dict(state)

    def attack() -> harness.Verdict:
        reset()
        return harness.verdict(load, lambda: _state((*loaded[:2], saved[2])), _state(saved))

    return Kind(sorted(folder.iterdir()), attack, unsealed=("text",))


def _resetter(run: tuple[Any, ...]) -> Callable[[], None]:
    """Brings a model, an optimizer and a scheduler back to what they are now."""
    before = [p.detach().clone() for p in run[0].parameters()]
    states = [copy.deepcopy(part.state_dict()) for part in run[1:]]

    def reset() -> None:
        with torch.no_grad():
            for p, value in zip(run[0].parameters(), before, strict=True):
                p.copy_(value)
        for part, state in zip(run[1:], states, strict=True):
            part.load_state_dict(copy.deepcopy(state))

    return reset


def _run(seed: int, update: Any, prepared: bool) -> tuple[Any, Any, Any]:
    torch.manual_seed(seed)
    model = tiny_mlp()
    fill_b(model, 0.1, seed)
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(update=update), progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1 + seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for p in trained:
        p.grad = torch.full_like(p, 1.0 + seed)
    optimizer.step()
    scheduler.step()
    return model, optimizer, scheduler


def _state(run: tuple[Any, Any, Any]) -> str:
    return harness.contents(run[0], run[1].state_dict(), run[2].state_dict())


def of_prequantized(folder: Path, update: Any = "adapter") -> Kind:
    torch.manual_seed(0)
    tiny().save_pretrained(folder / "dense")
    config = FalqonConfig(update=update)
    falqon_fx.prequantize(
        folder / "dense", folder / "out", lora(), config, workers=1, progress=False
    )
    return _of_load(folder / "out")


def of_fp8(folder: Path) -> Kind:
    """An export, in several files."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), lora())
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_fp8(model, folder / "out", max_shard_size="12KB", progress=False)
    return _of_load(folder / "out")


def of_others(folder: Path) -> Kind:
    """An FP8 checkpoint that has no checksums: a model, or a refusal."""
    torch.manual_seed(0)
    return _of_load(fp8_of_others(folder))


def _of_load(folder: Path) -> Kind:
    def load() -> str:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return harness.contents(falqon_fx.load(folder))

    found = [whole := load()]

    def attack() -> harness.Verdict:
        found[0] = "nothing"
        return harness.verdict(lambda: found.__setitem__(0, load()), lambda: found[0], whole)

    # Where no checksum covers a file, another value in it is another model, and no error.
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = folder / "falqon.json"
    sealed = manifest.read_text() if manifest.is_file() else ""
    names = [path.name for path in files if path != manifest]
    return Kind(files, attack, tuple(name for name in names if name not in sealed))


def of_dense(folder: Path) -> Kind:
    """The source of `prequantize`; what it leaves is nothing, or a folder that loads."""
    torch.manual_seed(0)
    source, out = folder / "dense", folder / "out"
    tiny().save_pretrained(source, max_shard_size="12KB")

    def run() -> None:
        falqon_fx.prequantize(source, out, lora(), workers=1, progress=False)

    run()
    whole = harness.tree(out)

    def attack() -> harness.Verdict:
        for path in (out, out.with_name("out.partial")):
            shutil.rmtree(path, ignore_errors=True)
        return harness.verdict(run, lambda: harness.tree(out) if out.exists() else {}, whole)

    files = sorted(path for path in source.iterdir() if path.is_file())
    unsealed = tuple(path.name for path in files)
    return Kind(files, attack, unsealed, own=("out", "out.partial"))


def of_partial(folder: Path) -> Kind:
    """What an interrupted `prequantize` left: the next goes on with it, or refuses. What is damaged
    and taken is refused by who loads it.
    """
    torch.manual_seed(0)
    source, out, left = folder / "dense", folder / "out", folder / "left"
    tiny().save_pretrained(source, max_shard_size="12KB")

    def run() -> None:
        falqon_fx.prequantize(source, out, lora(), workers=1, progress=False)

    with harness.interrupted():
        run()
    partial = out.with_name("out.partial")
    partial.rename(left)
    run()
    whole = harness.tree(out)

    def attack() -> harness.Verdict:
        shutil.rmtree(out, ignore_errors=True)
        harness.copy_of(left, partial)
        found = harness.verdict(run, lambda: harness.tree(out) if out.exists() else {}, whole)
        if not found.startswith("bad: neither"):
            return found
        try:
            falqon_fx.load(out)
        except FalqonError:
            return "refused by who loads it"
        return found

    files = sorted(path for path in left.rglob("*") if path.is_file())
    return Kind(files, attack, own=("out", "out.partial"))


def of_trainer(folder: Path) -> Kind:
    """What `TrainerCheckpoints` finds beside the trainer's own files."""
    from falqon_fx.integrations.trainer_checkpoints import FOLDER, TrainerCheckpoints

    saved, loaded = (_run(seed, "rows", True)[0] for seed in (0, 1))
    args: Any = transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    state: Any = transformers.TrainerState(global_step=3)
    inside = folder / "checkpoint-3" / FOLDER
    inside.parent.mkdir()
    callback = TrainerCheckpoints()
    control: Any = transformers.TrainerControl()
    callback.on_save(args, state, control, model=saved)
    reset = _resetter((loaded,))

    def attack() -> harness.Verdict:
        reset()
        return harness.verdict(
            lambda: callback.on_train_begin(args, state, control, model=loaded),
            lambda: harness.contents(loaded),
            harness.contents(saved),
        )

    return Kind(sorted(inside.iterdir()), attack)


def of_report(folder: Path) -> Kind:
    """The report that ``falqon-fx repro`` reads; what loads is a report, if another one."""
    report = falqon_fx.explain(tiny_mlp(), torch.randn(4, 32))
    file, program = folder / "report.json", folder / "program.py"
    file.write_text(report.to_json(), encoding="utf-8")

    def attack() -> harness.Verdict:
        return harness.verdict(lambda: _repro(file, program), lambda: "", "")

    return Kind([file], attack, own=("program.py",))


def _repro(file: Path, program: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        code = main(["repro", str(file), "--write", str(program)])
    if code:
        text = said.getvalue()
        assert "Traceback" not in text, text
        raise FalqonError("", text, "as it says")


def of_choices(folder: Path) -> Kind:
    """What was fastest: a damaged file is as none."""
    made = {"a": lambda: None, "b": lambda: None}

    def choose() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FALQON_CACHE", str(folder))
            return Choices("here", lambda run: 1.0).get("problem", made).winner

    choose()
    return Kind(
        sorted(folder.iterdir()),
        lambda: harness.verdict(choose, lambda: "a choice", "a choice"),
        own=(".",),
    )


def of_cards(folder: Path) -> Kind:
    """Calibrated cards; what loads are cards, if of other figures."""
    card = dataclasses.asdict(cards.find("H100")) | {"name": "mine"}
    (folder / "cards.json").write_text(json.dumps({"mine": card}, indent=1), encoding="utf-8")
    found: list[Any] = [None]

    def read() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FALQON_CACHE", str(folder))
            found[0] = repr(cards.calibrated())

    read()
    whole = found[0]

    def attack() -> harness.Verdict:
        found[0] = None
        return harness.verdict(read, lambda: found[0], whole)

    return Kind([folder / "cards.json"], attack, unsealed=("cards.json",))


def of_sources(folder: Path) -> Kind:
    """The generated sources, which are written anew where they differ."""
    text = "def kernel():\n    return 1\n" * 20
    path = store(text, "kernel", folder)

    def attack() -> harness.Verdict:
        store(text, "kernel", folder)
        return "whole" if path.read_text() == text else "bad: it stays damaged"

    return Kind([path], attack, own=(".",))


KINDS: dict[str, tuple[Callable[[Path], Kind], int]] = {
    "checkpoint": (of_checkpoint, 1500),
    "checkpoint of rows": (functools.partial(of_checkpoint, update="rows"), 800),
    "checkpoint of a model not prepared": (functools.partial(of_checkpoint, prepared=False), 400),
    "distributed checkpoint": (of_distributed, 600),
    "prequantized": (of_prequantized, 900),
    "prequantized rows": (functools.partial(of_prequantized, update="rows"), 300),
    "export": (of_fp8, 600),
    "FP8 of others": (of_others, 300),
    "source of prequantize": (of_dense, 200),
    "interrupted prequantize": (of_partial, 200),
    "trainer": (of_trainer, 400),
    "report": (of_report, 300),
    "choices": (of_choices, 300),
    "cards": (of_cards, 200),
    "sources": (of_sources, 200),
}
