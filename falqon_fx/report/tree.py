"""Dataclasses as JSON: their schema, and the way back from plain values."""

from __future__ import annotations

import types
import typing
from dataclasses import fields, is_dataclass
from typing import Any


def build(kind: Any, value: Any) -> Any:
    """``value``, as `json.loads` gives it, as the type ``kind``."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else build(inner[0], value)
    if origin is tuple:
        return tuple(build(inner[0], item) for item in value)
    if origin is dict:
        return {inner[0](key): item for key, item in value.items()}
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        # A report of an earlier version lacks the fields that came since.
        known = {
            f.name: build(hints[f.name], value[f.name]) for f in fields(kind) if f.name in value
        }
        return kind(**known)  # type: ignore[operator]
    return value


_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


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
