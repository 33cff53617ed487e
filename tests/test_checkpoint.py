"""Training that goes on from a checkpoint is the training that was never interrupted."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.files import storage, training
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.storage import DamagedFileError
from falqon_fx.files.trees import from_plain, to_plain
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.prepare import Adapter
from falqon_fx.rows.prepared import MergedBaseLinear
from tests.models import Stack, freeze_a, lora_b, tiny_llama, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_pair, each_value
from tests.sites import randn, same, snapshot

STEPS = 6
ROWS = {"update": "rows", "topk": 5}
UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


class Run:
    """A training run: model, optimizer, scheduler, and what has to be equal at its end.

    A and B are trained, with update="rows" B alone.
    """

    def __init__(self, prepared: bool, seed: int = 0, model: nn.Module | None = None, **options):
        torch.manual_seed(seed)
        self.model = tiny_mlp(lora_dropout=0.0) if model is None else model
        rows = options.get("update") == "rows"
        if rows:
            freeze_a(self.model)
        self.config = FalqonConfig(**{"inner": "eager", **(ROWS if rows else {}), **options})
        if prepared:
            falqon_fx.prepare(self.model, self.config, progress=False)
        self.compiled = torch.compile(
            self.model, backend="falqon", options=dict[str, Any](config=self.config)
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
        self.scheduler: torch.optim.lr_scheduler.LRScheduler = (
            torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        )

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = randn(4, 32, seed=100 + step)
            loss = (self.compiled(x) - torch.rand(4, 32) - random.random()).square().mean()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        falqon_fx.save_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def load(self, folder: Path) -> None:
        falqon_fx.load_checkpoint(
            self.model, folder, optimizer=self.optimizer, scheduler=self.scheduler
        )

    def states(self) -> dict[str, list[Tensor]]:
        return {path: tensors_of(s) for path, s in falqon_fx.adapters(self.model).items()}


def tensors_of(site: falqon_fx.MergedAdapter | Adapter) -> list[Tensor]:
    """The FP8 tensors of a site, copied."""
    if isinstance(site, falqon_fx.MergedAdapter):
        return snapshot(site)
    return [site.weight.view(torch.uint8).clone(), site.scale.clone()]


def assert_same_run(a: Run, b: Run) -> None:
    named = dict(b.model.named_parameters())
    assert named.keys() == dict(a.model.named_parameters()).keys()
    for name, parameter in a.model.named_parameters():
        assert torch.equal(parameter, named[name]), name
    assert a.states().keys() == b.states().keys()
    assert len(a.states()) == 2
    for path, tensors in a.states().items():
        assert same(tensors, b.states()[path]), path
    slots = [r.optimizer.state_dict()["state"].values() for r in (a, b)]
    for one, other in zip(*slots, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


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
from tests.test_checkpoint import Run
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


@UPDATES
@PREPARED
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


def test_extra_comes_back_as_it_was(tmp_path):
    model, tensor = tiny_mlp(), randn(3, 2)
    extra = {"step": 7, "loss": float("inf"), "name": "a", "ids": [1, (2, None)], "t": tensor,
             "nested": {3: {"x": True}}}  # fmt: skip
    falqon_fx.save_checkpoint(model, tmp_path, extra=extra)
    back = falqon_fx.load_checkpoint(model, tmp_path)
    assert torch.equal(back.pop("t"), tensor)
    assert back == {k: v for k, v in extra.items() if k != "t"}


def test_what_is_not_plain_data_is_refused_by_its_path(tmp_path):
    with pytest.raises(FalqonError, match=r"training\.extra\.counts: a set can't be saved"):
        falqon_fx.save_checkpoint(tiny_mlp(), tmp_path, extra={"counts": {1}})
    assert not list(tmp_path.iterdir())


def test_trees_round_trip_their_types():
    tensors: dict[str, Tensor] = {}
    value = {"a": [1, 2.5, (True, None)], 4: {"t": torch.ones(2)}}
    text = json.dumps(to_plain(value, "p", tensors))
    back = from_plain(json.loads(text), tensors)
    assert torch.equal(back[4].pop("t"), torch.ones(2))
    assert back == {"a": [1, 2.5, (True, None)], 4: {}}


def test_tensors_of_the_same_path_stay_apart(tmp_path):
    model, (a, b, c) = tiny_mlp(), torch.arange(6.0).view(3, 2).unbind()
    extra = {"x.y": a, "x": {"y": b}, 1: c, "1": a, "x.y'": c}
    falqon_fx.save_checkpoint(model, tmp_path, extra=extra)
    back = falqon_fx.load_checkpoint(model, tmp_path)
    assert torch.equal(back["x"].pop("y"), b)
    assert back.pop("x") == {}
    assert [torch.equal(back[key], extra[key]) for key in ("x.y", 1, "1", "x.y'")] == [True] * 4


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("kind", ["sparse_coo", "meta", "quantized"])
def test_a_tensor_without_plain_memory_is_refused_by_its_path(tmp_path, kind):
    ones = torch.ones(3)
    made = {
        "sparse_coo": lambda: ones.to_sparse(),
        "meta": lambda: ones.to("meta"),
        "quantized": lambda: torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8),
    }
    with pytest.raises(FalqonError, match=rf"training\.extra\.t: a {kind} tensor can't be saved"):
        falqon_fx.save_checkpoint(tiny_mlp(), tmp_path, extra={"t": made[kind]()})
    assert not list(tmp_path.iterdir())


def test_conjugates_are_saved_as_what_they_are(tmp_path):
    value = torch.arange(3) * torch.tensor(1 + 2j)
    extra = {"t": value.conj(), "imaginary": value.conj().imag, "real": value.real}
    falqon_fx.save_checkpoint(tiny_mlp(), tmp_path, extra=extra)
    back = falqon_fx.load_checkpoint(tiny_mlp(), tmp_path)
    assert all(torch.equal(back[name], tensor) for name, tensor in extra.items())


def test_a_save_between_backward_and_step_keeps_the_gradients_of_the_run(tmp_path):
    run = Run(True)
    run.steps(0, 1)
    run.compiled(randn(4, 32)).square().mean().backward()
    before = [b.grad.clone() for b in lora_b(run.model)]
    run.save(tmp_path)
    assert all(torch.equal(b.grad, old) for b, old in zip(lora_b(run.model), before, strict=True))


def test_tied_weights_are_written_once(tmp_path):
    model = tiny_llama(target_modules=["q_proj"])
    inner = model.get_base_model()
    inner.lm_head.weight = inner.model.embed_tokens.weight
    falqon_fx.save_checkpoint(model, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert [*manifest["same"]] == ["base_model.model.lm_head.weight"]
    with torch.no_grad():
        inner.lm_head.weight.zero_()
    falqon_fx.load_checkpoint(model, tmp_path)
    assert inner.lm_head.weight.any()
    assert inner.lm_head.weight is inner.model.embed_tokens.weight


@pytest.mark.parametrize("size", [0, 15, 17, 5000])
def test_the_state_of_a_cards_random_generator_has_its_size(size, monkeypatch):
    """Refused before anything is written, and not in the midst of it by the card."""
    of_card = torch.zeros(16, dtype=torch.uint8)  # seed and offset, 8 bytes each
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [of_card])
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": [of_card]}
    training.check_rng(state, "a checkpoint")
    state["cuda"] = [torch.zeros(size, dtype=torch.uint8)]
    with pytest.raises(FalqonError, match=f"a card's has {size} bytes, not 16"):
        training.check_rng(state, "a checkpoint")
    state["cuda"] *= 2  # of another machine: left out
    training.check_rng(state, "a checkpoint")


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


@UPDATES
@PREPARED
def test_torch_distributed_checkpoint_resumes_bit_equal(tmp_path, update, prepared):
    """Through its public save and load, in one process."""
    whole, first, resumed = (Run(prepared, update=update) for _ in range(3))
    for run in (whole, first):
        random.seed(5)
        torch.manual_seed(5)
        run.steps(0, 3)
    assert isinstance(falqon_fx.CheckpointState(first.model), Stateful)
    state = falqon_fx.CheckpointState(first.compiled, first.optimizer)
    dcp.save({"falqon": state}, checkpoint_id=tmp_path)
    state = falqon_fx.CheckpointState(resumed.model, resumed.optimizer)
    dcp.load({"falqon": state}, checkpoint_id=tmp_path)
    resumed.scheduler.load_state_dict(first.scheduler.state_dict())
    for run in (whole, resumed):
        random.seed(6)
        torch.manual_seed(6)
        run.steps(3, STEPS)
    assert_same_run(whole, resumed)


@UPDATES
def test_torch_distributed_checkpoint_brings_the_base_weights(tmp_path, update):
    first, other = Run(False, update=update), Run(False, seed=1, update=update)
    first.steps(0, 2)
    other.steps(0, 1)
    dcp.save({"falqon": falqon_fx.CheckpointState(first.model)}, checkpoint_id=tmp_path)
    dcp.load({"falqon": falqon_fx.CheckpointState(other.model)}, checkpoint_id=tmp_path)
    for one, two in zip(first.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    for run in (first, other):  # the default's base is made anew from the weights
        run.compiled(randn(4, 32))
    assert all(same(*pair) for pair in zip(first.states().values(), other.states().values()))


def test_torch_distributed_checkpoint_of_tensors_that_an_optimizer_holds_twice(tmp_path):
    model, rate = tiny_mlp(), torch.tensor(0.5)
    groups = [{"params": [b]} for b in lora_b(model)]
    optimizers = [torch.optim.AdamW(groups, lr=rate), torch.optim.AdamW(groups, lr=1.0)]
    for action, optimizer in zip((dcp.save, dcp.load), optimizers, strict=True):
        state = falqon_fx.CheckpointState(model, optimizer)
        action({"falqon": state}, checkpoint_id=tmp_path)
    assert [float(group["lr"]) for group in optimizers[1].param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("part", ["text", "packed"])
@pytest.mark.parametrize("value", [None, 10**12, "", b"", [1], {}])
def test_a_distributed_checkpoint_that_holds_something_else_is_refused(part, value):
    """What torch hands over is whatever was pickled there."""
    model = tiny_mlp()
    state = falqon_fx.CheckpointState(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FalqonError, match=r"the checkpoint: .*(not str|not bytes|JSON|whole)"):
        state.load_state_dict({**state.state_dict(), part: value})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("change", ["lr", "sums", "dtypes", "checksum", "list"])
def test_a_distributed_checkpoint_whose_text_was_changed_is_refused(change):
    run = Run(True)
    run.steps(0, 2)
    saved = falqon_fx.CheckpointState(run.model, run.optimizer).state_dict()
    text = json.loads(saved["text"])
    if change == "lr":
        saved["text"] = re.sub(r'("lr", )[^]]+', r"\g<1>7.5", saved["text"])
    else:
        del text[change if change in text else "sites"]
        if change in ("sums", "dtypes"):  # by someone who knows how
            del text["checksum"]
            text["checksum"] = storage.json_checksum(text)
        saved["text"] = json.dumps([text] if change == "list" else text)
    before = snapshot_of(run)
    with pytest.raises(DamagedFileError, match=r"checksum of its text is wrong|Field required"):
        falqon_fx.CheckpointState(run.model, run.optimizer).load_state_dict(saved)
    after = snapshot_of(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.optimizer.param_groups[0]["lr"] != 7.5


def test_a_distributed_checkpoint_of_more_tensors_than_the_model_is_refused(tmp_path):
    """DCP itself leaves out what it isn't asked for."""
    larger, model = tiny_mlp(), tiny_mlp()
    larger.register_buffer("more", torch.ones(2))
    dcp.save({"falqon": falqon_fx.CheckpointState(larger)}, checkpoint_id=tmp_path)
    with pytest.raises((FalqonError, dcp.api.CheckpointException), match="not in the model"):
        dcp.load({"falqon": falqon_fx.CheckpointState(model)}, checkpoint_id=tmp_path)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "rank": lambda: tiny_mlp(lora_dropout=0.0, r=8),
    "fewer adapters": lambda: tiny_mlp(lora_dropout=0.0, target_modules=["0"]),
    "dtype": lambda: tiny_mlp(lora_dropout=0.0).bfloat16(),
    "base dtype": lambda: _base_in_half(tiny_mlp(lora_dropout=0.0)),
    "no optimizer": lambda: tiny_mlp(lora_dropout=0.0),
    "other groups": lambda: tiny_mlp(lora_dropout=0.0),
}


def _base_in_half(model: nn.Module) -> nn.Module:
    for name in ("0", "2"):
        model.base_model.model.get_submodule(name).base_layer.half()
    return model


@each_pair(what=list(OTHERS), update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
def test_torch_distributed_checkpoint_of_another_model_changes_nothing(
    tmp_path, update, prepared, what
):
    """DCP itself refuses what is missing or of another shape, and we the rest."""
    first = Run(prepared, update=update)
    first.steps(0, 2)
    kept = None if what == "no optimizer" else first.optimizer
    dcp.save({"falqon": falqon_fx.CheckpointState(first.model, kept)}, checkpoint_id=tmp_path)
    other = Run(prepared, seed=3, model=OTHERS[what](), update=update)
    if what not in ("dtype", "base dtype"):
        other.steps(0, 1)
    if what == "other groups":
        b = lora_b(other.model)
        other.optimizer = torch.optim.AdamW([{"params": b[:1]}, {"params": b[1:]}])
    before = snapshot_of(other)
    state = falqon_fx.CheckpointState(other.model, other.optimizer)
    with pytest.raises((FalqonError, dcp.api.CheckpointException)):
        dcp.load({"falqon": state}, checkpoint_id=tmp_path)
    after = snapshot_of(other)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def snapshot_of(run: Run) -> dict[str, Tensor]:
    """Every tensor of a run, under a name."""
    tensors: dict[str, Tensor] = {}
    objects = {"model": dict(run.model.state_dict()), "optimizer": run.optimizer.state_dict()}
    to_plain({**objects, "states": run.states()}, "", tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}
