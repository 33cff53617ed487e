"""Parameters of tests of which a part is fast: the others run with `make test-all`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

Axis = Mapping[str, Any] | Sequence[Any]
PREPARED_OR_NOT = {"unprepared": False, "prepared": True}


def slow(*values: Any, id: str | None = None) -> Any:
    """A set of parameters that the fast tests leave out."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def each_value(**axes: Axis) -> pytest.MarkDecorator:
    """All combinations; the fast tests take so many that each value of each axis occurs."""
    return _covering(1, axes)


def each_pair(**axes: Axis) -> pytest.MarkDecorator:
    """All combinations; the fast tests take so many that each pair of values of two axes occurs."""
    return _covering(2, axes)


def _covering(strength: int, axes: Mapping[str, Axis]) -> pytest.MarkDecorator:
    """Greedily: next comes what has the most values, or pairs, that have not occurred yet."""
    named = [list(_named(axis).items()) for axis in axes.values()]
    combinations = list(itertools.product(*named))

    def parts(combination: Sequence[tuple[str, Any]]) -> set[tuple[tuple[int, str], ...]]:
        ids = enumerate(name for name, _ in combination)
        return set(itertools.combinations(ids, strength))

    lacking = set().union(*map(parts, combinations))
    fast = set()
    while lacking:
        best = max(combinations, key=lambda combination: len(parts(combination) & lacking))
        lacking -= parts(best)
        fast.add(id(best))
    parameters = [
        pytest.param(
            *(value for _, value in combination),
            id="-".join(name for name, _ in combination),
            marks=() if id(combination) in fast else pytest.mark.slow,
        )
        for combination in combinations
    ]
    return pytest.mark.parametrize(tuple(axes), parameters)


def _named(axis: Axis) -> dict[str, Any]:
    if isinstance(axis, Mapping):
        return dict(axis)
    return {getattr(value, "__name__", str(value)): value for value in axis}
