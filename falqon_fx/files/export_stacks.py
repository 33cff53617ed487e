"""Stacked experts in FP8, as `save_fp8` writes them: a matrix with its scales for each expert and
projection, as engines and compressed-tensors have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from falqon_fx._compat import is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.files.expert_parts import Part, parts_of, stacks_of
from falqon_fx.files.export_layers import Originals, is_adapted, plan_of
from falqon_fx.files.export_report import Left, Source
from falqon_fx.model.stacks import Fp8Stack, is_experts, prepared_stack
from falqon_fx.ops.experts_lowering import stacked_b
from falqon_fx.site.base import Base, bases, cast_base, check_weight
from falqon_fx.site.sharded import whole, whole_copy
from falqon_fx.site.spec import SiteSpec, parse_spec


@dataclass(frozen=True)
class ExportStack:
    """The parameter at ``path``, stacked weights [E, out, in] of ``module``, with its ``adapters``
    (lora_A, lora_B, scaling) that are active and not merged yet.
    """

    path: str
    module: Any
    name: str
    spec: SiteSpec
    adapters: tuple[tuple[Tensor, Tensor, float], ...]
    parts: tuple[Part, ...]
    originals: Originals | None

    def whole(self) -> ExportStack:
        """The stack with what other processes hold of it."""
        held = [t for a, b, _ in self.adapters for t in (a, b)]
        if not any(map(is_dtensor, (*self.module.parameters(), *held))):
            return self
        adapters = tuple((whole(a.detach()), whole(b.detach()), s) for a, b, s in self.adapters)
        return replace(self, module=whole_copy(self.module), adapters=adapters)

    @property
    def features(self) -> int:
        prepared = self.prepared
        return prepared.in_features if prepared is not None else self._weight.shape[-1]

    @property
    def prepared(self) -> Fp8Stack | None:
        return prepared_stack(self.module, self.name)

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = self.module._parameters[self.name]
        return weight.detach()

    def cast(self, part: Part, left: Left) -> tuple[Base, Source]:
        """W + Σ scaling · B · A of a part in FP8, cast once, and what from; where the adapters add
        nothing to it, the bytes that were trained on.

        Raises:
            FalqonError: a merged weight that FP8 can't hold.
        """
        prepared, kept = self.prepared, None
        if prepared is not None:
            base = Base(prepared.code.detach(), prepared.scale.detach().view(torch.float32))
            kept = Base(base.code[part.rows].contiguous(), base.scale[part.rows].contiguous())
        delta = self._delta(part)
        if not delta.any():
            return kept or cast_base(self._weight.flatten(0, 1)[part.rows], self.spec), "unchanged"
        source: Source = "base weight"
        if kept is None or prepared is None:
            weight = self._weight.flatten(0, 1)[part.rows]
        elif self.originals is not None:
            weight = self.originals.of_part(self.path, part.name, kept, prepared.dtype, self.spec)
        else:
            weight, source = kept.dequantize(), "FP8 weight"
        merged = weight.to(torch.float32) + delta
        check_weight(part.layer, merged, "merged weight")
        base = cast_base(merged, self.spec)
        if source != "base weight":
            left.note(weight, merged, base.dequantize())
        return base, source

    def _delta(self, part: Part) -> Tensor:
        """Σ scaling · B · A of a part's rows, float32."""
        out = self.parts[-1].last // self._experts
        expert, first = divmod(part.first, out)
        rows = slice(first, first + part.last - part.first)
        delta = torch.zeros(part.last - part.first, self.features, dtype=torch.float32)
        for a, b, scaling in self.adapters:
            of_b = stacked_b(b.detach().float(), self._experts)[expert, rows]
            of_a = a.detach().float().view(self._experts, -1, a.shape[1])[expert]
            delta = delta.to(a.device) + scaling * (of_b @ of_a)
        return delta

    @property
    def _experts(self) -> int:
        prepared = self.prepared
        return prepared.experts if prepared is not None else len(self._weight)


def export_stacks(
    model: Any, parts: Mapping[str, tuple[Part, ...]], path: str, module: Any, originals: Any
) -> list[ExportStack]:
    """The stacks of the experts at ``path``, whatever wraps them; none where one of them has no FP8
    form: engines read all of an expert in one form.
    """
    experts = module.get_base_layer() if is_adapted(module) else module
    if not is_experts(experts):
        return []
    found: list[ExportStack] = []
    wrappers = dict(_wrappers(module))
    for own in (name for name in parts if name.rpartition(".")[0] == path):
        name = own.rpartition(".")[2]
        prepared = prepared_stack(experts, name)
        made = [] if prepared is not None else bases.of(experts._parameters[name])
        if prepared is None and not made:
            return []
        spec = parse_spec(prepared.spec_text) if prepared is not None else plan_of(made[-1])
        given = (own, experts, name, spec, wrappers.get(name, ()), parts[own], originals)
        found.append(ExportStack(*given))
    every = {name.rpartition(".")[2] for name in stacks_of(model) if name.startswith(f"{path}.")}
    return found if {stack.name for stack in found} == every else []


def _wrappers(module: Any) -> Iterator[tuple[str, tuple[tuple[Tensor, Tensor, float], ...]]]:
    """The adapters that wait to be merged, by the names of the parameters they are of."""
    while is_adapted(module):
        active = [n for n in module.active_adapters if n not in module.merged_adapters]
        each = ((n, module.lora_A[n].weight) for n in active if n in module.lora_A)
        yield (
            module.parameter_name,
            tuple((a, module.lora_B[n].weight, float(module.scaling[n])) for n, a in each),
        )
        module = module.base_layer


_NO_FORM = "transformers and vLLM have no FP8 form for experts that"


class Stacks:
    """The stacks that an export writes in FP8, and the tensors that they become."""

    def __init__(self, model: Any, originals: Originals | None) -> None:
        self._model, self._originals = model, originals
        self._parts = parts_of(model, stacks_of(model))
        self.found: dict[str, ExportStack] = {}
        self._last: tuple[str, Base] | None = None
        self.cast_from: dict[str, Source] = {}
        self.left = Left()
        self.dense: dict[str, str] = {}  # experts that are written dense, and why

    def take(self, path: str, module: Any) -> set[str]:
        """The names of the parameters of a module that are written in FP8."""
        stacks = export_stacks(self._model, self._parts, path, module, self._originals)
        self.found |= {stack.path: stack for stack in stacks}
        return {stack.name for stack in stacks}

    def leave(self, path: str, module: Any) -> str:
        """Why the experts at ``path`` are not written in FP8, which is noted."""
        names = [name for name in stacks_of(self._model) if name.rpartition(".")[0] == path]
        reason = "not all of its experts' weights are in FP8"
        if module.is_transposed:
            reason = f"{_NO_FORM} are stored [E, in, out]"
        elif not all(name in self._parts for name in names):
            reason = f"{_NO_FORM} checkpoints keep in one tensor"
        self.dense[path] = reason
        return reason

    def refuse_dense(self) -> None:
        """Raise a `FalqonError` where experts are left, of a model that has nothing else in FP8."""
        for path, reason in self.dense.items():
            problem = f"{reason}, and no other layer of the model is in FP8"
            remedy = "Call falqon_fx.merge_and_unload(model) and save_pretrained: a dense folder"
            raise FalqonError(path, problem, remedy)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], bool, ExportStack, Making]]:
        """Name, shape, whether it is the weight or its scale, owner, and what makes it."""
        for stack in self.found.values():
            for part in stack.parts:
                rows = part.last - part.first

                def weight(owner: ExportStack, part: Part = part) -> Tensor:
                    return self._cast(owner, part).weight

                def scale(owner: ExportStack, part: Part = part) -> Tensor:
                    return self._cast(owner, part).scale.contiguous()

                yield part.name, (rows, stack.features), True, stack, weight
                yield f"{part.layer}.weight_scale", (rows, 1), False, stack, scale

    def _cast(self, stack: ExportStack, part: Part) -> Base:
        if self._last is None or self._last[0] != part.name:
            base, source = stack.cast(part, self.left)
            self._last = part.name, base
            # Of a stack whose experts differ, what says more: some got no token.
            if source != "unchanged" or stack.path not in self.cast_from:
                self.cast_from[stack.path] = source
        return self._last[1]


Making = Callable[[ExportStack], Tensor]
