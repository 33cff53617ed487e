"""What a calibration reads: batches of any form, in whatever mode, within bounded memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

import falqon_fx
from falqon_fx.model.batches import run_batch
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.lora_layers import linear_layers
from falqon_fx.model.moments import Moment, moments_of
from tests.calibrated import CHANNELS, EAGER, IN, MIDDLE, OUT, RANK, adapted, calibrated, inputs
from tests.sites import randn
from tests.tolerances import assert_within, gamma


def test_moments_are_of_all_that_a_layer_read_and_siblings_share_them():
    model = adapted()
    layers = list(linear_layers(model))
    before = torch.random.get_rng_state()
    found = {
        layer.site.rpartition(".")[2]: moment
        for layer, moment in moments_of(model, layers, inputs(), lambda text: None)
    }
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not any(layer.module._forward_pre_hooks for layer in layers)
    assert found["q"] is found["k"]
    assert found["q"].root is found["k"].root
    assert len({id(moment) for moment in found.values()}) == 3
    x = torch.cat(inputs()).double()
    assert found["q"].tokens == len(x)
    # float32 sums of as many products as there are tokens.
    assert_within(
        found["q"].mean.double(),
        x.t() @ x / len(x),
        gamma(len(x) + 1) * (x.abs().t() @ x.abs()) / len(x),
    )


def test_little_memory_takes_more_passes_and_the_same_moments():
    """Room for the moment of q and k alone: the first pass takes it, one more each of the others.
    An iterator comes but once.
    """
    model, room = adapted(), 4 * IN * IN
    layers, told = list(linear_layers(model)), list[str]()
    all_at_once = list(moments_of(model, layers, inputs(), lambda text: None))
    by_parts = list(moments_of(model, layers, iter(inputs()), told.append, room))
    assert told[-1] == "3 batches, 120 tokens, pass 3"
    assert [layer for layer, _ in by_parts] == [layer for layer, _ in all_at_once]
    for (_, one), (_, other) in zip(all_at_once, by_parts, strict=True):
        assert torch.equal(one.total, other.total)
        assert one.tokens == other.tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("asked", [{}, {"compensate": "auto", "outliers": "auto"}])
def test_what_is_bought_does_not_depend_on_the_default_dtype(dtype, asked):
    """Sums in bfloat16 would lose what a batch adds to a hundred."""
    model, other, read = adapted(), adapted(), inputs()
    falqon_fx.prepare(model, EAGER, calibration=read, progress=False, **asked)
    torch.set_default_dtype(dtype)
    try:
        falqon_fx.prepare(other, EAGER, calibration=read, progress=False, **asked)
    finally:
        torch.set_default_dtype(torch.float32)
    bought = dict(model.state_dict())
    assert any("error_a" in name for name in bought)
    for name, value in other.state_dict().items():
        assert torch.equal(value, bought[name]), name


def test_a_hundred_thousand_tokens_are_one_moment():
    """Sums of float32 over as many; a batch is gone when it has been read."""
    layer = nn.Linear(8, 8).requires_grad_(False)
    exact, sizes = torch.zeros(2, 8, 8, dtype=torch.float64)

    def batches() -> Iterator[Tensor]:
        for i in range(50):
            x = randn(2000, 8, seed=i)
            wide = x.double()
            exact.addmm_(wide.t(), wide)
            sizes.addmm_(wide.abs().t(), wide.abs())
            yield x

    ((_, moment),) = moments_of(layer, list(linear_layers(layer)), batches(), lambda text: None)
    assert moment.tokens == 100_000
    assert_within(moment.total.double(), exact, gamma(100_000) * sizes)


def test_no_more_moments_are_held_than_there_is_room_for(monkeypatch):
    """Room for two of the three; what the last pass gave is gone when the next one begins."""
    held = list[int]()

    def look(text: str) -> None:
        gc.collect()
        alive = [m for m in gc.get_objects() if type(m) is Moment]
        held.append(sum(m.total.nbytes for m in alive))

    room = 4 * (IN**2 + MIDDLE**2)
    monkeypatch.setattr("falqon_fx.model.moments._LEAST_ROOM", room)
    with monkeypatch.context() as patched:
        patched.setattr("falqon_fx.model.calibration.shown", lambda _: nullcontext(look))
        falqon_fx.prepare(adapted(), EAGER, calibration=iter(inputs()), progress=False)
    assert len(held) == 3 + 3 + 4  # batches of two passes, and layers
    assert max(held) == room


FORMS: dict[str, Any] = {
    "tensors": inputs,
    "tuples": lambda: [(x,) for x in inputs()],
    "lists": lambda: [[x] for x in inputs()],
    "dicts": lambda: [{"x": x} for x in inputs()],
    "encodings": lambda: [BatchEncoding({"x": x}) for x in inputs()],
    "a generator": lambda: (x for x in inputs()),
    "a loader": lambda: DataLoader(torch.cat(inputs()), batch_size=40),
    "a loader of dicts": lambda: DataLoader([{"x": x} for x in torch.cat(inputs())], batch_size=40),
    "an iterator of a loader": lambda: iter(DataLoader(torch.cat(inputs()), batch_size=40)),
    "lengths of all kinds": lambda: torch.cat(inputs()).split([1, 100, 19]),
}


def test_batches_of_any_form_are_read_alike_also_where_they_are_read_twice():
    """With "auto" they are read for what casts cost, too. Sums over other batches are in another
    order: the last form is the same up to that, and is seen by its tokens.
    """
    seen: dict[str, Any] = {}
    for name, make in FORMS.items():
        model, batches = adapted(), make()
        state = torch.random.get_rng_state()
        report = falqon_fx.prepare(
            model, EAGER, calibration=batches, compensate="auto", progress=False
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        assert report.tokens == 120
        assert report.bought.keys() == report.calibrated.keys()
        seen[name] = {n: t for n, t in model.state_dict().items() if "base_layer" in n}
    wanted = seen.pop("tensors")
    del seen["lengths of all kinds"]
    for found in seen.values():
        assert all(torch.equal(found[n], t) for n, t in wanted.items())


def test_batches_are_moved_to_where_the_model_is():
    assert run_batch(nn.Linear(3, 2, device="meta"), {"input": torch.ones(4, 3)}, 0).is_meta


class Masked(nn.Module):
    """``flat``: all tokens in one row; the layer is called by name."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.up = nn.Linear(IN, OUT).requires_grad_(False)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.up(input=x.flatten(0, 1) if self.flat else x)


@pytest.mark.parametrize("flat", [False, True])
def test_padding_is_not_read_where_a_mask_tells(flat):
    model, x = Masked(flat), randn(2, 5, IN)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x[0, 3:] = torch.nan
    batches = [{"x": x, "attention_mask": mask}]
    ((_, moment),) = moments_of(model, list(linear_layers(model)), batches, lambda text: None)
    read = torch.cat([x[0, :3], x[1]])
    assert moment.tokens == len(read) == 8
    sizes = read.abs().double()
    assert_within(
        moment.total.double(), read.double().t() @ read.double(), gamma(9) * sizes.t() @ sizes
    )


@pytest.mark.parametrize(
    "within", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode]
)
def test_terms_are_the_same_in_any_mode_of_the_caller(within):
    """Those of q and k, whose x comes from outside; and they are ordinary tensors, as W's are."""
    usual, other = calibrated(), adapted()
    asked: dict[str, Any] = {"compensate": RANK, "outliers": CHANNELS, "progress": False}
    with within():
        falqon_fx.prepare(other, EAGER, calibration=inputs(), **asked)
    for name, term in usual.named_parameters():
        if name.rpartition(".")[2] in Fp8Linear.TERMS:
            found = other.get_parameter(name)
            assert not found.is_inference()
            assert torch.equal(found, term) or ".q." not in name


@pytest.mark.parametrize("asked", [{}, {"calibration": inputs()}], ids=["cast", "calibrated"])
def test_what_is_prepared_in_inference_mode_can_be_trained_loaded_and_restored(asked):
    usual, model = adapted(), adapted()
    falqon_fx.prepare(usual, EAGER, progress=False, **asked)
    with torch.inference_mode():
        falqon_fx.prepare(model, EAGER, progress=False, **asked)
    restored, loaded = copy.deepcopy(model), adapted()
    falqon_fx.prepare(loaded, EAGER, progress=False)  # without a place for terms yet
    with torch.inference_mode():
        falqon_fx.restore(restored)
        loaded.load_state_dict(model.state_dict())
    for each in (model, restored, loaded):
        assert not any(p.is_inference() for p in each.parameters())
        each(inputs()[0].requires_grad_()).sum().backward()
    model.load_state_dict(usual.state_dict())


class Merging(nn.Linear):
    """loralib's habit: in evaluation mode the adapter is in the weight."""

    merged = False

    def train(self, mode: bool = True) -> Any:
        self.merged = not mode
        return super().train(mode)


def test_layers_that_merge_in_evaluation_mode_are_left_as_they_are():
    model = nn.Sequential(Merging(IN, IN), nn.Linear(IN, IN)).requires_grad_(False)
    falqon_fx.prepare(model, EAGER, calibration=inputs(), compensate="auto", progress=False)
    first: Any = model[0]
    assert (first.training, first.merged) == (True, False)


def test_what_is_not_asked_for_is_as_much_as_a_layer_has():
    model = nn.Sequential(nn.Linear(IN, 8), nn.Linear(8, IN)).requires_grad_(False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    report = falqon_fx.prepare(model, EAGER, calibration=inputs(), progress=False)
    assert [*report.bought.values()] == [(8, 16), (8, 8)]
    assert "with 8 ranks and 8 to 16 channels of x each" in str(report)
