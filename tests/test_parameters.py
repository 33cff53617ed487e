"""What of the parameters of other tests is fast."""

from __future__ import annotations

import itertools

from tests.parameters import each_pair, each_value

AXES = {"a": [1, 2, 3], "b": {"no": False, "yes": True}, "c": ["x", "y"]}


def fast(mark):
    return [set(p.id.split("-")) for p in mark.args[1] if not p.marks]


def test_the_fast_ones_hold_each_value_or_each_pair_of_values():
    values = [["1", "2", "3"], ["no", "yes"], ["x", "y"]]
    singles, pairs = fast(each_value(**AXES).mark), fast(each_pair(**AXES).mark)
    assert all(any({v} <= ids for ids in singles) for axis in values for v in axis)
    for one, other in itertools.combinations(values, 2):
        for pair in itertools.product(one, other):
            assert any({*pair} <= ids for ids in pairs)
    assert (len(singles), len(pairs)) == (3, 6)  # of 12; no fewer can do


def test_the_slow_ones_are_all_others():
    parameters = each_value(**AXES).mark.args[1]
    assert len({p.id for p in parameters}) == len(parameters) == 12
    assert {p.values for p in parameters} == set(itertools.product([1, 2, 3], [False, True], "xy"))
