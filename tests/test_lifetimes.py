"""Nothing of falqon-fx outlives what it was made for: a model, a compilation, an adapter."""

from __future__ import annotations

import gc
import linecache
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx.rows.dropped import save_watch
from falqon_fx.site.base import bases
from tests.attack.held import kinds
from tests.models import WIDTH, Net, compiled


@pytest.fixture(autouse=True)
def _only_what_is_new():
    """What was there before is neither looked at nor counted."""
    gc.collect()
    gc.freeze()


CONFIG = peft.LoraConfig(r=4, target_modules=["up", "down"])


def lora() -> Any:
    return peft.get_peft_model(Net(), CONFIG)


def x() -> torch.Tensor:
    return torch.ones(2, WIDTH)


def train(model: nn.Module) -> None:
    compiled(model)(x()).sum().backward()


def watch(model: nn.Module) -> None:
    with falqon_fx.watch(model):
        train(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "use",
    [
        train,
        watch,
        lambda model: falqon_fx.explain(model, x()),
        lambda model: falqon_fx.prepare(model, progress=False),
        falqon_fx.adapters,
        falqon_fx.merge_and_unload,
    ],
    ids=["train", "watch", "explain", "prepare", "adapters", "merge_and_unload"],
)
def test_a_model_goes_when_its_owner_lets_go(use):
    """Though Dynamo keeps what it was given, until it is reset."""
    model = lora()
    alive = [weakref.ref(model), *(weakref.ref(p.untyped_storage()) for p in model.parameters())]
    use(model)
    del model
    for _ in range(2):
        gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_each_compilation_leaves_what_torchs_own_backend_leaves():
    """No object of ours, no graph, no module; of tensors (torch's fake ones) and of code that torch
    keeps for tracebacks no more than its backend "eager" leaves.
    """

    def left(once: Callable[[nn.Module], Any]) -> Counter[str]:
        model, seen = lora(), list[Counter[str]]()
        for _ in range(3):
            torch._dynamo.reset()
            once(model)
            for _ in range(2):
                gc.collect()
            seen.append(kinds() + Counter(code=len(linecache.cache)))
        seen[-1].subtract(seen[-2])
        return seen[-1]

    of_torch = left(lambda model: torch.compile(model, backend="eager")(x()).sum().backward())
    for once in (train, lambda model: falqon_fx.explain(model, x())):
        found = left(once)
        assert [found[kind] for kind in ("ours", "graphs", "modules")] == [0, 0, 0]
        assert found["tensors"] <= of_torch["tensors"]
        assert 0 < found["code"] <= of_torch["code"]


def test_what_is_known_of_an_adapter_goes_with_it():
    model = lora()
    call = compiled(model)
    for _ in range(3):
        call(x())
        model.delete_adapter("default")
        model.add_adapter("default", CONFIG)
    call(x())
    known = bases._adapters[model.base_model.model.up.base_layer.weight.untyped_storage()]
    assert len(known) == 1


def test_a_module_has_one_hook_for_what_lies_in_its_fp8_weight():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_B = nn.Parameter(torch.zeros(2, 2))

        def forward(self, applied: torch.Tensor) -> None:
            save_watch.announce([(self.lora_B, applied)])

    layer = Layer()
    for _ in range(3):
        applied = torch.ones(2, 2)
        for _ in range(2):
            layer(applied)
    assert len(layer._state_dict_pre_hooks) == 1
    with pytest.warns(UserWarning, match='trained with pending="drop"'):
        layer.state_dict()
