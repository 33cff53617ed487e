"""Faults in what a calibration adds behind a site: the cast error of x in some channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from falqon_fx.ops import outliers
from tests.calibrated import calibrated, inputs
from tests.passes.rewritten import Rewritten, captured, change, passes, seen, values


@pytest.fixture
def done() -> Rewritten:
    model, (x, *_) = calibrated(), inputs(1)
    gm = captured(model, x)
    return passes(gm, values(gm, x))


def errors(done: Rewritten) -> list[fx.Node]:
    return done.graph.find_nodes(op="call_function", target=outliers.OP)


def of_another_x(done: Rewritten) -> None:
    first, *others = errors(done)
    other = next(error for error in others if error.args[0] is not first.args[0])
    change(other, 0, first.args[0])


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
    subtracted: "3 new operations .*add.*, 4 are",
    lost: "3 new operations .*add.*, 4 are",
}


@pytest.mark.parametrize(
    ("damage", "said"), FAULTS.items(), ids=lambda f: getattr(f, "__name__", "")
)
def test_a_wrong_error_of_x_is_seen(done, damage, said):
    done.verify()
    damage(done)
    with seen(said):
        done.verify()
