"""Flipped bytes, cut and swapped files, of every kind that is read: nothing, all, or an explained
refusal.

Each kind is a folder, how it is read, and the files that are damaged one by one. `KINDS` says how
many flips the slow test makes of each; the fast one makes `FEW`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.kernels.cache import store
from falqon_fx.kernels.products.choice import Choices
from falqon_fx_cli.main import main
from tests.attack import harness
from tests.models import fill_b, tiny_mlp

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

FEW = 24


@dataclass
class Kind:
    """``attack`` reads the folder with a damaged file in it."""

    files: list[Path]
    attack: Callable[[], harness.Verdict]
    unsealed: tuple[str, ...] = ()

    def one(self, path: Path, content: bytes) -> harness.Verdict:
        with harness.damaged(path, content):
            found = self.attack()
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
    before = [p.detach().clone() for p in loaded[0].parameters()]
    whole = _state(saved)

    def attack() -> harness.Verdict:
        with torch.no_grad():
            for p, value in zip(loaded[0].parameters(), before, strict=True):
                p.copy_(value)
        return harness.verdict(load, state, whole)

    return Kind(sorted(folder.iterdir()), attack)


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
    _tiny().save_pretrained(folder / "dense")
    config = FalqonConfig(update=update)
    falqon_fx.prequantize(
        folder / "dense", folder / "out", _lora(), config, workers=1, progress=False
    )
    return _of_load(folder / "out")


def of_fp8(folder: Path) -> Kind:
    """An export, in several files."""
    torch.manual_seed(0)
    model = peft.get_peft_model(_tiny(), _lora())
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_fp8(model, folder / "out", max_shard_size="12KB", progress=False)
    return _of_load(folder / "out")


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


def _tiny() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def _lora() -> Any:
    return peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def of_dense(folder: Path) -> Kind:
    """The source of `prequantize`; what it leaves is nothing, or a folder that loads."""
    torch.manual_seed(0)
    source, out = folder / "dense", folder / "out"
    _tiny().save_pretrained(source, max_shard_size="12KB")

    def run() -> None:
        falqon_fx.prequantize(source, out, _lora(), workers=1, progress=False)

    run()
    whole = harness.tree(out)

    def attack() -> harness.Verdict:
        for path in (out, out.with_name("out.partial")):
            shutil.rmtree(path, ignore_errors=True)
        return harness.verdict(run, lambda: harness.tree(out) if out.exists() else {}, whole)

    files = sorted(path for path in source.iterdir() if path.is_file())
    return Kind(files, attack, tuple(path.name for path in files))


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
    before = [p.detach().clone() for p in loaded.parameters()]

    def attack() -> harness.Verdict:
        with torch.no_grad():
            for p, value in zip(loaded.parameters(), before, strict=True):
                p.copy_(value)
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

    return Kind([file], attack)


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
    )


def of_sources(folder: Path) -> Kind:
    """The generated sources, which are written anew where they differ."""
    text = "def kernel():\n    return 1\n" * 20
    path = store(text, "kernel", folder)

    def attack() -> harness.Verdict:
        store(text, "kernel", folder)
        return "whole" if path.read_text() == text else "bad: it stays damaged"

    return Kind([path], attack)


KINDS: dict[str, tuple[Callable[[Path], Kind], int]] = {
    "checkpoint": (of_checkpoint, 1500),
    "checkpoint of rows": (functools.partial(of_checkpoint, update="rows"), 800),
    "checkpoint of a model not prepared": (functools.partial(of_checkpoint, prepared=False), 400),
    "prequantized": (of_prequantized, 900),
    "prequantized rows": (functools.partial(of_prequantized, update="rows"), 300),
    "export": (of_fp8, 600),
    "source of prequantize": (of_dense, 200),
    "trainer": (of_trainer, 400),
    "report": (of_report, 300),
    "choices": (of_choices, 300),
    "sources": (of_sources, 200),
}


def damages(kind: Kind, count: int, seed: int) -> Iterator[Callable[[], harness.Verdict]]:
    """``count`` flips, and a tenth as many cuts, over the files in turn."""
    chance = random.Random(seed)
    for i in range(count + count // 10):
        path = kind.files[i % len(kind.files)]
        damage = harness.flipped if i < count else harness.cut
        yield functools.partial(kind.one, path, damage(path.read_bytes(), chance))


def swaps(kind: Kind) -> Iterator[Callable[[], harness.Verdict]]:
    for path, content in harness.swapped(kind.files):
        yield functools.partial(kind.one, path, content)


@pytest.mark.parametrize("name", KINDS)
def test_a_few_flips(tmp_path, name):
    kind = KINDS[name][0](tmp_path)
    count = FEW if name != "source of prequantize" else 8
    assert kind.attack() in ("whole", "before"), "undamaged"
    harness.counted(harness.verdicts([*damages(kind, count, seed=0)]))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_flips(tmp_path, name, capsys):
    """5,600 flips in all, 560 cuts, and every file with the content of every other one."""
    make, count = KINDS[name]
    kind = make(tmp_path)
    attacks = [*damages(kind, count, seed=1), *swaps(kind)]
    found = harness.counted(harness.verdicts(attacks))
    with capsys.disabled():
        print(f"\n{name}: {len(attacks)} damages, {dict(found)}")
