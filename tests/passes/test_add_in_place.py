"""`torch.addmm` adds in place where nobody sees it, in the graphs that Inductor lowers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from falqon_fx import _compat
from falqon_fx.passes.add_in_place import add_in_place
from falqon_fx.site.numerics import E4M3
from tests.sites import randn

aten = torch.ops.aten
N, K, OUT, RANK = 32, 48, 64, 16
Given = tuple[Tensor, Tensor, Tensor, Tensor]


def given() -> Given:
    """x, W, O_A and b."""
    x, w = randn(N, K, seed=1).to(E4M3), randn(OUT, K, seed=2).to(E4M3)
    return x, w, randn(N, RANK, seed=3).bfloat16(), randn(OUT, RANK, seed=4).bfloat16()


def product(x: Tensor, w: Tensor) -> Tensor:
    one = x.new_ones((), dtype=torch.float32)
    return aten._scaled_mm(x, w.t(), one, one, None, None, torch.bfloat16)


def of_one(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    """O of a site."""
    return aten.addmm(product(x, w), out_a, b.t()) * 2


def of_two(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    """dL/dx of siblings, a sum in float32."""
    total = product(x, w).float() + product(x, w.flip(0)).float()
    whole = torch.ops.prims.convert_element_type(total, torch.bfloat16)
    return aten.addmm(whole, out_a, b.t()).relu()


def twice(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    """What is in the memory afterwards is added to once more."""
    y = aten.addmm(product(x, w), out_a, b.t())
    return aten.addmm(y, out_a.neg(), b.t(), alpha=0.5) + y


def with_a_reader(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    y = product(x, w)
    return aten.addmm(y, out_a, b.t()) - y


def with_a_view(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = product(x, w)
    return aten.addmm(y, out_a, b.t()), y[0] + 1


def of_an_input(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    return aten.addmm(out_a, out_a[:, :RANK], out_a[:RANK])


def of_nothing_new(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    same = torch.ops.prims.convert_element_type(out_a, torch.bfloat16)
    return aten.addmm(same, out_a, out_a[:RANK])


def of_a_row(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    y = torch.ops.prims.convert_element_type(out_a[0].float(), torch.bfloat16)
    return aten.addmm(y, out_a, out_a[:RANK])


def of_columns(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> Tensor:
    y = product(w, x)  # [OUT, N]
    whole = torch.ops.prims.convert_element_type(y.t().float(), torch.bfloat16)
    return aten.addmm(whole, out_a, b.t())


IN_PLACE: dict[str, tuple[Callable[..., Any], int]] = {
    f.__name__: (f, count) for f, count in ((of_one, 1), (of_two, 1), (twice, 1))
}
AS_IT_WAS = (with_a_reader, with_a_view, of_an_input, of_nothing_new, of_a_row, of_columns)


def changed(f: Callable[..., Any]) -> tuple[fx.GraphModule, int]:
    """The graph of a function behind the pass, and how many additions are in place."""
    gm = make_fx(f, tracing_mode="fake")(*given())
    add_in_place(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, len(gm.graph.find_nodes(op="call_function", target=aten.addmm_.default))


@pytest.mark.parametrize("f", [f for f, _ in IN_PLACE.values()], ids=IN_PLACE.keys())
def test_it_adds_in_place(f):
    gm, count = changed(f)
    assert count == IN_PLACE[f.__name__][1]
    assert torch.equal(gm(*given()), f(*given()))


@pytest.mark.parametrize("f", AS_IT_WAS)
def test_what_others_see_stays_as_it_was(f):
    assert changed(f)[1] == 0


@pytest.mark.slow
def test_inductor_writes_no_copy():
    """By the options that the backend sets: all numbers are those of eager code."""
    made: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        passes = {"post_grad_custom_post_pass": add_in_place}
        run = _compat.inductor_compile(gm, inputs, {}, None, None, passes, "test")
        made.append(run)
        return run

    def all_of_them(x: Tensor, w: Tensor, out_a: Tensor, b: Tensor) -> list[Tensor]:
        with_reader = with_a_reader(x, w, out_a, b)
        return [*(f(x, w, out_a, b) for f, _ in IN_PLACE.values()), with_reader]

    torch._dynamo.reset()
    results, (code,) = run_and_get_code(torch.compile(all_of_them, backend=backend), *given())
    assert made
    assert code.count("aten.addmm_.default(") == 3
    assert code.count("extern_kernels.addmm(") == 2  # what has another reader
    wanted = all_of_them(*given())
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
