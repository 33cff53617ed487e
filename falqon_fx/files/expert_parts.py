"""How stacked experts lie in public checkpoints: most have a matrix for each expert and projection,
of which transformers makes the stack as it loads them. Its own conversions say which is where.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files.export_files import renamed
from falqon_fx.files.public_names import PublicNames
from falqon_fx.model.stacks import Fp8Stack, is_experts
from falqon_fx.site.paths import IN_FP8


@dataclass(frozen=True)
class Part:
    """Rows of a stack [E * out, in] that are the tensor ``name`` [last - first, in] of a
    checkpoint.
    """

    name: str
    first: int
    last: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.last)

    @property
    def size(self) -> int:
        return self.last - self.first

    @property
    def layer(self) -> str:
        """The path of the linear layer that engines see."""
        return self.name.removesuffix(".weight")


def whole_scale(stack: str, parts: Sequence[Part]) -> str:
    """What transformers calls the scales of a stack of that name where it has cast the model to
    FP8 itself: it saves them in one tensor, and each expert's weights alone, or a stack in one.
    """
    if len(parts) == 1:
        return f"{parts[0].layer}_scale_inv"
    experts = parts[0].layer.rsplit(".", 2)[0]
    return f"{experts}.{stack.rpartition('.')[2]}_scale_inv"


def check_whole_scale(name: str, scale: Tensor, experts: int) -> None:
    """Refuse scales of a stack that are not of so many experts.

    Raises:
        FalqonError: they are not.
    """
    if scale.dim() != 3 or len(scale) != experts:
        problem = f"its scales are {list(scale.shape)}, not those of {experts} experts"
        raise FalqonError(name, problem, "Check the checkpoint")


def parted_scale(scale: Tensor, parts: Sequence[Part], out: int) -> list[Tensor]:
    """The scales of each part, of scales [E, blocks of ``out`` rows, blocks of columns]; whether
    they are as many as the part's blocks is for the caller to see.
    """
    found, flat = [], scale.flatten(0, 1)
    for part in parts:
        begin, end = (rows * scale.shape[1] // out for rows in (part.first, part.last))
        found.append(flat[begin : max(end, begin + 1)])
    return found


def parts_of(model: Any, stacks: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Part, ...]]:
    """The parts of each stack [E, out, in], given as the name of its parameter and (E, out), in the
    order of their rows. Left out are stacks that checkpoints keep in one piece, or otherwise.
    """
    # The numbers of its rows, which are moved as its weights would be.
    starts, numbers, first = {}, {}, 0
    for name, (experts, out) in stacks.items():
        rows = torch.arange(first, first + experts * out, device="cpu")
        starts[first], numbers[name] = name, rows.view(experts, out, 1)
        first += experts * out
    found: dict[str, list[Part]] = defaultdict(list)
    for name, rows in renamed(model, numbers).items():
        begin = int(rows.flatten()[0])
        start = max(s for s in starts if s <= begin)
        if _is_matrix(name, rows):
            found[starts[start]].append(Part(name, begin - start, begin - start + len(rows)))
    whole = {}
    for name, (experts, out) in stacks.items():
        parts = tuple(sorted(found[name], key=lambda part: part.first))
        ends = [0, *(part.last for part in parts)]
        if [part.first for part in parts] == ends[:-1] and ends[-1] == experts * out:
            whole[name] = parts
    return whole


def parts_in(
    names: Collection[str], parts: Mapping[str, tuple[Part, ...]], public: PublicNames
) -> dict[str, tuple[Part, ...]]:
    """Parts by the names that a checkpoint has for them: it may lack the first word, which is that
    of the model inside (DeepSeek V4), or be of a model that this one is inside of (Qwen3.5).
    """
    if all(part.name in names for each in parts.values() for part in each):
        return dict(parts)
    theirs = {public.renamed(name): name for name in names}

    def known(part: Part) -> Part:
        short = part.name.partition(".")[2]
        name = short if short in names else theirs.get(part.name, part.name)
        return part if part.name in names else replace(part, name=name)

    return {name: tuple(map(known, each)) for name, each in parts.items()}


def _is_matrix(name: str, rows: Tensor) -> bool:
    """Whether a tensor of a checkpoint is the weight of a layer whose rows follow each other."""
    if not name.endswith(".weight") or rows.dim() != 2 or rows.shape[1] != 1:
        return False
    flat = rows.flatten()
    return torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + len(flat)))


def stacks_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(E, out) of the weights that a model stores [E, out, in], prepared or not, by the names of
    their parameters without PEFT's wrappers.
    """
    found = {}
    for path, module in experts_of(model):
        if module.is_transposed:
            continue
        for name, weight in module._parameters.items():
            if weight is not None and weight.dim() == 3:
                found[f"{path}.{name}".lstrip(".")] = (weight.shape[0], weight.shape[1])
        for name, child in module._modules.items():
            if isinstance(child, Fp8Stack):
                own = name.removesuffix(IN_FP8)
                rows = child.out_features // child.experts
                found[f"{path}.{own}".lstrip(".")] = (child.experts, rows)
    return found


def routers(model: nn.Module) -> set[str]:
    """The paths of modules beside experts that have a weight and are no layers of torch: they
    route.
    """
    found = set()
    modules = {path.replace(".base_layer", ""): module for path, module in model.named_modules()}
    for path, _ in experts_of(model):
        above = path.rpartition(".")[0]
        for name, child in modules[above].named_children():
            own: Any = child.get_base_layer() if hasattr(child, "get_base_layer") else child
            weight = own._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and not isinstance(own, nn.Linear):
                found.add(f"{above}.{name}".lstrip("."))
    return found


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The experts that transformers' interface runs, by their paths without PEFT's wrappers."""
    for path, module in model.named_modules():
        if is_experts(module):
            yield path.replace(".base_layer", ""), module


def whole_names(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What public checkpoints call tensors of a model, those alone that are one tensor there."""
    own = {id(tensor): name for name, tensor in tensors.items()}
    return {own[id(t)]: name for name, t in renamed(model, dict(tensors)).items() if id(t) in own}


def own_names(model: Any) -> dict[str, str]:
    """What a transformers model calls the tensors of its public checkpoints, those alone that are
    one tensor here as there. PEFT's adapters in it are left out.
    """
    stacks = stacks_of(model)
    plain = {
        own: tensor
        for name, tensor in model.state_dict().items()
        if (own := name.replace(".base_layer", "")) not in stacks and ".lora_" not in name
    }
    return {theirs: ours for ours, theirs in whole_names(model, plain).items()}


@dataclass(frozen=True)
class Rearranged:
    """Tensors of a model whose rows a checkpoint has in others: cut up, or put together.

    Attributes:
        ours: the shape of each, by its name, in the order of their rows.
        theirs: which of all these rows, one tensor after the other, each of the checkpoint's holds.
    """

    ours: dict[str, torch.Size]
    theirs: dict[str, Tensor]

    def placed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, of a checkpoint's, which are taken out of ``tensors``; none where
        those are not all there, or of other sizes.
        """
        (width,) = {shape[1:] for shape in self.ours.values()}
        for name, rows in self.theirs.items():
            if name not in tensors or tensors[name].shape != (len(rows), *width):
                return {}
        values = torch.cat([tensors.pop(name) for name in self.theirs])
        whole = torch.empty_like(values)
        whole[torch.cat([*self.theirs.values()])] = values
        parts = whole.split([shape[0] for shape in self.ours.values()])
        return {n: part.contiguous() for n, part in zip(self.ours, parts, strict=True)}


def rearranged(model: Any) -> list[Rearranged]:
    """What a transformers model has in rows of other tensors than its public checkpoints, but for
    stacks of experts and PEFT's adapters.
    """
    stacks, same = stacks_of(model), set(own_names(model).values())
    shapes: dict[str, torch.Size] = {}
    numbers: dict[str, Tensor] = {}
    first = 0
    for name, tensor in model.state_dict().items():
        own = name.replace(".base_layer", "")
        if own in stacks or own in same or ".lora_" in name or not tensor.dim():
            continue
        shapes[own] = tensor.shape
        rows = torch.arange(first, first + len(tensor), device="cpu")
        numbers[own], first = rows.view(-1, *(1 for _ in tensor.shape[1:])), first + len(tensor)
    if not numbers:
        return []
    theirs = {n: rows.flatten() for n, rows in renamed(model, dict(numbers)).items()
              if rows.dim() and rows.numel() == len(rows)}  # fmt: skip
    owner = torch.repeat_interleave(torch.tensor([len(rows) for rows in numbers.values()]))
    found, names = [], [*numbers]
    for group in _together({name: set(owner[rows].tolist()) for name, rows in theirs.items()}):
        owners = sorted({int(i) for name in group for i in owner[theirs[name]].unique()})
        ours = {names[i]: shapes[names[i]] for i in owners}
        places = torch.cat([numbers[name].flatten() for name in ours])
        held = {name: torch.searchsorted(places, theirs[name]) for name in group}
        rows = torch.cat([*held.values()]).sort().values
        whole = torch.equal(rows, torch.arange(len(places)))
        if whole and len({shape[1:] for shape in ours.values()}) == 1:
            found.append(Rearranged(ours, held))
    return found


def _together(owners: Mapping[str, set[int]]) -> list[list[str]]:
    """The names whose sets are tied to each other by what they share."""
    groups: list[tuple[list[str], set[int]]] = []
    for name, own in owners.items():
        tied = [group for group in groups if group[1] & own]
        groups = [group for group in groups if not group[1] & own]
        names = [n for members, _ in tied for n in members]
        groups.append(([*names, name], own.union(*(held for _, held in tied))))
    return [names for names, _ in groups]
