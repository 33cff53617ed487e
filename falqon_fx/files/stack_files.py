"""Stacked experts in files: cast one at a time as `prequantize` reads them, and put into a model
that `falqon_fx.load` makes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.files import blocks
from falqon_fx.files.expert_parts import (
    Part,
    check_whole_scale,
    experts_of,
    parted_scale,
    parts_in,
    parts_of,
    rearranged,
    stacks_of,
    whole_names,
    whole_scale,
)
from falqon_fx.files.model_state import Site, make_layer
from falqon_fx.files.public_names import PublicNames
from falqon_fx.files.site_checks import described
from falqon_fx.model.stacks import (
    GROUPED,
    is_experts,
    read_as_property,
    stacked_weights,
    why_not_stacked,
)
from falqon_fx.site.base import Base, cast_base, check_weight
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.paths import IN_FP8, stack_path
from falqon_fx.site.spec import SiteSpec

_BASE = "base_model.model."
_FETCH = "Fetch the folder again"


@dataclass(frozen=True)
class StackLayer:
    """A stack that `prequantize` casts; ``path`` is where it will be in the PEFT model.

    ``parts`` are the tensors of the checkpoint that it consists of, in order; one where the
    checkpoint keeps it in one piece, which may be ``transposed`` to [E, in, out].
    """

    path: str
    site: str
    experts: int
    shape: tuple[int, int]  # [E * out, in]
    transposed: bool
    parts: tuple[Part, ...]

    @property
    def scale(self) -> str:
        """The tensor with the scales of all its experts, where a checkpoint has one."""
        return whole_scale(self.path.removesuffix(IN_FP8), self.parts)

    def _flat(self, weight: Tensor) -> Tensor:
        """The rows of a stack that was cast already."""
        if weight.dim() == 3 and self.transposed:
            problem = "it was cast to FP8 as [E, in, out], whose rows are no rows of experts"
            raise FalqonError(self.site, problem, "Give the dense checkpoint")
        return weight.flatten(0, -2)

    def cast(
        self, tensors: Mapping[str, Tensor], block: tuple[int, int] | None, spec: SiteSpec, of: Path
    ) -> Base:
        """Its FP8 form, of its tensors by name; with ``block`` these are FP8 with scales already.

        Raises:
            FalqonError: tensors of other sizes, or that FP8 can't hold.
        """
        names = {part.name for part in self.parts}
        scales = [tensor for name, tensor in tensors.items() if name not in names]
        if self.scale in tensors:
            check_whole_scale(self.scale, scales[0], self.experts)
            scales = parted_scale(scales[0], self.parts, self.shape[0] // self.experts)
        cast = []
        for number, part in enumerate(self.parts):
            weight = tensors[part.name]
            if block is not None:
                scale, weight = scales[number], self._flat(weight)
                blocks.check_blocks(part.layer, weight, scale, block, str(of))
                weight = blocks.dequantize(weight, scale, block)
            if weight.dim() == 3:
                weight = (weight.mT if self.transposed else weight).flatten(0, 1)
            wanted = (part.size, self.shape[1])
            if weight.shape != wanted:
                problem = f"{part.name} is {described(weight)}, by config.json {list(wanted)}"
                raise FalqonError(self.site, problem, _FETCH)
            check_weight(self.site, weight)
            cast.append(cast_base(weight, spec))
        return Base(torch.cat([c.code for c in cast]), torch.cat([c.scale for c in cast]))


def stacks_to_cast(
    skeleton: Any, index: Mapping[str, str], config: FalqonConfig
) -> dict[str, StackLayer]:
    """The stacks of an empty PEFT model to cast, by path: those that `prepare` would cast once the
    model runs grouped products.

    Raises:
        FalqonError: the checkpoint lacks a part of one.
    """
    base = skeleton.get_base_model()
    apart, found = parts_in(index, parts_of(base, stacks_of(base)), PublicNames(base)), {}
    stacks = {
        stack_path(f"{stack.path}.{stack.name}", prepared=False).removeprefix(_BASE): stack
        for stack in stacked_weights(skeleton)
        if why_not_stacked(stack, config, tied=False, runs=False) is None
    }
    whole = whole_names(base, {name: stack.weight for name, stack in stacks.items()})
    for name, stack in stacks.items():
        experts, first, second = stack.weight.shape
        out, features = (second, first) if stack.transposed else (first, second)
        parts = apart.get(name, ())
        if name in index or not parts:
            parts = (Part(name if name in index else whole.get(name, name), 0, experts * out),)
        for part in parts:
            if part.name not in index:
                problem = f"the checkpoint has no tensor {part.name!r}"
                raise FalqonError(stack.site, problem, "Load it with transformers and save it")
        path = f"{stack.path}.{stack.name}{IN_FP8}"
        size = (experts * out, features)
        found[path] = StackLayer(path, stack.site, experts, size, stack.transposed, parts)
    return found


def stack_size(model: nn.Module, path: str, site: Site, where: str) -> tuple[int, int]:
    """[E * out, in] of the stacked parameter in whose place FP8 comes.

    Raises:
        FalqonError: the model has no such stack.
    """
    owner, name = _owner(model, path)
    weight = None if owner is None else owner._parameters.get(name)
    if weight is None or weight.dim() != 3 or len(weight) != site["experts"]:
        problem = f"{where} has {site['experts']} stacked experts in FP8 for it, the model no such"
        raise FalqonError(path, problem, "Check config.json")
    experts, first, second = weight.shape
    out, features = (second, first) if site["transposed"] else (first, second)
    return experts * out, features


def put_stacks(
    model: Any, layers: Mapping[str, tuple[Site, Mapping[str, Tensor]]]
) -> dict[str, tuple[Site, Mapping[str, Tensor]]]:
    """Put the stacks among ``layers`` into a model, which runs grouped products then, under
    wrappers that are traced; the other layers.
    """
    others = dict(layers)
    for path, (site, found) in layers.items():
        if "experts" not in site:
            continue
        owner, name = _owner(model, path)
        assert owner is not None, path
        del owner._parameters[name], others[path]
        layer = make_layer(site, found, None, stack_path(f"{path}.code", prepared=True))
        owner._modules[name + IN_FP8] = layer.train(owner.training)
        read_as_property(owner, name)
    if len(others) < len(layers):
        from falqon_fx.model.param_wrappers import trace_param_wrappers

        trace_param_wrappers(model)  # PEFT's own code would look for the parameter
        base = model.get_base_model()
        if base.config._experts_implementation not in GROUPED:
            base.set_experts_implementation("grouped_mm")
    return others


def _owner(model: nn.Module, path: str) -> tuple[Any, str]:
    above, _, name = path.rpartition(".")
    found = dict(model.named_modules()).get(above)
    return found if found is not None and is_experts(found) else None, name.removesuffix(IN_FP8)


class Checkpoint:
    """Where the tensors of a public checkpoint are in an empty PEFT model."""

    def __init__(self, model: Any, names: Collection[str]) -> None:
        base = model.get_base_model()
        sizes = stacks_of(base)
        self._names = PublicNames(base)
        self._rearranged = rearranged(base) if any(experts_of(base)) else []
        self._parts = parts_in(names, parts_of(base, sizes), self._names)
        in_one = sizes.keys() - self._parts.keys()
        for theirs in names if in_one else ():
            if (own := self._names.own(theirs)) in in_one:
                self._parts[own] = (Part(f"{theirs}.weight", 0, math.prod(sizes[own])),)
        self._experts = {name: experts for name, (experts, _) in sizes.items()}
        self._paths = {p.replace(".base_layer", ""): p for p, _ in model.named_modules()}

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names; dense stacks are put together.

        Raises:
            FalqonError: two for the same place.
        """
        rest, found = dict(tensors), {}
        for name, parts in self._parts.items():
            if all(part.name in rest for part in parts):
                weight = torch.cat([rest.pop(part.name) for part in parts])
                stacked = weight.view(self._experts[name], -1, weight.shape[1])
                found[self._place(name)] = stacked
        for group in self._rearranged:
            found |= {self._place(name): t for name, t in group.placed(rest).items()}
        for name, tensor in rest.items():
            place = self._place(self._names.own(name))
            if place in found:
                raise FalqonError(name, f"the folder has it twice, as {place}, too", "Remove one")
            found[place] = tensor
        return found

    def layer(self, path: str) -> str:
        """The path of a linear layer, without PEFT's wrapper of its own."""
        return _BASE + self._names.own(f"{path}.weight").removesuffix(".weight")

    def scales_parted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with scales for each expert's weights, where they are those of stacks; FP8 stacks
        in one tensor as matrices.

        Raises:
            FalqonError: scales of another number of experts.
        """
        found = dict(tensors)
        for name, parts in self._parts.items():
            weight = found.get(parts[0].layer)
            if weight is not None and weight.dim() == 3 and weight.dtype == E4M3:
                found[parts[0].name] = found.pop(parts[0].layer).flatten(0, 1)
            scale = found.pop(whole := whole_scale(name, parts), None)
            if scale is None:
                continue
            check_whole_scale(whole, scale, self._experts[name])
            each = parted_scale(scale, parts, parts[-1].last // len(scale))
            found |= {f"{p.layer}.weight_scale_inv": s for p, s in zip(parts, each, strict=True)}
        return found

    def stacks_of(self, bases: Mapping[str, Base]) -> list[str]:
        """The places of the stacks among layers by path."""
        known = self._parts.items()
        return [self._place(n) for n, parts in known if all(p.layer in bases for p in parts)]

    def stacked(self, bases: dict[str, Base]) -> Iterator[tuple[str, int, Base]]:
        """The stacks among the FP8 forms of layers by path, which become less: place, number of
        experts, and the FP8 form of the whole.
        """
        for name, parts in self._parts.items():
            if all(part.layer in bases for part in parts):
                each = [bases.pop(part.layer) for part in parts]
                code = torch.cat([base.code for base in each])
                whole = Base(code, torch.cat([base.scale for base in each]))
                yield self._place(name) + IN_FP8, self._experts[name], whole

    def _place(self, name: str) -> str:
        """Where a parameter is, in the innermost of what PEFT has wrapped around its module."""
        above, _, last = (_BASE + name).rpartition(".")
        return f"{self._paths.get(above, above)}.{last}"
