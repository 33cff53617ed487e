"""Random programs, original against rewritten, forward and backward.

    HYPOTHESIS_PROFILE=fuzz pytest -m "" tests/test_fuzz.py      # 6,000 programs

A rewritten program must equal, bit for bit, the program whose layers are replaced by an emulation
of the quantized ops (tests/emulation.py): outputs, dL/dx and the gradients of every A, B and bias,
before and after a step of them. So all that is outside of the sites runs as it did.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from falqon_fx import FalqonConfig, RewriteResult, adapters, rewrite
from tests.emulation import Layer, codes_of
from tests.programs import WIDTH, Program, adapters_of, emulated, programs
from tests.sites import randn

_default = settings.get_profile(settings.get_current_profile_name()).max_examples
MANY, SOME = max(40, _default), max(20, _default // 10)

CONFIGS = st.builds(
    lambda formats, **options: FalqonConfig(**formats, **options),
    st.sampled_from([{}, {"grad_dtype": "e4m3"}, {"base_dtype": "int8"}, {"base_dtype": "nvfp4"}]),
    frozen=st.sampled_from(["fp8", "leave"]),
    granularity=st.sampled_from(["row", "row", "tensor"]),
    scale=st.sampled_from(["pow2", "pow2", "amax"]),
    siblings=st.booleans(),
)
ROWS = st.builds(
    FalqonConfig,
    update=st.just("rows"),
    frozen=st.sampled_from(["fp8", "leave"]),
    granularity=st.sampled_from(["row", "row", "tensor"]),
    scale=st.sampled_from(["pow2", "pow2", "amax"]),
    pending=st.sampled_from(["apply", "hold", "drop"]),
    topk=st.just(3),
    rounding=st.just("nearest"),
)


def results(call: Callable[[Tensor], Tensor], program: Program, x: Tensor) -> list[Tensor | None]:
    """y, dL/dx and the gradients of all parameters; every run drops the same values."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(randn(*y.shape, seed=3))
    grads = [p.grad for p in program.parameters()]
    program.zero_grad()
    return [y.detach(), x.grad, *grads]


def ops_of(result: RewriteResult) -> list[list[tuple[int, int]]]:
    """For each op of a rewritten graph, its layers and how many adapters of each it has."""
    bases = {nodes.weight: nodes.given[0] for nodes in result.operands.bases}
    found = []
    for op in result.gm.graph.find_nodes(
        op="call_function", target=torch.ops.falqon.merged_linear.default
    ):
        weights, lora_b, owner = op.args[1], op.args[10], op.args[12]
        adapters = [[b for b, i in zip(lora_b, owner) if i == site] for site in range(len(weights))]
        found.append(
            [
                (layer_of(bases[weight] if weight in bases else own[0]), len(own))
                for weight, own in zip(weights, adapters, strict=True)
            ]
        )
    return found


def layer_of(parameter: fx.Node) -> int:
    """layers.3.lora_b.weight, or Dynamo's l_self_modules_layers_modules_3_..."""
    found = re.search(r"layers(?:\.|_modules_)(\d+)", str(parameter.target))
    assert found
    return int(found[1])


def check(
    program: Program,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    rewritten: list[RewriteResult],
    config: FalqonConfig,
) -> None:
    got = results(call, program, x)
    ops = [op for result in rewritten for op in ops_of(result)]
    in_fp8 = {layer: count for op in ops for layer, count in op}
    frozen = program.plain() if config.frozen == "fp8" else {}
    wanted = {path: len(adapters_of(layer)) for path, layer in program.sites().items()}
    wanted |= dict.fromkeys(frozen, 0)
    assert {f"layers.{i}": count for i, count in in_fp8.items()} == wanted

    found: Any = adapters(program)
    assert found.keys() == program.sites().keys()
    states = found if config.update == "rows" else None
    groups = [[layer for layer, _ in op] for op in ops if len(op) > 1]
    assert config.siblings or not groups
    twin = emulated(program, in_fp8, groups, config, states)
    for a, b in zip(got, results(twin, twin, x), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def check_twice(
    program: Program,
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    rewritten: list[RewriteResult],
    config: FalqonConfig,
) -> None:
    """At the start, and after a step of all that trains. The base is the cast of W throughout."""
    check(program, call, x, rewritten, config)
    with torch.no_grad():
        for i, parameter in enumerate(program.parameters()):
            if parameter.requires_grad:
                parameter.add_(randn(*parameter.shape, seed=i) / 64)
    check(program, call, x, rewritten, config)
    if config.update == "adapter":
        found: Any = adapters(program)
        for path, layer in program.sites().items():
            wanted = Layer.of(layer.base.weight, None, (), config)
            assert torch.equal(codes_of(found[path].weight), wanted.codes)
            assert torch.equal(found[path].scale, wanted.scale)


class Backend:
    """Runs the passes alone and keeps what they made of each graph."""

    def __init__(self, config: FalqonConfig) -> None:
        self.config = config
        self.results: list[RewriteResult] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> RewriteResult:
        self.results.append(rewrite(gm, inputs, self.config))
        return self.results[-1]


def traced(program: Program, config: FalqonConfig) -> None:
    x = randn(6, WIDTH, seed=1)
    result = rewrite(fx.symbolic_trace(program), [x], config)
    assert not result.report.rejected
    check_twice(program, result, x, [result], config)


@given(programs(), CONFIGS)
@settings(max_examples=MANY)
def test_symbolically_traced_programs(program, config):
    traced(program, config)


@given(programs(rows=True), ROWS)
@settings(max_examples=SOME)
def test_symbolically_traced_programs_with_written_rows(program, config):
    traced(program, config)


def compiled(program: Program, config: FalqonConfig) -> None:
    torch._dynamo.reset()
    backend = Backend(config)
    call = torch.compile(program, backend=backend)
    check_twice(program, call, randn(6, WIDTH, seed=1), backend.results, config)
    assert not [item for result in backend.results for item in result.report.rejected]


@pytest.mark.slow
@given(programs(), CONFIGS)
@settings(max_examples=SOME)
def test_programs_from_dynamo(program, config):
    compiled(program, config)


@pytest.mark.slow
@given(programs(rows=True), ROWS)
@settings(max_examples=max(20, SOME // 2))
def test_programs_from_dynamo_with_written_rows(program, config):
    compiled(program, config)


@pytest.mark.slow
@given(programs(), CONFIGS)
@settings(max_examples=SOME)
def test_exported_programs(program, config):
    x = randn(6, WIDTH, seed=1)
    result = rewrite(torch.export.export(program, (x,)).module(), [x], config)
    assert not result.report.rejected
    check_twice(program, result, x, [result], config)
