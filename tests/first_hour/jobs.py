"""A job of training, three ways: plain PEFT, with falqon, and in plain PEFT with noise.

How far FP8 may move a loss is found without falqon: the noise moves what every adapted layer
multiplies as far as a cast can, 2^-4 of each element of x and W (E4M3) and 2^-3 of each of dL/dy
(E5M2), up or down at random. A cast moves an element by less than that on average; `SPREAD` covers
that one draw may be a small one. What the job learns must be more than what is allowed, so that a
run whose adapter, base or gradient is wrong is outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

import falqon_fx

SPREAD = 2.0  # times the largest distance of the draws
DRAWS = 2

Touch = Callable[[nn.Module], object]
Curves = dict[str, list[float]]  # what was seen at each step: the loss first
Job = Callable[[Touch], Curves]  # trains a model that Touch has been called with


def compiled(**options: Any) -> Touch:
    """Compiles a model in place, with graphs that run eagerly."""
    options = {"inner": "eager", **options}
    return lambda model: model.compile(backend="falqon", options=options)


def noisy(seed: int) -> Touch:
    """Moves what the adapted layers multiply: a layer the same way in each call, as casts do."""

    def touch(model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
        for i, layer in enumerate(layers):
            _make_noisy(layer, len(layers) * seed + i)

    return touch


def _make_noisy(layer: Linear, seed: int) -> None:
    def moved(value: Tensor, largest: float) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        share = 2 * torch.rand(value.shape, generator=generator) - 1
        return value * (1 + largest * share).to(value.dtype)

    def read(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (moved(args[0], 2.0**-4), *args[1:])

    def written(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: moved(grad, 2.0**-3))

    layer.base_layer.weight.data = moved(layer.base_layer.weight.data, 2.0**-4)
    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(written)


def off_by(run: Curves, other: Curves) -> dict[str, float]:
    """The largest distance of each curve from that of another run, of as many steps."""
    return {
        name: max(abs(a - b) for a, b in zip(curve, other[name], strict=True))
        for name, curve in run.items()
    }


def learned(losses: list[float]) -> float:
    """How far a run has brought its loss: the last quarter of its steps below the first loss."""
    last = losses[-max(1, len(losses) // 4) :]
    return losses[0] - sum(last) / len(last)


def limit(job: Job) -> tuple[Curves, dict[str, float]]:
    """Plain PEFT's curves, and how far others may be off them."""
    plain = job(lambda model: None)
    draws = [off_by(job(noisy(seed)), plain) for seed in range(DRAWS)]
    allowed = {name: SPREAD * max(draw[name] for draw in draws) for name in plain}
    name, losses = next(iter(plain.items()))
    assert allowed[name] < learned(losses), (
        f"{learned(losses):.3g} learned, too little to tell wrong from {allowed[name]:.3g} off"
    )
    return plain, allowed


def assert_trains_as_plain_peft(job: Job, *touches: Touch) -> None:
    """Each of ``touches`` (falqon, by default compiled in place) gives the curves of plain PEFT."""
    plain, allowed = limit(job)
    for touch in touches or (compiled(),):
        seen: list[nn.Module] = []
        found = job(_keeping(touch, seen))
        assert found != plain  # FP8 it is
        distances = off_by(found, plain)
        for name, distance in distances.items():
            assert distance < allowed[name], (
                f"{name}: {distance:.3g} off, {allowed[name]:.3g} allowed"
            )
        (model,) = seen
        assert_all_sites(model)


def assert_wrong_is_outside(job: Job) -> None:
    """The test of the tests: what is wrong is farther off than what is allowed, in some curve."""
    plain, allowed = limit(job)
    for wrong in (wrong_base, no_adapter, wrong_gradient):
        distances = off_by(job(wrong), plain)
        assert any(distances[name] > allowed[name] for name in plain), (
            f"{wrong.__name__}: {distances} off, {allowed} allowed"
        )


def wrong_base(model: nn.Module) -> None:
    """What a wrong scale of a few rows would do."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.base_layer.weight.data[:8] *= 2


def no_adapter(model: nn.Module) -> None:
    """As if nothing of it came out."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.scaling["default"] = 0.0


def wrong_gradient(model: nn.Module) -> None:
    """Of A and B, with the other sign."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(lambda grad: -grad)


def _keeping(touch: Touch, seen: list[nn.Module]) -> Touch:
    def kept(model: nn.Module) -> None:
        seen.append(model)
        touch(model)

    return kept


def assert_all_sites(model: nn.Module) -> None:
    """Every layer that PEFT adapted ran as a site."""
    adapted = sum(isinstance(module, Linear) for module in model.modules())
    assert len(falqon_fx.adapters(model)) == adapted > 0
