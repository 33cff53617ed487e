"""`CheckpointState` in torch's distributed checkpoints, in one process."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.storage import DamagedFileError
from tests.models import lora_b, tiny_mlp
from tests.parameters import PREPARED_OR_NOT, each_value
from tests.runs import STEPS, UPDATES, Run, assert_same_run, base_in_half, snapshot_of
from tests.sites import randn, same


@each_value(update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
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
    "base dtype": lambda: base_in_half(tiny_mlp(lora_dropout=0.0)),
    "no optimizer": lambda: tiny_mlp(lora_dropout=0.0),
    "other groups": lambda: tiny_mlp(lora_dropout=0.0),
}


@each_value(what=list(OTHERS), update=["adapter", "rows"], prepared=PREPARED_OR_NOT)
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
