"""Faults in what a calibration adds to a site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import fx

from falqon_fx.ops import merged_linear, outliers
from tests.calibrated import RANK, calibrated, inputs
from tests.passes.rewritten import (
    CASTS,
    CHANNELS,
    Rewritten,
    captured,
    change,
    passes,
    seen,
    values,
)


def rewritten(compensate: int) -> Rewritten:
    model, (x, *_) = calibrated(compensate=compensate), inputs(1)
    gm = captured(model, x)
    return passes(gm, values(gm, x))


@pytest.fixture
def done() -> Rewritten:
    """The layer without adapters has the cast error of x behind it."""
    return rewritten(0)


def errors(done: Rewritten) -> list[fx.Node]:
    return done.graph.find_nodes(op="call_function", target=outliers.OP)


def of_another_x(done: Rewritten) -> None:
    (error,) = errors(done)
    x = next(iter(done.graph.find_nodes(op="placeholder")))
    change(error, 0, x)


def with_swapped_terms(done: Rewritten) -> None:
    error = errors(done)[0]
    channels, columns = error.args[1:3]
    change(error, 1, columns)
    change(error, 2, channels)


def in_another_dtype(done: Rewritten) -> None:
    change(errors(done)[0], 3, torch.float16)


def of_another_spec(done: Rewritten) -> None:
    change(errors(done)[0], 4, "another")


def subtracted(done: Rewritten) -> None:
    (total,) = errors(done)[0].users
    total.target = torch.sub


def lost(done: Rewritten) -> None:
    (total,) = errors(done)[0].users
    total.replace_all_uses_with(total.args[0])
    done.graph.erase_node(total)


FAULTS: dict[Callable[[Rewritten], None], str] = {
    of_another_x: "adds outliers.* of ",
    with_swapped_terms: "is not its",
    in_another_dtype: "computes with torch.float16",
    of_another_spec: "computes with .*another",
    subtracted: "0 new operations .*add.*, 1 are",
    lost: "0 new operations .*add.*, 1 are",
}


@pytest.mark.parametrize(
    ("damage", "said"), FAULTS.items(), ids=lambda f: getattr(f, "__name__", "")
)
def test_a_wrong_error_of_x_is_seen(done, damage, said):
    done.verify()
    damage(done)
    with seen(said):
        done.verify()


def of_kind(done: Rewritten, target: Any) -> list[fx.Node]:
    return done.graph.find_nodes(op="call_function", target=target)


def swap(node: fx.Node, place: int) -> None:
    """The last two operands of a list of them change places."""
    given = cast(list[fx.Node], node.args[place])
    change(node, place, [*given[:-2], given[-1], given[-2]])


FIXED = {"error_a": 4, "error_b": 5, "columns": 6}


@pytest.mark.parametrize("place", FIXED.values(), ids=[*FIXED])
def test_another_layers_terms_in_a_cast_are_seen(place):
    done = rewritten(RANK)
    done.verify()
    (casts,) = (node for node in of_kind(done, CASTS) if len(node.args[place]) > 1)
    swap(casts, place)
    with seen("is not its"):
        done.verify()


def test_other_channels_of_an_op_are_seen():
    done = rewritten(RANK)
    (both,) = (node for node in of_kind(done, merged_linear.OP) if len(node.args[CHANNELS]) == 2)
    swap(both, CHANNELS)
    with seen("is not its"):
        done.verify()
