"""Random programs, original against rewritten, forward and backward.

    HYPOTHESIS_PROFILE=fuzz pytest tests/test_fuzz.py      # 5,000 programs

A rewritten program must equal, bit for bit, the program whose LoRA layers are replaced by an
emulation of the quantized ops (tests/emulation.py): outputs, dL/dx and dL/dB, before and after a
step of B. So all that is outside of the sites runs as it did.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx

from falqon_fx import FalqonConfig, MergedAdapter, adapters, rewrite
from tests.programs import Program, emulated, programs
from tests.sites import randn

CONFIG = FalqonConfig(topk=3, rounding="nearest")
_default = settings.get_profile(settings.get_current_profile_name()).max_examples
MANY = max(150, _default)


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
    program: Program, states: dict[str, MergedAdapter], x: Tensor
) -> list[Tensor | None]:
    twin = emulated(program, states)
    x = x.clone().requires_grad_()
    y = twin(x)
    y.backward(randn(*y.shape, seed=3))
    sites = [twin.layers[int(path.removeprefix("layers."))] for path in program.sites()]
    return [y.detach(), x.grad, *(site.lora_B.grad for site in sites)]


def check(program: Program, call: object, x: Tensor) -> None:
    got = results(call, program, x)
    states = adapters(program)
    own = {id(layer.lora_b.weight): path for path, layer in program.sites().items()}
    by_site = {own[id(s.b_ref())]: s for s in states.values()}
    assert by_site.keys() == program.sites().keys()
    for a, b in zip(got, twin_results(program, by_site, x), strict=True):
        assert torch.equal(a, b)


def check_twice(program: Program, call: object, x: Tensor) -> None:
    """At the start, where B is in W'; and after a step, where a part of it is pending."""
    check(program, call, x)
    with torch.no_grad():
        for i, layer in enumerate(program.sites().values()):
            layer.lora_b.weight.add_(randn(*layer.lora_b.weight.shape, seed=i) / 64)
    check(program, call, x)


@given(programs())
@settings(max_examples=MANY)
def test_symbolically_traced_programs(program):
    x = randn(6, 24, seed=1)
    result = rewrite(fx.symbolic_trace(program), [x], CONFIG)
    assert not result.report.rejected
    check_twice(program, result, x)


@pytest.mark.slow
@given(programs())
@settings(max_examples=40)
def test_programs_from_dynamo(program):
    torch._dynamo.reset()
    call = torch.compile(
        program, backend="falqon", options={"inner": "eager", "topk": 3, "rounding": "nearest"}
    )
    check_twice(program, call, randn(6, 24, seed=1))


@pytest.mark.slow
@given(programs())
@settings(max_examples=40)
def test_exported_programs(program):
    x = randn(6, 24, seed=1)
    result = rewrite(torch.export.export(program, (x,)).module(), [x], CONFIG)
    assert not result.report.rejected
    check_twice(program, result, x)
