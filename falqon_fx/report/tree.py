"""Dataclasses as JSON: their schema, and the way back from plain values."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_LARGEST = 2**63  # no count and no size of a report is as large


def build(kind: Any, value: Any, place: str = "it") -> Any:
    """``value``, as `json.loads` gives it, as the type ``kind``.

    Raises:
        ValueError: it is of another type; names the ``place`` of what is wrong.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else build(inner[0], value, place)
    if origin is tuple:
        items = _require(value, list, place, "array")
        return tuple(build(inner[0], item, f"{place}[{i}]") for i, item in enumerate(items))
    if origin is dict:
        pairs = _require(value, dict, place, "object").items()
        return {_key(inner[0], k, place): build(inner[1], v, f"{place}.{k}") for k, v in pairs}
    if is_dataclass(kind):
        return _build_dataclass(kind, _require(value, dict, place, "object"), place)
    return _plain(kind, value, place)


def _build_dataclass(kind: Any, value: dict[str, Any], place: str) -> Any:
    """A report of an earlier version lacks the fields that came since: they have defaults."""
    hints = typing.get_type_hints(kind)
    known = {}
    for f in fields(kind):
        if f.name in value:
            known[f.name] = build(hints[f.name], value[f.name], f"{place}.{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{place} lacks {f.name!r}")
    return kind(**known)


def _require(value: Any, kind: type, place: str, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{place} is no {name}")
    return value


def _key(kind: type, key: str, place: str) -> Any:
    """The key of an object: JSON has strings alone."""
    if kind is not int:
        return key
    if not (key.isascii() and key.isdigit() and len(key) < 19):
        raise ValueError(f"{place} has the key {key!r}, which is no number")
    return int(key)


def _plain(kind: type, value: Any, place: str) -> Any:
    of_kind = isinstance(value, int | float if kind is float else kind)
    if not of_kind or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place} is no {_PLAIN[kind]}")
    if isinstance(value, str | bool):
        return value
    if not -_LARGEST < value < _LARGEST:  # nor NaN
        raise ValueError(f"{place} is out of range")
    return kind(value)


def schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of a type; those of dataclasses go into ``definitions``."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return {"anyOf": [schema(inner[0], definitions), {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": schema(inner[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(inner[1], definitions)}
    if not is_dataclass(kind):
        return {"type": _PLAIN[kind]}
    name = kind.__name__  # type: ignore[union-attr]
    if name not in definitions:
        definitions[name] = {}
        hints = typing.get_type_hints(kind)
        properties = {f.name: schema(hints[f.name], definitions) for f in fields(kind)}
        definitions[name] = {
            "type": "object",
            "description": (kind.__doc__ or "").splitlines()[0],
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
