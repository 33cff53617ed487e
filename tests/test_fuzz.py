"""Random programs, original against rewritten, forward and backward.

    HYPOTHESIS_PROFILE=fuzz pytest -m "" tests/test_fuzz.py      # 6,000 programs

A rewritten program must equal, bit for bit, the program whose LoRA layers are replaced by an
emulation of the quantized ops (tests/emulation.py): outputs, dL/dx and dL/dB, before and after a
step of B. So all that is outside of the sites runs as it did.
"""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from falqon_fx import FalqonConfig, MergedAdapter, RewriteResult, adapters, rewrite
from falqon_fx.passes import autotune
from tests.programs import Program, emulated, programs
from tests.sites import randn
from tests.spellings import Passes

CONFIG = FalqonConfig(topk=3, rounding="nearest")
_default = settings.get_profile(settings.get_current_profile_name()).max_examples
MANY, SOME = max(150, _default), max(40, _default // 10)


def results(call: object, program: Program, x: Tensor) -> list[Tensor | None]:
    """y, dL/dx and dL/dB of every LoRA layer."""
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(randn(*y.shape, seed=3))
    grads = []
    for layer in program.sites().values():
        grads.append(layer.lora_b.weight.grad)
        layer.lora_b.weight.grad = None
    return [y.detach(), x.grad, *grads]


def twin_results(
    program: Program,
    states: dict[str, MergedAdapter],
    groups: list[list[int]],
    x: Tensor,
    strided: bool,
) -> list[Tensor | None]:
    twin = emulated(program, states, groups, strided)
    x = x.clone().requires_grad_()
    y = twin(x)
    y.backward(randn(*y.shape, seed=3))
    sites = [twin.layers[int(path.removeprefix("layers."))] for path in program.sites()]
    return [y.detach(), x.grad, *(site.lora_B.grad for site in sites)]


def groups_of(result: RewriteResult) -> list[list[int]]:
    """The layers of each rewritten op that stands for several: siblings that share x."""
    fused = torch.ops.falqon.merged_linear.default
    ops = result.gm.graph.find_nodes(op="call_function", target=fused)
    groups = [[layer_of(node) for node in op.args[4]] for op in ops]
    return [group for group in groups if len(group) > 1]


def layer_of(lora_b: fx.Node) -> int:
    """layers.3.lora_b.weight, or Dynamo's l_self_modules_layers_modules_3_..."""
    found = re.search(r"layers(?:\.|_modules_)(\d+)", str(lora_b.target))
    assert found
    return int(found[1])


def check(
    program: Program, call: object, x: Tensor, rewritten: list[RewriteResult], strided: bool
) -> None:
    got = results(call, program, x)
    groups = [group for result in rewritten for group in groups_of(result)]
    states = adapters(program)
    own = {id(layer.lora_b.weight): path for path, layer in program.sites().items()}
    by_site = {own[id(s.b_ref())]: s for s in states.values()}
    assert by_site.keys() == program.sites().keys()
    for a, b in zip(got, twin_results(program, by_site, groups, x, strided), strict=True):
        assert torch.equal(a, b)


def check_twice(
    program: Program,
    call: object,
    x: Tensor,
    rewritten: list[RewriteResult],
    strided: bool = False,
) -> None:
    """At the start, where B is in W'; and after a step, where a part of it is pending."""
    check(program, call, x, rewritten, strided)
    with torch.no_grad():
        for i, layer in enumerate(program.sites().values()):
            layer.lora_b.weight.add_(randn(*layer.lora_b.weight.shape, seed=i) / 64)
    check(program, call, x, rewritten, strided)


def rewritten_as_views(gm: fx.GraphModule, x: Tensor) -> RewriteResult | None:
    """As where a GPU finds O as a view faster at every site; None where a reader takes no view."""
    every: list[bool] = []

    def look(_: object, views: bool, spec: object) -> autotune.Tuned:
        every.append(views)
        return autotune.Tuned(views, "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autotune, "_has_choices", lambda group, spec: True)
        patch.setattr(autotune, "time_products", look)
        result = rewrite(gm, [x], CONFIG)
    return result if all(every) else None


@given(programs(), st.booleans())
@settings(max_examples=MANY)
def test_symbolically_traced_programs(program, views):
    x, gm = randn(6, 24, seed=1), fx.symbolic_trace(program)
    result = rewritten_as_views(gm, x) if views else None
    strided = result is not None
    result = result or rewrite(gm, [x], CONFIG)
    assert not result.report.rejected
    check_twice(program, result, x, [result], strided)


@pytest.mark.slow
@given(programs())
@settings(max_examples=SOME)
def test_programs_from_dynamo(program):
    torch._dynamo.reset()
    passes = Passes(topk=3, rounding="nearest")
    call = torch.compile(program, backend=passes)
    check_twice(program, call, randn(6, 24, seed=1), passes.results)
    assert not passes.rejected


@pytest.mark.slow
@given(programs())
@settings(max_examples=SOME)
def test_exported_programs(program):
    x = randn(6, 24, seed=1)
    result = rewrite(torch.export.export(program, (x,)).module(), [x], CONFIG)
    assert not result.report.rejected
    check_twice(program, result, x, [result])
