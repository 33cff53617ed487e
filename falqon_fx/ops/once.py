"""Gradients that can't be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError


class Once(torch.autograd.Function):
    """``value``, which depends on ``given`` in a way that can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *given: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise FalqonError(
            "falqon::merged_linear",
            "second derivatives are asked for, which a product in FP8 doesn't have",
            "Leave the layer out with exclude=, or take second derivatives of the uncompiled model",
        )


def once(results: tuple[Any, ...], given: list[Tensor]) -> tuple[Any, ...]:
    """Gradients whose own gradient raises: they depend on ``given``."""

    def guard(value: Any) -> Any:
        if isinstance(value, list):
            return [guard(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        return Once.apply(value, *given)  # type: ignore[no-untyped-call]

    return tuple(guard(value) for value in results)
