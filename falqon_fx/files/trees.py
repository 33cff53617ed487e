"""Optimizer states and the like as JSON with tensors beside it, and tensors that share memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError


def to_plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go to ``tensors`` under their paths, or near them where two
    have the same ({"a.b": ...} and {"a": {"b": ...}}). `from_plain` is the inverse.

    Raises:
        FalqonError: something that is neither a tensor nor plain data.
    """
    if isinstance(value, Tensor):
        while path in tensors:
            path += "'"
        tensors[path] = value.detach()
        return {"tensor": path}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        items = [to_plain(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if type(value) in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[k, to_plain(v, f"{path}.{k}", tensors)] for k, v in value.items()]}
    raise FalqonError(
        path,
        f"a {type(value).__name__} can't be saved: only tensors, numbers, text, lists and dicts",
        "Save it apart, or convert it first",
    )


def from_plain(value: Any, tensors: Mapping[str, Tensor] | None, where: str = "a file") -> Any:
    """The inverse of `to_plain`; tensors are copies, empty ones where ``tensors`` is None.

    Raises:
        FalqonError: something that `to_plain` doesn't make is ``where`` it was read.
    """
    try:
        return _from_plain(value, tensors)
    except (_NotPlain, RecursionError) as error:
        problem = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise FalqonError(
            where, f"the optimizer or the like in it is damaged: {problem}", "Load another"
        ) from error


class _NotPlain(Exception):
    """What `to_plain` doesn't make."""


def _from_plain(value: Any, tensors: Mapping[str, Tensor] | None) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_from_plain(item, tensors) for item in value]
        case {"tensor": str(name), **rest} if not rest and (tensors is None or name in tensors):
            return torch.empty(0) if tensors is None else tensors[name].clone()
        case {"tuple": list(items), **rest} if not rest:
            return tuple(_from_plain(item, tensors) for item in items)
        case {"dict": list(items), **rest} if not rest:
            return dict(_pair(item, tensors) for item in items)
    raise _NotPlain(f"{str(value)[:60]!r} is neither plain data nor a tensor that it has")


def _pair(item: Any, tensors: Mapping[str, Tensor] | None) -> tuple[str | int, Any]:
    match item:
        case [str() | int() as key, value]:
            return key, _from_plain(value, tensors)
    raise _NotPlain(f"{str(item)[:60]!r} is no entry of a dict")


def unshared(tensors: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous tensors on CPU that share no memory, and the names that mean another's tensor.

    Raises:
        FalqonError: a tensor that is not plain memory.
    """
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else tensor.layout
        if kind != torch.strided:
            kind = str(kind).removeprefix("torch.")
            remedy = "Convert it to a dense one first"
            raise FalqonError(name, f"a {kind} tensor can't be saved", remedy)
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in seen:
            same[name] = seen[key]
            continue
        seen[key] = name
        storage = tensor.untyped_storage().data_ptr()
        plain = tensor.cpu().contiguous()
        kept[name] = plain.clone() if storage in storages and plain is tensor else plain
        storages.add(storage)
    return kept, same


def shared_again(
    same: Mapping[str, str], tensors: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The tensors that `unshared` left out, by their names.

    Raises:
        FalqonError: one of a tensor that isn't ``where`` it was read.
    """
    for name, other in same.items():
        if other not in tensors:
            raise FalqonError(
                where, f"{name!r} is said to be {other!r}, which it lacks", "Load another"
            )
    return {name: tensors[other] for name, other in same.items()}
