"""A CPU that takes the path of a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from falqon_fx.ops import fp8_gpu, fp8_grad, gpu, lowering
from falqon_fx.ops import grad_x as op_of_grad_x
from falqon_fx.ops import merged_linear as ops
from falqon_fx.ops.adapter_grads import adapter_grads_on_gpu, grad_out_a_on_gpu
from falqon_fx.ops.arguments import Merged
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec
from tests.sites import randn
from tests.strategies import Case, Layer, Lora

F32, BF16 = torch.float32, torch.bfloat16
# numpy, which the interpreter computes with, announces what hashing does on purpose.
INTERPRETED = [
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.usefixtures("kernel_cache"),
]
ROW, TENSOR = (SiteSpec(granularity, "pow2", "e5m2") for granularity in ("row", "tensor"))


def lower(given: Merged) -> list[Tensor]:
    """`merged_linear` as on a GPU."""
    return (fp8_gpu if given.alpha else gpu).merged_linear(given)


@contextlib.contextmanager
def as_on_a_gpu(*, grad_x: bool = True) -> Iterator[None]:
    """The ops are lowered for CPU tensors as for those of a GPU; without ``grad_x`` not that of
    dL/dx without adapters in FP8, which a GPU adds up in another order.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "lower_merged_linear", lower)
        if grad_x:
            patch.setattr(op_of_grad_x, "lower_grad_x", gpu.merged_linear_grad_x)
        patch.setattr(fp8_grad, "lower_grad", fp8_gpu.merged_linear_grad)
        patch.setattr(ops, "lower_adapter_grads", adapter_grads_on_gpu)
        patch.setattr(ops, "lower_grad_out_a", grad_out_a_on_gpu)
        patch.setattr(lowering, "grad_a", gpu.grad_a)
        yield


def layer(
    out: int, ranks: tuple[int, ...], spec: SiteSpec, seed: int, features: int = 64, **change: Any
) -> Layer:
    """A layer whose adapters have the given ranks, for 32 tokens in bfloat16."""
    loras = [
        Lora(
            randn(rank, features, seed=seed + 10 * j) / 4,
            randn(out, rank, seed=seed + 10 * j + 1) / 4,
            scaling=(2.0, 0.3)[j % 2],
        )
        for j, rank in enumerate(ranks)
    ]
    weight = randn(out, features, seed=seed + 7).bfloat16()
    grad = randn(32, out, seed=seed + 8).bfloat16()
    return replace(Layer(weight, cast_base(weight, spec), None, loras, grad), **change)


def group(
    spec: SiteSpec, *of: tuple[int, tuple[int, ...]], features: int = 64, **change: Any
) -> Case:
    """Layers (out, ranks) that share x [32, features]."""
    layers = [layer(out, ranks, spec, 100 * i, features) for i, (out, ranks) in enumerate(of)]
    return replace(Case(randn(32, features).bfloat16(), layers, BF16, spec), **change)


def with_dropout(spec: SiteSpec) -> Case:
    """Two adapters that read x behind masks of their own, and one that reads x itself."""
    case = group(spec, (48, (16, 8, 16)))
    for i, lora in enumerate(case.adapters[:2]):
        lora.x = case.x * ((randn(32, 64, seed=20 + i) > 0) * 2).bfloat16()
    return case


GROUPS: dict[str, Callable[[SiteSpec], Case]] = {
    "one adapter": lambda spec: group(spec, (48, (16,))),
    "a frozen layer": lambda spec: group(spec, (48, ())),
    "siblings, some frozen": lambda spec: group(spec, (48, (16,)), (32, ()), (16, (8,)), (64, ())),
    "frozen siblings": lambda spec: group(spec, (48, ()), (32, ())),
    "several adapters": lambda spec: group(spec, (48, (16, 8)), (32, (5,)), (16, (16, 16, 3))),
    "ranks beyond the kernels'": lambda spec: group(spec, (48, (300,)), (32, (8,))),
    "dropout": with_dropout,
    "sizes of no multiple of 16": lambda spec: group(
        spec, (50, (16,)), (33, (8,)), (48, ()), features=50
    ),
    "a large rank": lambda spec: group(spec, (48, (100,))),
    "A frozen": lambda spec: group(spec, (48, (16,)), (32, (8,)), keep_x=False),
    "9 sites": lambda spec: group(spec, *[(16, (4,))] * 9),
    "10 pieces, b absent": lambda spec: group(spec, *[(16, (4,))] * 5, adds_b=False),
    "b absent": lambda spec: group(spec, (48, (16,)), (32, (8,)), adds_b=False),
    "b absent, dropout": lambda spec: replace(with_dropout(spec), adds_b=False),
}
