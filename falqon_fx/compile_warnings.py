"""What a compilation warns of; each text once, until ``torch._dynamo.reset()``."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from falqon_fx import _compat
from falqon_fx.errors import warn_once
from falqon_fx.report.data import GraphReport
from falqon_fx.report.paths import ModulePaths
from falqon_fx.site.names import model_of_call, tensors_of

_LORA = re.compile(r"\.?\blora_[AaBb](?![a-z]).*")
# What LoRA layers lie in: the storages of parameters that graphs were compiled for.
_met: weakref.WeakSet[Any] = weakref.WeakSet()


def forget() -> None:
    """Begin anew: `torch._dynamo.reset` calls it."""
    warn_once.cache_clear()
    _met.clear()


def warn(graph: GraphReport, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """What is to be said of a graph as soon as it was rewritten."""
    if graph.rejected:
        graph = ModulePaths.from_call_stack().report(graph, gm.graph, inputs)
    for item in graph.rejected:
        warn_once(f"falqon: left as it was: {item}")
    limit = torch._dynamo.config.recompile_limit
    if graph.sites and _compat.compile_number() + 1 == limit:
        warn_once(
            f"falqon: this is graph {limit} of the code around {graph.sites[0].path}, and the last "
            "one: from the next change on (of a shape, a scaling, the active adapters, "
            "requires_grad, grad mode) Dynamo runs that code uncompiled, on the base weights as "
            "they are and not in FP8, with other numbers. Raise "
            f"torch._dynamo.config.recompile_limit ({limit}) before compiling."
        )


def looking_for_lora(
    call: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """``call``, which runs a graph. If that is a part of a LoRA model without any LoRA layer, it
    looks, once the model has been trained for a step, whether another graph has one; if none has,
    it warns. Earlier nobody knows: the layers may stand behind a graph break.
    """
    model = model_of_call()
    layers = {id(parameter): parameter for _, parameter in _lora_of(model)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    named = {id(v) for n, v in zip(placeholders, inputs) if _LORA.search(_compat.source_path(n))}
    met = [v for v in inputs if isinstance(v, Tensor) and (id(v) in layers or id(v) in named)]
    if met:
        _met.update(_place(parameter) for parameter in met)
        _met.add(model)
        return call
    if not layers or model in _met:
        return call
    return _looking(call, model, [*layers.values()])


def _looking(
    call: Callable[..., Any], model: nn.Module, parameters: Sequence[Tensor]
) -> Callable[..., Any]:
    root = weakref.ref(model)
    seen = [(weakref.ref(parameter), parameter._version) for parameter in parameters]

    def run(*args: Any) -> Any:
        if seen:
            inner = root()
            if inner is None or inner in _met:
                seen.clear()
            elif any(_was_trained(parameter(), version) for parameter, version in seen):
                seen.clear()
                _warn_of_none(inner)
        return call(*args)

    return run


def _was_trained(parameter: Tensor | None, version: int) -> bool:
    return parameter is not None and (parameter.grad is not None or parameter._version != version)


def _warn_of_none(model: nn.Module) -> None:
    found = list(_lora_of(model))
    if any(_place(parameter) in _met for _, parameter in found):
        return
    paths = sorted({_LORA.sub("", path) for path, _ in found})
    warn_once(
        f"falqon: {type(model).__name__} was trained for a step, and none of its {len(paths)} LoRA "
        f"layers (first {paths[0]}) is in a compiled graph: all of them run as they were, without "
        "FP8. Compile the whole model or its blocks; TORCH_LOGS=graph_breaks shows what Dynamo "
        "leaves out."
    )


def _lora_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters of a model that are named as LoRA's."""
    named = ((names[0], tensor) for tensor, names in tensors_of(model).values())
    return [(name, tensor) for name, tensor in named if _LORA.search(name)]


def _place(parameter: Tensor) -> Any:
    return parameter.untyped_storage()
