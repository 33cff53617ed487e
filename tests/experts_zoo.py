"""What becomes of the stacked experts of a family of models, tiny, in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, fx, nn
from torch.nn import functional as F

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.integrations.peft import trace_param_wrappers
from falqon_fx.model.stacks import is_experts
from tests import zoo
from tests.models import fill_b

# Causal language models; of multimodal ones their decoders.
FAMILIES = [name for name in zoo.families() if name not in zoo.LEFT_OUT]
SIMILAR = 0.99  # of the gradients of A and B, beside PEFT's: FP8 moves them by 3 to 6%


# One expert a token: of the 16 tokens of the zoo's batches each would get four.
MORE_TOKENS = {"zaya": (4, 64)}


@dataclass(frozen=True)
class Row:
    """A family with stacks of experts.

    Attributes:
        layout: "plain" [E, out, in], or what is otherwise.
        stacks: how many PEFT adapts. merged: how many of them are sites.
        similar: the least cosine of a gradient of A or B to that of PEFT, uncompiled.
        graphs: in three steps, each with other tokens.
        why: what is refused, and why.
    """

    family: str
    layout: str
    stacks: int
    merged: int
    similar: float
    graphs: int
    why: tuple[str, ...]


def stacks_in(model: nn.Module) -> dict[str, list[str]]:
    """The stacked parameters of transformers' interface by module: what PEFT is to target."""
    found = {}
    for path, module in model.named_modules():
        if is_experts(module):
            own = module.named_parameters(recurse=False)
            found[path] = [name for name, weight in own if weight.dim() == 3]
    return found


def layout(model: Any) -> str:
    """How experts store their weights."""
    experts = next(m for m in model.modules() if is_experts(m))
    flags = {
        "transposed": experts.is_transposed,
        "biases": experts.has_bias,
        "interleaved": not getattr(experts, "is_concatenated", True),
        "no gate": not experts.has_gate,
    }
    return ", ".join(name for name, said in flags.items() if said) or "plain"


def adapted(name: str) -> Any | None:
    """A tiny model whose stacks PEFT adapts; None where a family has none."""
    model: Any = zoo.build(name)
    stacks = {f"{p.rpartition('.')[2]}.{n}" for p, ns in stacks_in(model).items() for n in ns}
    if not stacks:
        return None
    model.set_experts_implementation("grouped_mm")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=sorted(stacks))
    model = peft.get_peft_model(model, config)
    fill_b(model, 0.05)
    return model


def wrappers_of(model: Any) -> list[Any]:
    """PEFT's wrappers of stacked weights."""
    wrappers = [m for m in model.modules() if isinstance(m, ParamWrapper)]
    return [m for m in wrappers if m.get_param().dim() == 3]


def gradients(model: Any, call: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Those of A and B of each stack."""
    model.zero_grad()
    call(**batch).loss.backward()
    layers = [part["default"] for m in wrappers_of(model) for part in (m.lora_A, m.lora_B)]
    return [layer.weight.grad.flatten() for layer in layers]


def measure(name: str) -> Row | None:
    """One step beside PEFT's, then two with other tokens; None where a family has no stacks."""
    torch._dynamo.reset()
    model = adapted(name)
    if model is None:
        return None
    kind, twin, batch = layout(model), copy.deepcopy(model), zoo.batch(name)
    if name in MORE_TOKENS:
        ids = torch.randint(3, 64, MORE_TOKENS[name], generator=torch.Generator().manual_seed(1))
        batch = {"input_ids": ids, "labels": ids}
    theirs = gradients(twin, twin, batch)
    trace_param_wrappers(model)
    # Stacks alone: what FP8 in other layers moves may route a token of a tiny model elsewhere. By
    # the ends of their paths, which are shorter in a graph of a part of the model.
    wrappers = wrappers_of(model)
    names = {m.parameter_name for m in wrappers}
    config = FalqonConfig(inner="eager", include=tuple(f"*experts.{name}" for name in names))
    reports = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        result = falqon_fx.rewrite(gm, [*inputs], config)
        reports.append(result.report)
        return result

    call: Any = torch.compile(model, backend=backend)
    ours = gradients(model, call, batch)
    seen = [*reports]
    # Those that have run: layers may share a graph.
    merged = sum(getattr(site, "experts", 0) > 0 for site in falqon_fx.adapters(model).values())
    for _ in range(2):
        ids = torch.randint(3, 64, batch["input_ids"].shape)
        call(**{n: ids if n in ("input_ids", "labels") else t for n, t in batch.items()})
    refused = {item.reason for report in seen for item in (*report.rejected, *report.left)}
    least = min(float(F.cosine_similarity(a, b, 0)) for a, b in zip(ours, theirs, strict=True))
    return Row(name, kind, len(wrappers), merged, least, len(reports), tuple(sorted(refused)))
