"""What a checkpoint can hold comes back as it was; what it cannot is refused by its path."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import training
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.trees import from_plain, to_plain
from tests.models import tiny_llama, tiny_mlp
from tests.sites import randn


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


@pytest.mark.parametrize("word", [-1, 2**70, "1", None])
def test_a_word_that_no_random_generator_has_is_refused(word):
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "cuda": []}
    state["python"] = version, (word, *words[1:]), gauss
    with pytest.raises(FalqonError, match="its state of the random generators is damaged"):
        training.check_rng(state, "a checkpoint")
