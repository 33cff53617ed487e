"""PEFT-style LoRA layers and frozen linear layers of a model, found by their modules."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.model.prepared_linear import PreparedLinear
from falqon_fx.passes.match.frozen import part_of_adapter
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.quantized import quantized_as
from falqon_fx.site.sharded import added_up, local

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LoraLayer:
    """A PEFT-style layer: ``base_layer``, ``lora_A``, ``lora_B`` and ``scaling`` by adapter.

    ``adapters`` are the names of the active ones.
    """

    path: str
    module: Any
    adapters: tuple[str, ...]

    @property
    def base(self) -> Any:
        return self.module.base_layer

    @property
    def transposed(self) -> bool:
        """Whether the base weight is stored [in, out]: GPT-2's Conv1D."""
        return bool(getattr(self.module, "fan_in_fan_out", False))

    @property
    def weight(self) -> Tensor:
        """The base weight, [out, in]."""
        weight: Tensor = self.base.weight
        return weight.t() if self.transposed else weight

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weight, now or before `prepare`."""
        prepared = isinstance(self.base, PreparedLinear)
        return self.base.dtype if prepared else self.base.weight.dtype  # type: ignore[no-any-return]

    @property
    def adapter(self) -> str:
        """The first active one."""
        return self.adapters[0]

    @property
    def lora_a(self) -> nn.Parameter:
        return self.module.lora_A[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def lora_b(self) -> nn.Parameter:
        return self.module.lora_B[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def scaling(self) -> float:
        return float(self.module.scaling[self.adapter])

    def each(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(A, B, scaling) of each active adapter."""
        for name in self.adapters:
            a, b = self.module.lora_A[name].weight, self.module.lora_B[name].weight
            yield a, b, float(self.module.scaling[name])


def check_adapters(model: nn.Module) -> None:
    """Refuse to merge active adapters, of whatever kind PEFT has, that hold NaN or Inf.

    Raises:
        FalqonError: names the first such layer, and how many elements of what.
    """
    bad: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, tensor in _adapter_tensors(module):
            count = int(added_up((~local(tensor).isfinite()).sum(), tensor))
            if count:
                bad[path].append(f"{count} of {tensor.numel()} elements of its {name}")
    if bad:
        path = next(iter(bad))
        others = f" (as do adapters of {len(bad) - 1} other layers)" if len(bad) > 1 else ""
        raise FalqonError(
            path,
            f"{' and '.join(bad[path])} hold NaN or Inf{others}",
            "Load the last adapter that was whole, or repair these values",
        )


def _adapter_tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a PEFT layer's active adapters, and what they are called."""
    for part in getattr(module, "adapter_layer_names", ()):
        held = getattr(module, part, {})
        for adapter in getattr(module, "active_adapters", ()):
            if adapter not in held:
                continue
            if isinstance(held[adapter], Tensor):
                yield part, held[adapter].detach()
                continue
            for name, parameter in held[adapter].named_parameters():
                yield part if name == "weight" else f"{part}.{name}", parameter.detach()


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer, or GPT-2's Conv1D, at ``path``; ``lora`` is the LoRA layer around it."""

    path: str
    module: Any
    lora: LoraLayer | None

    @property
    def transposed(self) -> bool:
        return type(self.module) is not nn.Linear

    @property
    def weight(self) -> Tensor:
        """[out, in]."""
        weight: Tensor = self.module.weight
        return weight.t() if self.transposed else weight

    @property
    def site(self) -> str:
        """The path of the LoRA layer around it, or its own."""
        return self.path if self.lora is None else self.lora.path


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper."""
    return getattr(model, "_orig_mod", model)


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The LoRA layers in a model that have an active adapter."""
    for path, module in model.named_modules():
        parts = ("base_layer", "lora_A", "lora_B", "scaling")
        if not all(hasattr(module, part) for part in parts):
            continue
        if not isinstance(module.lora_A, nn.ModuleDict):  # LoRA by the same names, not PEFT's
            continue
        active = list(getattr(module, "active_adapters", None) or module.lora_A)
        names = tuple(n for n in active if n in module.lora_A and n in module.lora_B)
        if names:
            yield LoraLayer(without_wrappers(path), module, names)


def check_fit(layer: LoraLayer) -> None:
    """The active adapters belong to the base weight.

    Raises:
        FalqonError: shapes or devices that don't go together.
    """
    out, features = layer.weight.shape
    for name, (a, b, _) in zip(layer.adapters, layer.each(), strict=True):
        if (b.shape[0], a.shape[1], a.shape[0]) != (out, features, b.shape[1]):
            raise FalqonError(
                layer.path,
                f"its adapter {name!r} has A {list(a.shape)} and B {list(b.shape)}, which don't "
                f"belong together or to its base weight {[out, features]}",
                "Give A [r, in] and B [out, r]",
            )
        for part, tensor in (("lora_A", a), ("lora_B", b)):
            if tensor.device != layer.weight.device:
                raise FalqonError(
                    layer.path,
                    f"its {part} is on {tensor.device}, its base weight on {layer.weight.device}",
                    "Move the whole model to one device",
                )


def linear_layers(model: nn.Module) -> Iterator[LinearLayer]:
    """The linear layers of a model that have a plain frozen weight, no part of an adapter."""
    around = {id(layer.base): layer for layer in lora_layers(model)}
    for path, module in model.named_modules():
        own = is_linear(module) and not part_of_adapter(path)
        weight = getattr(module, "weight", None) if own else None
        if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS or weight.requires_grad:
            continue
        if quantized_as(weight) is None:
            yield LinearLayer(without_wrappers(path), module, around.get(id(module)))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is exactly an ``nn.Linear`` or GPT-2's Conv1D."""
    conv1d = sys.modules.get("transformers.pytorch_utils")  # where it is not, there is no Conv1D
    return type(module) is nn.Linear or (conv1d is not None and type(module) is conv1d.Conv1D)


def tied_weights(model: nn.Module) -> defaultdict[int, list[str]]:
    """The names of the parameters by the address of their memory, of those that have any. (Those
    of a flat buffer share a storage.)
    """
    holders = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            holders[local(parameter).data_ptr()].append(name)
    return holders


def check_untied(path: str, weight: Tensor, holders: Mapping[int, list[str]]) -> None:
    """Refuse to free a base weight that another module shares (``holders``: `tied_weights`)."""
    shared = holders[local(weight).data_ptr()]
    if len(shared) > 1:
        raise FalqonError(
            path,
            f"its base weight is tied (also {shared[0]} or {shared[-1]}), so it can't be freed",
            "Leave the layer out with exclude=, or untie the weights",
        )
