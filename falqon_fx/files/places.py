"""Where the tensors of a checkpoint belong in an empty PEFT model, and in which dtype."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files.site_checks import described

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_places(
    model: Any, cast: Collection[str], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Refuse a checkpoint that `fill` would refuse, before its layers are cast. ``cast`` are the
    parameters of ``model`` that will be; ``tensors`` the others, by the model's names.

    Raises:
        FalqonError: as `fill`.
    """
    named = places(model, cast, tensors, where)
    check_tied(tied_names(model), cast, named, where)
    for name, _ in model.named_parameters():
        if name not in named and name not in cast and ".lora_" not in name:
            raise lacks(name, where)


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of each parameter of an empty model that has several."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
    return [names for names in found.values() if len(names) > 1]


def check_tied(
    tied: list[list[str]], cast: Collection[str], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Refuse two weights for one, which transformers leaves apart, whatever config.json says, and
    copies of one that PEFT trains.
    """
    for names in tied:
        for name in names:
            if ".original_module." in name:
                other = next(n for n in names if n != name)
                problem = f"modules_to_save makes a copy of it, and it is tied to {other}"
                raise FalqonError(name, problem, "Leave it out of modules_to_save")
        first, *others = [name for name in names if name in cast or name in tensors] or [""]
        for name in others:
            pair = [tensors[n] for n in (first, name) if n in tensors and not tensors[n].is_meta]
            if len(pair) < 2 or not torch.equal(*pair):
                problem = f"{where} has another weight for {first}, and its config.json ties them"
                remedy = 'Set "tie_word_embeddings": false in config.json'
                raise FalqonError(name, problem, remedy)


def lacks(name: str, where: str) -> FalqonError:
    """What to raise where a model needs a tensor that a checkpoint doesn't hold."""
    return FalqonError(name, f"the model needs it, {where} lacks it", "Check config.json")


def places(
    model: Any, cast: Collection[str], tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Tensors by the parameters and buffers of a model that they are for, but for those that are
    ``cast``.

    Raises:
        FalqonError: one without a place, or of another shape, or two for one; or a persistent
            buffer without a tensor.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for number, place in enumerate(_own_places(model, name)):
            if place in cast:  # or it would take the place of what was checked
                problem = f"{where} has it twice, as FP8 weight and beside it"
                raise FalqonError(name, problem, "Remove one of the two")
            if place in named:
                problem = f"{where} has it twice, as {place}, too"
                raise FalqonError(name, problem, "Remove one of the two")
            named[place] = tensor.clone() if number else tensor
    _check_shapes(model, named, where)
    known = model.state_dict()
    for name in named:
        if name not in known:
            raise FalqonError(name, f"it is in {where} but not in the model", "Check config.json")
    for name, _ in model.named_buffers():
        if name in known and name not in named:
            raise lacks(name, where)
    return named


def _own_places(model: nn.Module, name: str) -> list[str]:
    """Where PEFT's wrappers have a tensor: in a layer's base, or in a module that is saved whole
    and in the copies of it that are trained.
    """
    path, _, last = name.rpartition(".")
    if _exists(model, inside := f"{path}.base_layer.{last}"):
        return [inside]
    if _exists(model, original := f"{path}.original_module.{last}"):
        copies: Any = model.get_submodule(f"{path}.modules_to_save")
        return [original, *(f"{path}.modules_to_save.{copy}.{last}" for copy in copies)]
    return [name]


def in_own_dtype(
    model: Any, tensors: Mapping[str, Tensor], dtypes: Collection[str]
) -> dict[str, Tensor]:
    """Tensors in the dtypes in which transformers loads them: where config.json names one, that of
    the layers in FP8, of ``dtypes``, and float32 for those that a model keeps in that. Adapters are
    left as they are.
    """
    base = model.get_base_model()
    if base.config.dtype is None or len(dtypes) != 1:
        return dict(tensors)
    of_layers = getattr(torch, *dtypes)
    wide = [p.replace("*", ".*") for p in getattr(base, "_keep_in_fp32_modules_strict", None) or ()]
    in_float32 = re.compile("|".join(wide) or "(?!)")
    known, found = model.state_dict(), {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        own = of_layers if known[name].dtype == base.config.dtype else known[name].dtype
        own = torch.float32 if in_float32.search(plain) else own
        kept = tensor.dtype not in _FLOATS or ".lora_" in name
        found[name] = tensor if kept else tensor.to(own)
    return found


def _check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Each tensor must be of the shape of its place; of another width where that holds floats."""
    expected = model.state_dict()
    for name, tensor in tensors.items():
        like = expected.get(name)
        if like is None:
            continue  # there is a better word for it later
        fits = tensor.dtype in _FLOATS if like.dtype in _FLOATS else tensor.dtype == like.dtype
        if tensor.shape != like.shape or not fits:
            problem = f"{where} has {described(tensor)}, the model {described(like)}"
            raise FalqonError(name, problem, "Check config.json and adapter_config.json")


def _exists(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(path), last)
    except AttributeError:
        return False
