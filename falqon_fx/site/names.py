"""The modules and parameters of a model by their names.

A model is read through the dictionaries of its modules alone. A method of its own may be overridden
and change it: ``named_modules`` of PEFT's ``MultiheadAttention`` unmerges the layer, which breaks
the guards of the call that is under way.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from torch import Tensor, nn


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What ``named_modules`` yields, without running code of the model's."""
    seen: set[int] = set()
    for path, module in _walk(model, "", frozenset()):
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module


def tensors_of(model: nn.Module) -> dict[int, tuple[Tensor, list[str]]]:
    """The parameters and buffers of a model by their ids, each with all of its names: a tied one
    has several.
    """
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for path, module in _walk(model, "", frozenset()):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[kind].items():
                if tensor is not None:
                    found.setdefault(id(tensor), (tensor, []))[1].append(join(path, name))
    return found


def _walk(module: nn.Module, path: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    """Every path to every module; one that lies inside of itself is entered once."""
    yield path, module
    for name, child in vars(module)["_modules"].items():
        if child is not None and id(child) not in above:
            yield from _walk(child, join(path, name), above | {id(module)})


def join(*parts: str) -> str:
    """A path of some parts, of which any may be empty."""
    return ".".join(part for part in parts if part)


def model_of_call() -> nn.Module:
    """The outermost module whose call runs right now; an empty one where a function runs."""
    found: nn.Module = nn.Module()
    for frame, _ in traceback.walk_stack(None):
        # Before Python 3.13 a frame keeps what it was asked for until it ends: a model that its
        # function has deleted would live on. So functions that are no methods are not asked.
        if frame.f_code.co_varnames[:1] == ("self",):
            module = frame.f_locals.get("self")
            found = module if isinstance(module, nn.Module) else found
    # What torch.compile returns wraps the model.
    inside: nn.Module = vars(found)["_modules"].get("_orig_mod", found)
    return inside


def name_in_call(tensor: Tensor) -> str | None:
    """The name, in the model whose call runs right now, of the parameter that a tensor is or is a
    view of.
    """
    storage, offset = tensor.untyped_storage(), tensor.storage_offset()
    for own, names in tensors_of(model_of_call()).values():
        if own.untyped_storage() is storage and own.storage_offset() == offset:
            return names[0]
    return None
