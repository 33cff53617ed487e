"""LoRA on every family of models: sites, numbers, training, recompiles.

Per family, with backend="falqon": every LoRA linear layer that runs is a site; output and gradients
of B equal an eager emulation of the same quantized ops; both point where the original model's
point; three steps train; nothing compiles after the first (three families: the second).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import falqon_fx
from tests import zoo
from tests.emulation import emulate
from tests.models import fill_b, lora_b

FAMILIES = zoo.families()
COVERED = [name for name in FAMILIES if name not in zoo.LEFT_OUT and name not in zoo.PEFT_CANNOT]
# One of each way to write a linear layer, a block or a model.
FAST = {
    "falcon",  # writes the result of a linear in place
    "gpt2",  # Conv1D
    "phi3",  # fused QKV and gate
    "qwen2_moe",  # a gate with one row
    "rwkv",  # no attention
}


Run = Callable[..., Any]


def result_of(output: Any) -> tuple[Any, Any]:
    """What a model returns, and a loss of it."""
    names = ("logits", "sample", "logits_per_image", "last_hidden_state")
    value = output if isinstance(output, Tensor) else None
    for name in names:
        value = getattr(output, name, None) if value is None else value
    loss = getattr(output, "loss", None)
    return value, value.float().square().mean() if loss is None else loss


def run(call: Run, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, list[Any]]:
    """Output and gradients of B; the seed fixes what a model drops out."""
    model.zero_grad()
    torch.manual_seed(5)
    value, loss = result_of(call(**batch))
    loss.backward()
    return value.detach(), [b.grad for b in lora_b(model)]


def layers_that_run(model: nn.Module, batch: dict[str, Tensor]) -> set[str]:
    """The paths of the LoRA linear layers that a forward pass calls."""
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, path=path: called.add(path))
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.Linear)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return called


def parameters_that_peft_adapts(model: nn.Module) -> tuple[str, ...]:
    """Patterns of stacked experts and routers: tests/test_experts_zoo.py has them."""
    wrappers = [p for p, m in model.named_modules() if isinstance(m, ParamWrapper)]
    paths = {path.replace(".base_layer", "") for path in wrappers}
    return tuple(pattern for path in sorted(paths) for pattern in (path, f"{path}.*"))


def off_by(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """|a - b| / |b| of all values as one vector; absent in both or in none."""
    assert [t is None for t in a] == [t is None for t in b]
    left, right = (torch.cat([t.double().flatten() for t in x if t is not None]) for x in (a, b))
    return float((left - right).norm() / right.norm())


# Sites that share x add up dL/dx, and multiply with A, in another order than layer by layer. That
# costs float32 roundings, 2^-24 each, and where one crosses a boundary of the E5M2 grid the gap of
# one element in thousands, 2^-2 of it.
ORDER = 1e-3
# FP8 rounds each weight and input by up to 2^-4 of it, 3% of a product in the mean, and gradients
# by more. What a model makes of that is its own: this bound is no theorem, but what is asked for.
COSINE = 0.9


def cosine(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """Of all values as one vector."""
    left, right = (torch.cat([t.double().flatten() for t in x if t is not None]) for x in (a, b))
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


def check(model: nn.Module, batch: dict[str, Tensor], graphs: list[Any], warm_up: int = 1) -> None:
    fill_b(model, size=0.05)
    expected_sites = layers_that_run(model, batch)
    original, original_grads = run(model, model, batch)

    options = {"inner": "eager", "frozen": "leave", "exclude": parameters_that_peft_adapts(model)}
    call = torch.compile(model, backend="falqon", options=options)
    quantized, grads = run(call, model, batch)
    states = falqon_fx.adapters(model)
    # By B: a block that several layers share has more than one path.
    found = {id(b) for state in states.values() for _, b, _ in state.adapters}
    layers = [model.get_submodule(path) for path in expected_sites]
    assert found == {id(layer.lora_B["default"].weight) for layer in layers}
    assert not [item for report in graphs for item in report.rejected if item.site in states]

    twin = emulate(copy.deepcopy(model), states)
    emulated, emulated_grads = run(twin, twin, batch)
    assert torch.equal(quantized, emulated)
    assert off_by(grads, emulated_grads) < ORDER
    assert cosine([original], [quantized]) > COSINE
    assert cosine(original_grads, grads) > COSINE

    bases = {path: state.weight.view(torch.uint8).clone() for path, state in states.items()}
    compiled = []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(3):
        if step:  # the first step's gradients are there already
            run(call, model, batch)
        optimizer.step()
        compiled.append(len(graphs))
    assert compiled.index(compiled[-1]) == warm_up - 1
    for path, state in falqon_fx.adapters(model).items():
        assert torch.equal(state.weight.view(torch.uint8), bases[path])


def marked(names: list[str], fast: set[str]) -> list[Any]:
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", marked(COVERED, FAST))
def test_decoder(name, graphs):
    check(zoo.adapt(zoo.build(name)), zoo.batch(name), graphs, zoo.WARM_UP.get(name, 1))


@pytest.mark.parametrize("name", marked(list(zoo.OTHERS), {"bert", "t5", "vit"}))
def test_other_models(name, graphs):
    model, batch = zoo.OTHERS[name]()
    check(zoo.adapt(model), batch, graphs)


@pytest.mark.parametrize("name", [n for n in zoo.PEFT_CANNOT if n in FAMILIES])
def test_what_peft_cannot_adapt(name):
    with pytest.raises((ValueError, AttributeError, RuntimeError), match=zoo.PEFT_CANNOT[name]):
        zoo.adapt(zoo.build(name))(**zoo.batch(name))


def test_coverage(capsys):
    adaptable = [name for name in FAMILIES if name not in zoo.PEFT_CANNOT]
    with capsys.disabled():
        print(
            f"\n{len(FAMILIES)} decoder families in transformers {transformers.__version__}, "
            f"{len(adaptable)} that PEFT can adapt, {len(COVERED)} in the zoo "
            f"({len(COVERED) / len(adaptable):.1%})"
        )
        for name, reason in zoo.LEFT_OUT.items():
            print(f"  left out: {name}: {reason}")
    assert set(COVERED) >= FAST
    assert len(COVERED) >= 0.95 * len(adaptable)
