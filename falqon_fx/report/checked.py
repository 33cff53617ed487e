"""What the numbers of a report can be, and JSON as data classes, read by pydantic.

Pydantic takes a quarter of a second to import, so what reads or describes JSON imports it.
"""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt

Count = Annotated[int, Ge(0), Lt(2**63)]
Size = Annotated[int, Gt(0), Lt(2**63)]
Seconds = Annotated[float, Gt(0)]

# Of a data class that JSON is read as, and of those in it: `__pydantic_config__`.
STRICT = {
    "strict": True,
    "allow_inf_nan": False,
    "json_schema_serialization_defaults_required": True,
}


def read(kind: Any, text: str) -> Any:
    """JSON as the type ``kind``. Fields that it doesn't know are left alone.

    Raises:
        ValueError: it is of another type; names the place of what is wrong.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def schema(kind: Any) -> dict[str, Any]:
    """The JSON Schema (2020-12) of what is written."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind).json_schema(mode="serialization")
