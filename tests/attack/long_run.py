"""A training run in which things happen that must change nothing, as a script for its processes:

    python -m tests.attack.long_run FOLDER --inner inductor --prepared --last 334 --every 2

It goes on from the checkpoint in FOLDER and leaves one there, with the losses, and beside it what
the process held: memory, live tensors, threads and open files.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import importlib
import json
import pickle
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from tests.attack.held import Look, always_compiled, compilations, held
from tests.models import WIDTH, Net
from tests.sites import randn


@functools.cache
def _config(inner: str) -> FalqonConfig:
    """One for all: what was given to `torch.compile` stays with each thread that ran the code."""
    return FalqonConfig(inner=inner)


class LongRun:
    """Model, optimizer, schedule, and what may happen to them between two steps."""

    def __init__(self, folder: Path, inner: str, prepared: bool) -> None:
        self.folder, self.inner, self.prepared = folder, inner, prepared
        torch.manual_seed(0)
        lora: dict[str, Any] = {"target_modules": ["up", "down"], "lora_dropout": 0.0}
        net = Net()
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in net.named_parameters()
            if name.endswith("weight")
        }
        model: Any = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, **lora))
        model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=3, **lora))
        with torch.no_grad():
            for i, (name, p) in enumerate(model.named_parameters()):
                if "lora_B" in name:
                    p.copy_(randn(*p.shape, seed=i) / 16)
        self.model = model
        self.config = _config(inner)
        if prepared:
            falqon_fx.prepare(model, self.config, progress=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [10, 100, 500])
        self.step, self.losses = 0, list[str]()
        self.held: list[Look] = []
        self.compile()

    def compile(self) -> None:
        torch._dynamo.reset()
        compilations.listen()
        self.call = torch.compile(
            self.model,
            backend="falqon",
            options=dict[str, Any](config=self.config),
            dynamic=False,  # or a bad batch would give the next graph sizes that are symbols
        )

    def save(self, folder: Path) -> None:
        falqon_fx.save_checkpoint(
            self.model,
            folder,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            extra={"step": self.step, "losses": self.losses},
        )

    def load(self, folder: Path) -> None:
        extra = falqon_fx.load_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )
        self.step, self.losses = extra["step"], extra["losses"]

    def train(self, last: int, events: Sequence[Event] = (), every: int = 1) -> None:
        """With one of ``events`` after ``every`` so many steps, in turn."""
        while self.step < last:
            self._train_step()
            if events and self.step % every == 0:
                place = self.step // every % len(events)
                getattr(self, events[place].__name__)()
                if place == len(events) - 1:  # nothing is compiled now
                    self.held.append(held())

    def _train_step(self) -> None:
        parts = 1 + self.step // 10 % 2  # gradient accumulation, which comes and goes
        total = 0.0
        for part in range(parts):
            x, noise = self.x(part), torch.rand(4, WIDTH)
            loss = (self.call(x) - x / 2 - noise / 8).square().mean() / parts
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(total.hex())

    def x(self, part: int = 0) -> Tensor:
        return randn(4, WIDTH, seed=2 * self.step + part)

    def found(self) -> list[Tensor]:
        """What must be equal at the end: A, B and the optimizer."""
        slots = self.optimizer.state_dict()["state"].values()
        own = [p.detach() for n, p in self.model.named_parameters() if "lora_" in n]
        return own + [slot[name] for slot in slots for name in sorted(slot)]

    # -- events ------------------------------------------------------------------------------------

    def evaluate(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            y: Tensor = self.call(self.x())
        self.model.train()
        return y

    def infer(self) -> None:
        self.model.eval()
        with torch.inference_mode():
            self.call(self.x())
        self.model.train()

    def evaluate_in_threads(self) -> None:
        self.model.eval()
        expected, given, results = self.evaluate(), self.x(), list[Tensor]()
        self.model.eval()

        def work() -> None:
            with torch.no_grad():
                results.append(self.call(given))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.model.train()
        assert len(results) == 4
        assert all(torch.equal(y, expected) for y in results)

    def switch_adapters(self) -> None:
        self.model.set_adapter("other")
        self.evaluate()
        self.model.set_adapter("default")

    def switch_off(self) -> None:
        with self.model.disable_adapter():
            self.evaluate()

    def scale(self) -> None:
        layers = [m for m in self.model.modules() if hasattr(m, "set_scale")]
        for factor in (3.0, 1.0):
            for layer in layers:
                layer.set_scale("default", factor)
            self.evaluate()

    def back_and_forth(self) -> None:
        """Gradients that are thrown away."""
        self.call(self.x()).square().mean().backward()
        self.optimizer.zero_grad()

    def save_and_restore(self) -> None:
        self.save(self.folder / "saved")
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        torch.rand(3)
        self.load(self.folder / "saved")

    def resume(self) -> None:
        """As another process would: model, optimizer and schedule made anew."""
        self.save(self.folder / "saved")
        other = type(self)(self.folder, self.inner, self.prepared)
        other.load(self.folder / "saved")
        vars(self).update({n: v for n, v in vars(other).items() if n != "held"})

    def prepare_or_restore(self) -> None:
        """From plain base weights to FP8 and back; where the run is a prepared one, to plain ones
        that hold dq(W), whose cast is W again.
        """
        if not isinstance(self.model.base_model.model.plain, Fp8Linear):
            falqon_fx.prepare(self.model, self.config, progress=False)
        else:
            falqon_fx.restore(self.model)
            if self.prepared:
                falqon_fx.prepare(self.model, self.config, progress=False)
            else:
                net = self.model.base_model.model
                with torch.no_grad():
                    for name, weight in self.weights.items():
                        layer = net.get_submodule(name.removesuffix(".weight"))
                        getattr(layer, "base_layer", layer).weight.copy_(weight)
        self.compile()

    def merge_a_copy(self) -> None:
        merged = falqon_fx.merge_and_unload(copy.deepcopy(self.model))
        assert merged(self.x()).isfinite().all()
        if not isinstance(self.model.base_model.model.plain, Fp8Linear):
            other = copy.deepcopy(self.model)
            other.merge_adapter()
            other.unmerge_adapter()

    def copy_and_pickle(self) -> None:
        other = pickle.loads(pickle.dumps(copy.deepcopy(self.model)))
        assert other.eval()(self.x()).isfinite().all()

    def load_own_state(self) -> None:
        self.model.load_state_dict({n: t.clone() for n, t in self.model.state_dict().items()})
        self.model.save_pretrained(self.folder / "adapter")

    def explain(self) -> None:
        assert falqon_fx.explain(self.model, self.x(), config=self.config).sites

    def watch(self) -> None:
        with falqon_fx.watch(self.model):
            self.evaluate()

    def fail_to_save(self) -> None:
        file = self.folder / "file"
        file.touch()
        for folder, extra in ((file / "saved", {}), (self.folder / "saved", {"no": object()})):
            with pytest.raises(FalqonError):
                falqon_fx.save_checkpoint(self.model, folder, extra=extra)

    def fail_to_load(self) -> None:
        with pytest.raises(FalqonError):
            falqon_fx.load_checkpoint(self.model, self.folder / "nowhere")

    def meet_a_bad_batch(self) -> None:
        """Of another width."""
        for bad in (torch.ones(4, WIDTH - 1), torch.ones(WIDTH + 1)):
            with pytest.raises(RuntimeError):
                self.call(bad)

    def collect_garbage(self) -> None:
        gc.collect()


Event = Callable[[LongRun], Any]
EVENTS: tuple[Event, ...] = (
    LongRun.evaluate,
    LongRun.infer,
    LongRun.switch_adapters,
    LongRun.scale,
    LongRun.switch_off,
    LongRun.evaluate_in_threads,
    LongRun.back_and_forth,
    LongRun.meet_a_bad_batch,
    LongRun.explain,
    LongRun.watch,
    LongRun.fail_to_save,
    LongRun.fail_to_load,
    LongRun.save_and_restore,
    LongRun.merge_a_copy,
    LongRun.copy_and_pickle,
    LongRun.load_own_state,
    LongRun.collect_garbage,
    LongRun.prepare_or_restore,
    LongRun.resume,
    LongRun.compile,
)


def at_once(run: LongRun, last: int, events: Sequence[Event]) -> None:
    """All steps in this process, an event after each."""
    torch.manual_seed(5)
    with always_compiled():
        run.compile()
        run.train(last, events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inner", default="eager")
    parser.add_argument("--prepared", action="store_true")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--torch", action="store_true", help="without falqon-fx")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    kind = importlib.import_module("tests.attack.torch_run").TorchRun if given.torch else LongRun
    with always_compiled():
        run = kind(given.folder, given.inner, given.prepared)
        if given.first:
            run.load(given.folder / "checkpoint")
            assert run.step == given.first
        run.train(given.last, EVENTS if given.every else (), given.every)
        run.save(given.folder / "checkpoint")
    (given.folder / f"held-{given.first}.json").write_text(json.dumps(run.held))


if __name__ == "__main__":
    main()
