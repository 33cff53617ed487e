"""Training that goes on from a checkpoint is the training that was never interrupted."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from tests.models import Stack, freeze_a, lora_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_pair, each_value
from tests.runs import ROWS, STEPS, UPDATES, Run, assert_same_run
from tests.sites import randn, same


@UPDATES
def test_what_was_loaded_in_inference_mode_can_be_trained(tmp_path, update):
    whole, resumed = Run(prepared=True, update=update), Run(prepared=False, update=update)
    whole.steps(0, 2)
    whole.save(tmp_path)
    with torch.inference_mode():
        resumed.load(tmp_path)
    for run in (whole, resumed):
        torch.manual_seed(0)
        random.seed(0)
        run.steps(2, STEPS)
    assert_same_run(whole, resumed)


@each_pair(interrupted=[0, 3, 5], prepared=PREPARED_OR_NOT, update=["adapter", "rows"])
def test_interrupted_training_is_bit_equal(tmp_path, update, prepared, interrupted):
    """Weights, states, optimizer; with random numbers drawn in training from both generators."""
    whole, first = Run(prepared, update=update), Run(prepared, update=update)
    random.seed(1)
    torch.manual_seed(5)
    whole.steps(0, STEPS)

    random.seed(1)
    torch.manual_seed(5)
    first.steps(0, interrupted)
    first.save(tmp_path)
    # Another A, another base bias: all comes from the file.
    resumed = Run(prepared, seed=9, update=update)
    if not prepared:
        _same_base(resumed.model, first.model)
    random.seed(2)
    torch.manual_seed(2)
    resumed.load(tmp_path)
    resumed.steps(interrupted, STEPS)
    assert_same_run(whole, resumed)


def _same_base(model: nn.Module, other: nn.Module) -> None:
    for name in ("0", "2"):
        base = model.base_model.model.get_submodule(name).base_layer
        base.load_state_dict(other.base_model.model.get_submodule(name).base_layer.state_dict())


OPTIONS: list[dict[str, Any]] = [
    {"granularity": "tensor"}, {"scale": "amax"}, {"init": "svd"}, {"frozen": "leave"},
    {"base_dtype": "int8"}, {"base_dtype": "nvfp4"},
    *({**ROWS, **options} for options in (
        {"pending": "hold"}, {"pending": "drop"}, {"rounding": "nearest"}, {"topk": "all"},
        {"granularity": "tensor"}, {"scale": "amax"}, {"init": "svd"}, {"seed": 3},
    )),
]  # fmt: skip


@each_value(options={str(options): options for options in OPTIONS}, prepared=PREPARED_OR_NOT)
def test_every_option_resumes_bit_equal(tmp_path, prepared, options):
    whole, first, resumed = (Run(prepared, **options) for _ in range(3))
    torch.manual_seed(5)
    random.seed(5)
    whole.steps(0, 5)
    torch.manual_seed(5)
    random.seed(5)
    first.steps(0, 2)
    first.save(tmp_path)
    resumed.load(tmp_path)
    resumed.steps(2, 5)
    assert_same_run(whole, resumed)


def test_a_checkpoint_without_the_update_counters_would_not_resume(tmp_path):
    """What is tested above is not true by itself: losing one counter changes the weights."""
    whole, resumed = Run(True, **ROWS), Run(True, **ROWS)
    torch.manual_seed(5)
    whole.steps(0, 2)
    whole.save(tmp_path)
    resumed.load(tmp_path)
    for state in falqon_fx.adapters(resumed.model).values():
        state.counters[3] = 0  # the step that stochastic rounding draws for
    for run in (whole, resumed):
        torch.manual_seed(6)
        random.seed(6)
        run.steps(2, STEPS)
    with pytest.raises(AssertionError):
        assert_same_run(whole, resumed)


@UPDATES
@pytest.mark.parametrize("saved", [False, True], ids=["unprepared", "prepared"])
def test_either_form_loads_into_the_other(tmp_path, update, saved):
    """A saved prepared model prepares the one it is loaded into, without a cast; a model that is
    prepared since takes over the states of one that wasn't.
    """
    first, resumed = Run(saved, update=update), Run(not saved, update=update)
    first.steps(0, 3)
    first.save(tmp_path)
    resumed.load(tmp_path)
    assert [same(*pair) for pair in zip(first.states().values(), resumed.states().values())] == [
        True,
        True,
    ]
    layer = resumed.model.base_model.model[0].base_layer
    assert isinstance(layer, Fp8Linear if update == "adapter" else MergedBaseLinear)
    with pytest.raises(FalqonError, match="would be lost") as lost:
        resumed.model.merge_adapter()
    assert lost.value.site == next(iter(falqon_fx.adapters(resumed.model)))
    if update == "rows" and not saved:
        return  # one has the base weight at hand, from which it writes rows; the other does not
    for run in (first, resumed):
        torch.manual_seed(3)
        random.seed(3)
        run.steps(3, STEPS)
    for a, b in zip(lora_b(first.model), lora_b(resumed.model), strict=True):
        assert torch.equal(a, b)
    assert [same(*pair) for pair in zip(first.states().values(), resumed.states().values())] == [
        True,
        True,
    ]


@UPDATES
def test_hand_written_lora_resumes(tmp_path, update):
    """Sites outside PEFT are found by their parameters."""
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(Run(False, model=Stack(blocks=1), update=update))
    whole, first, resumed = runs
    torch.manual_seed(5)
    random.seed(5)
    whole.steps(0, STEPS)
    torch.manual_seed(5)
    random.seed(5)
    first.steps(0, 2)
    first.save(tmp_path)
    resumed.load(tmp_path)
    resumed.steps(2, STEPS)
    assert_same_run(whole, resumed)


@UPDATES
@pytest.mark.slow
def test_a_new_process_resumes_bit_equal(tmp_path, update):
    """Nothing rests on what stays in a process: each half runs in its own."""
    code = """
import sys; sys.path.insert(0, {root!r})
import pathlib, random, torch
from tests.runs import Run
run = Run(True, update={update!r})
folder = pathlib.Path({folder!r})
random.seed(5); torch.manual_seed(5)
if {first}:
    run.load(folder)
run.steps({first}, {last})
run.save(folder)
"""
    root = str(Path(__file__).parents[1])
    for folder, parts in {"whole": [(0, 4)], "halves": [(0, 2), (2, 4)]}.items():
        for first, last in parts:
            text = code.format(
                root=root, update=update, folder=str(tmp_path / folder), first=first, last=last
            )
            subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True)
    runs = [Run(True, seed=seed, update=update) for seed in (7, 8)]
    for run, folder in zip(runs, ("whole", "halves"), strict=True):
        run.load(tmp_path / folder)
    assert_same_run(*runs)


def wide_mlp() -> nn.Module:
    """A site, and a frozen layer without an adapter that is large enough to run in FP8."""
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 32))
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))


@each_value(update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
def test_frozen_layers_in_fp8_resume_bit_equal(tmp_path, update, prepared):
    runs = []
    for seed in (0, 0, 9):
        torch.manual_seed(0 if not prepared else seed)  # the file brings what `prepare` freed
        runs.append(Run(prepared, model=wide_mlp(), update=update))
    whole, first, resumed = runs
    for run in (whole, first):
        torch.manual_seed(5)
        random.seed(5)
        run.steps(0, 2)
    report = falqon_fx.save_checkpoint(
        first.model, tmp_path, optimizer=first.optimizer, scheduler=first.scheduler
    )
    assert report.sites == 2
    resumed.load(tmp_path)
    for run in (whole, resumed):
        torch.manual_seed(6)
        random.seed(6)
        run.steps(2, STEPS)
    named = dict(resumed.model.named_parameters())
    assert ("base_model.model.1.code" in named) is prepared
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), named[name].nan_to_num()), name
    assert whole.states().keys() == resumed.states().keys() == {"base_model.model.0"}
    assert all(same(*pair) for pair in zip(whole.states().values(), resumed.states().values()))


@UPDATES
def test_two_adapters_resume_bit_equal(tmp_path, update):
    """One trained, then the other on the same base weights: both are in the file."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny_mlp(lora_dropout=0.0)
        model.add_adapter("other", model.peft_config["default"])
        run = Run(False, model=model, update=update)
        run.steps(0, 1)
        model.set_adapter("other")
        if update == "rows":
            freeze_a(model)
        b = [p for n, p in model.named_parameters() if "lora_B.other" in n]
        run.optimizer = torch.optim.AdamW(b, lr=0.05)
        runs.append(run)
    whole, resumed = runs
    whole.scheduler = resumed.scheduler = torch.optim.lr_scheduler.ConstantLR(whole.optimizer)
    whole.steps(1, 3)
    falqon_fx.save_checkpoint(whole.model, tmp_path, optimizer=whole.optimizer)
    falqon_fx.load_checkpoint(resumed.model, tmp_path, optimizer=resumed.optimizer)
    for run in runs:
        torch.manual_seed(5)
        random.seed(5)
        run.steps(3, 5)
    named = dict(resumed.model.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in whole.model.named_parameters())
    assert whole.states().keys() == resumed.states().keys()
    assert all(same(states, resumed.states()[path]) for path, states in whole.states().items())
    for run in runs:
        run.model.set_adapter("default")
        if update == "rows":
            freeze_a(run.model)
        run.compiled(randn(4, 32))
    assert all(same(states, resumed.states()[path]) for path, states in whole.states().items())


def test_a_save_between_backward_and_step_keeps_the_gradients_of_the_run(tmp_path):
    run = Run(True)
    run.steps(0, 1)
    run.compiled(randn(4, 32)).square().mean().backward()
    before = [b.grad.clone() for b in lora_b(run.model)]
    run.save(tmp_path)
    assert all(torch.equal(b.grad, old) for b, old in zip(lora_b(run.model), before, strict=True))


class Counting(torch.optim.Adam):
    """A user's own, with states of other sizes beside those of Adam."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for state in self.state.values():
            state["sizes"] = torch.tensor([1, 2])
            state["seen"] = 1
        return result


def test_an_optimizer_with_states_of_its_own_goes_on(tmp_path):
    models = [tiny_mlp(), tiny_mlp()]
    first, resumed = (Counting(lora_b(model)) for model in models)
    for b in lora_b(models[0]):
        b.grad = torch.ones_like(b)
    first.step()
    falqon_fx.save_checkpoint(models[0], tmp_path, optimizer=first)
    falqon_fx.load_checkpoint(models[1], tmp_path, optimizer=resumed)
    state = resumed.state_dict()["state"][0]
    assert state["sizes"].tolist() == [1, 2]
    assert state["seen"] == 1
    assert torch.equal(state["exp_avg"], first.state_dict()["state"][0]["exp_avg"])
