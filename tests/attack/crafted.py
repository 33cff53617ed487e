"""Values that whoever writes files could put into them."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

import falqon_fx
from falqon_fx import FalqonConfig
from tests.attack import harness
from tests.models import fill_b, lora_b, tiny_mlp

INDEX = "model.safetensors.index.json"


def model_and_optimizer(update: Any = "adapter", seed: int = 0, prepared: bool = True) -> Any:
    torch.manual_seed(seed)
    model = tiny_mlp()
    fill_b(model, 0.1, seed)
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(update=update), progress=False)
    optimizer = torch.optim.AdamW(lora_b(model), fused=True)
    for p in lora_b(model):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


_NUMBERS = st.sampled_from([0, 1, -1, 2, 2**31, 2**63, 2**64, 10**30, 1e308, math.nan, math.inf])
_TEXTS = st.sampled_from(
    ["", "..", "../x", "/etc/passwd", "float32", "uint8", "__class__", "\x1b[31m", "a b", "\ud800"]
)
_LEAVES = st.none() | st.booleans() | _NUMBERS | st.integers() | _TEXTS | st.text(max_size=5)
VALUE = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=3)
)


@st.composite
def changed(draw: Any, content: Any) -> Any:
    """JSON with one to three values replaced, removed or put in twice."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        known = [*harness.places(content)]
        if not known:
            break
        way = draw(st.sampled_from(known))
        owner = functools.reduce(lambda node, key: node[key], way[:-1], content)
        how = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "wrap"]))
        if how == "remove":
            del owner[way[-1]]
        elif how == "repeat" and isinstance(owner, list):
            owner.append(owner[way[-1]])
        elif how == "wrap":
            owner[way[-1]] = [owner[way[-1]]]
        else:
            owner[way[-1]] = draw(VALUE)
    return content


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


FILES = [
    ("prequantized", "falqon.json"),
    ("prequantized", "config.json"),
    ("prequantized", "adapter_config.json"),
    ("fp8", "config.json"),
]
