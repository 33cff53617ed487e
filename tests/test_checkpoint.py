"""Training that goes on from a checkpoint is the training that was never interrupted."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.checkpoint import MANIFEST
from falqon_fx.prepare import MergedBaseLinear
from falqon_fx.storage import DamagedFileError
from falqon_fx.trees import join, separate
from tests.models import Stack, fill_b, lora_b, tiny_llama, tiny_mlp
from tests.sites import randn, same, snapshot

STEPS = 6
EAGER = {"inner": "eager", "topk": 5}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


class Run:
    """A training run: model, optimizer, scheduler, and what has to be equal at its end."""

    def __init__(self, prepared: bool, seed: int = 0, model: nn.Module | None = None, **options):
        torch.manual_seed(seed)
        self.model = tiny_mlp(lora_dropout=0.0) if model is None else model
        self.config = FalqonConfig(**{**EAGER, **options})
        if prepared:
            falqon_fx.prepare(self.model, self.config, progress=False)
        self.compiled = torch.compile(self.model, backend="falqon", options={"config": self.config})
        # A is in the optimizer, as PEFT has it.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)

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
        return {path: snapshot(s) for path, s in falqon_fx.adapters(self.model).items()}


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


def test_what_was_loaded_in_inference_mode_can_be_trained(tmp_path):
    whole, resumed = Run(prepared=True), Run(prepared=False)
    whole.steps(0, 2)
    whole.save(tmp_path)
    with torch.inference_mode():
        resumed.load(tmp_path)
    for run in (whole, resumed):
        torch.manual_seed(0)
        random.seed(0)
        run.steps(2, STEPS)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("interrupted", [0, 3, 5])
def test_interrupted_training_is_bit_equal(tmp_path, prepared, interrupted):
    """Weights, states, optimizer; with random numbers drawn in training from both generators."""
    whole, first = Run(prepared), Run(prepared)
    random.seed(1)
    torch.manual_seed(5)
    whole.steps(0, STEPS)

    random.seed(1)
    torch.manual_seed(5)
    first.steps(0, interrupted)
    first.save(tmp_path)
    resumed = Run(prepared, seed=9)  # another A, another base bias: all comes from the file
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


@pytest.mark.parametrize("options", [
    {"pending": "hold"}, {"pending": "drop"}, {"rounding": "nearest"}, {"granularity": "tensor"},
    {"scale": "amax"}, {"topk": "all"}, {"init": "svd"}, {"seed": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
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
    whole, resumed = Run(True), Run(True)
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


@pytest.mark.parametrize("saved", [False, True], ids=["unprepared", "prepared"])
def test_either_form_loads_into_the_other(tmp_path, saved):
    """A saved prepared model prepares the one it is loaded into, without a cast; a model that is
    prepared since takes over the states of one that wasn't.
    """
    first, resumed = Run(saved), Run(not saved)
    first.steps(0, 3)
    first.save(tmp_path)
    resumed.load(tmp_path)
    assert [same(*pair) for pair in zip(first.states().values(), resumed.states().values())] == [
        True,
        True,
    ]
    layer = resumed.model.base_model.model[0].base_layer
    assert isinstance(layer, MergedBaseLinear)
    with pytest.raises(FalqonError, match="would be lost") as lost:
        resumed.model.merge_adapter()
    assert lost.value.site == next(iter(falqon_fx.adapters(resumed.model)))
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


def test_hand_written_lora_resumes(tmp_path):
    """Sites outside PEFT are found by their parameters."""
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(Run(False, model=Stack(blocks=1)))
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


@pytest.mark.slow
def test_a_new_process_resumes_bit_equal(tmp_path):
    """Nothing rests on what stays in a process: each half runs in its own."""
    code = """
import sys; sys.path.insert(0, {root!r})
import pathlib, random, torch
from tests.test_checkpoint import Run
run = Run({prepared})
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
                root=root, prepared=True, folder=str(tmp_path / folder), first=first, last=last
            )
            subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True)
    runs = [Run(True, seed=7), Run(True, seed=8)]
    for run, folder in zip(runs, ("whole", "halves"), strict=True):
        run.load(tmp_path / folder)
    assert_same_run(*runs)


def test_two_adapters_resume_bit_equal(tmp_path):
    """One trained, then the other on the same base weights: both have their states in the file."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny_mlp(lora_dropout=0.0)
        model.add_adapter("other", model.peft_config["default"])
        run = Run(False, model=model)
        run.steps(0, 1)
        model.set_adapter("other")
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
    with pytest.raises(FalqonError, match=r"training\.extra\.counts: a Counter can't be saved"):
        falqon_fx.save_checkpoint(tiny_mlp(), tmp_path, extra={"counts": Counter([1])})
    assert not list(tmp_path.iterdir())


def test_trees_round_trip_their_types():
    tensors: dict[str, Tensor] = {}
    value = {"a": [1, 2.5, (True, None)], 4: {"t": torch.ones(2)}}
    text = json.dumps(separate(value, "p", tensors))
    back = join(json.loads(text), tensors)
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
    torch.manual_seed(0)
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


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_torch_distributed_checkpoint_resumes_bit_equal(tmp_path, prepared):
    """Through its public save and load, in one process."""
    whole, first, resumed = Run(prepared), Run(prepared), Run(prepared)
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


def test_torch_distributed_checkpoint_brings_the_base_weights(tmp_path):
    first, other = Run(False), Run(False, seed=1)
    first.steps(0, 2)
    other.steps(0, 1)
    dcp.save({"falqon": falqon_fx.CheckpointState(first.model)}, checkpoint_id=tmp_path)
    dcp.load({"falqon": falqon_fx.CheckpointState(other.model)}, checkpoint_id=tmp_path)
    for one, two in zip(first.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert all(same(*pair) for pair in zip(first.states().values(), other.states().values()))


def test_torch_distributed_checkpoint_of_tensors_that_an_optimizer_holds_twice(tmp_path):
    model, rate = tiny_mlp(), torch.tensor(0.5)
    groups = [{"params": [b]} for b in lora_b(model)]
    optimizers = [torch.optim.AdamW(groups, lr=rate), torch.optim.AdamW(groups, lr=1.0)]
    for action, optimizer in zip((dcp.save, dcp.load), optimizers, strict=True):
        state = falqon_fx.CheckpointState(model, optimizer)
        action({"falqon": state}, checkpoint_id=tmp_path)
    assert [float(group["lr"]) for group in optimizers[1].param_groups] == [0.5, 0.5]


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


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("what", OTHERS)
def test_torch_distributed_checkpoint_of_another_model_changes_nothing(tmp_path, prepared, what):
    """DCP itself refuses what is missing or of another shape, and we the rest."""
    first = Run(prepared)
    first.steps(0, 2)
    kept = None if what == "no optimizer" else first.optimizer
    dcp.save({"falqon": falqon_fx.CheckpointState(first.model, kept)}, checkpoint_id=tmp_path)
    other = Run(prepared, seed=3, model=OTHERS[what]())
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
    separate({**objects, "states": run.states()}, "", tensors)
    return {name: tensor.clone() for name, tensor in tensors.items()}


# -- refusals change nothing -----------------------------------------------------------------------


def refused(model: nn.Module, folder: Path, **arguments: object) -> str:
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(FalqonError) as caught:
        falqon_fx.load_checkpoint(model, folder, **arguments)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    return str(caught.value)


def test_another_base_weight_is_refused(tmp_path):
    first = Run(False)
    first.steps(0, 1)
    first.save(tmp_path)
    text = refused(Run(False, seed=1).model, tmp_path)
    assert "base_model.model.0.base_layer.weight" in text
    assert "not those that" in text


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_another_shape_is_refused(tmp_path, prepared):
    first = Run(prepared)
    first.steps(0, 1)
    first.save(tmp_path)
    torch.manual_seed(0)
    other = Run(prepared, model=tiny_mlp(r=8))
    assert "lora_A" in refused(other.model, tmp_path)


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_another_dtype_of_a_base_weight_is_refused(tmp_path, prepared):
    """`applied` would be rounded, or the layer become one of another dtype."""
    Run(True).save(tmp_path)
    other = Run(prepared, model=_base_in_half(tiny_mlp(lora_dropout=0.0)))
    text = refused(other.model, tmp_path)
    assert "has float32 [48, 32], the model float16 [48, 32]" in text


def test_another_model_is_refused(tmp_path):
    first = Run(True)
    first.save(tmp_path)
    assert "but not in the model" in refused(tiny_llama(), tmp_path)


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path):
    model = tiny_mlp()
    falqon_fx.save_checkpoint(model, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert "it holds no optimizer" in refused(model, tmp_path, optimizer=optimizer)


@pytest.mark.parametrize("saved", [1, 2])
def test_an_optimizer_with_other_groups_is_refused_before_anything_is_changed(tmp_path, saved):
    model = tiny_mlp()
    b = lora_b(model)
    one, two = torch.optim.AdamW(b), torch.optim.AdamW([{"params": b[:1]}, {"params": b[1:]}])
    optimizers = {1: one, 2: two}
    falqon_fx.save_checkpoint(model, tmp_path, optimizer=optimizers[saved])
    fill_b(model, 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FalqonError, match=r"optimizer: its groups have"):
        falqon_fx.load_checkpoint(model, tmp_path, optimizer=optimizers[3 - saved])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_optimizer_is_refused_before_anything_is_changed(tmp_path):
    model = tiny_mlp()
    b = lora_b(model)
    falqon_fx.save_checkpoint(model, tmp_path, optimizer=torch.optim.AdamW(b))
    text = refused(model, tmp_path, optimizer=torch.optim.SGD(b, 0.1))
    assert "optimizer: it has the options ['dampening', 'momentum', 'nesterov'" in text
    scheduled = torch.optim.AdamW(b)
    torch.optim.lr_scheduler.ConstantLR(scheduled)  # adds an option to the groups
    falqon_fx.load_checkpoint(model, tmp_path, optimizer=scheduled)
    falqon_fx.save_checkpoint(model, tmp_path, optimizer=scheduled)
    falqon_fx.load_checkpoint(model, tmp_path, optimizer=torch.optim.AdamW(b))


def test_compiling_with_other_options_after_loading_is_refused(tmp_path):
    first = Run(False)
    first.steps(0, 2)
    first.save(tmp_path)
    other = Run(False, topk=7)
    other.load(tmp_path)
    with pytest.raises(Exception, match="Compile with the options of the checkpoint") as caught:
        other.steps(2, 3)
    assert "topk=5" in str(caught.value)
    falqon_fx.restore(other.model)  # the remedy
    other.steps(2, 3)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FalqonError, match=r"there is no checkpoint\.json in it"):
        falqon_fx.load_checkpoint(tiny_mlp(), tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    falqon_fx.save_checkpoint(tiny_mlp(), tmp_path)
    file = tmp_path / MANIFEST
    file.write_text(file.read_text().replace("checkpoint.2", "checkpoint.3"))
    with pytest.raises(DamagedFileError, match=r"its format is not 'falqon_fx\.checkpoint\.2'"):
        falqon_fx.load_checkpoint(tiny_mlp(), tmp_path)
