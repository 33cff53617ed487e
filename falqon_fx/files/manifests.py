"""What may stand in a file that describes others: the type of each field, checked before anything
is read by it.

A right checksum says that a file is as it was written, and nothing of who wrote it. Fields beyond
these are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError

# The class that pydantic asks for below Python 3.12; torch brings the package.
from typing_extensions import TypedDict

Size = Annotated[int, Field(ge=0, lt=2**63)]
Dtype = Literal["float32", "bfloat16", "float16"]  # of a base weight
Scaling = Annotated[float, Field(allow_inf_nan=False, strict=False)]  # or a whole number


def _countable(shape: list[int]) -> list[int]:
    """A shape whose count of elements is a number in torch, even where one size is 0."""
    count = 1
    for size in shape:
        count *= max(size, 1)
        if count >= 2**60:  # times 8 bytes
            raise ValueError("no tensor is that large")
    return shape


Shape = Annotated[list[Size], Field(max_length=64), AfterValidator(_countable)]
TensorDtype = Literal[  # those of safetensors, by torch's names
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "uint64", "uint32", "uint16", "complex64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
    "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
]  # fmt: skip


class TensorEntry(TypedDict):
    """A tensor of a file."""

    dtype: TensorDtype
    shape: Shape
    xxh3: str


class FileEntry(TypedDict):
    """A file of tensors."""

    bytes: Size
    header: str
    tensors: dict[str, TensorEntry]


class SealedFile(TypedDict):
    """A file of anything else."""

    bytes: Size
    xxh3: str


class PreparedSite(TypedDict):
    """A layer that `prepare` made; ``scaling`` with update="rows", ``terms`` of a calibration."""

    prepared: str
    dtype: Dtype
    transposed: bool
    spec: dict[str, str | int]
    scaling: NotRequired[Scaling]
    terms: NotRequired[list[Literal["error_a", "error_b", "channels", "columns"]]]


class LoadedSite(PreparedSite):
    """The same with the ``file`` of its tensors; ``experts`` of a stack."""

    file: str
    experts: NotRequired[Annotated[int, Field(ge=1, lt=2**31)]]


WeightSite = TypedDict(
    "WeightSite",
    {"weight": str, "is": str, "contents": str, "bases": list[list[int]]},
)
StateSite = TypedDict(
    "StateSite",
    {
        "state": str,
        "weight": str,
        "is": str,
        "contents": str,
        "lora_a": str,
        "lora_b": str,
        "transposed": bool,
        "scaling": Scaling,
        "spec": dict[str, str | int],
    },
)


def _kind(site: Any) -> str | None:
    kinds = ("prepared", "state", "weight")  # a state has a weight
    return next((kind for kind in kinds if isinstance(site, Mapping) and kind in site), None)


Site = Annotated[
    Annotated[PreparedSite, Tag("prepared")]
    | Annotated[StateSite, Tag("state")]
    | Annotated[WeightSite, Tag("weight")],
    Discriminator(_kind),
]


class Checkpoint(TypedDict):
    """What `save_checkpoint` writes; ``objects`` is read by `falqon_fx.files.trees`."""

    format: str
    files: dict[str, FileEntry]
    same: dict[str, str]
    sites: list[Site]
    objects: Any


class Prequantized(TypedDict):
    """What `prequantize` writes."""

    format: str
    files: dict[str, FileEntry]
    others: dict[str, SealedFile]
    sites: list[LoadedSite]


class Record(TypedDict):
    """A file that `prequantize` wrote, and the checksums of the weights it is made from."""

    source: dict[str, str]
    described: FileEntry


class Export(TypedDict):
    """What `save_fp8` writes beside its files."""

    format: str
    files: dict[str, SealedFile]


class Distributed(TypedDict):
    """The text in the checkpoints of `CheckpointState`."""

    sites: list[Site]
    optimizer: Any
    dtypes: dict[str, str]
    sums: dict[str, str]
    same: dict[str, str]


class Index(TypedDict):
    """The index of a checkpoint of several files."""

    weight_map: dict[str, str]


class HeaderEntry(TypedDict):
    """A tensor in the header of a safetensors file."""

    dtype: str
    shape: Shape
    data_offsets: Annotated[list[Size], Field(min_length=2, max_length=2)]


class Weights(TypedDict):
    """How a group of layers was quantized."""

    num_bits: NotRequired[int | None]
    type: NotRequired[str | None]
    strategy: NotRequired[str | None]
    group_size: NotRequired[int | None]
    block_structure: NotRequired[list[int] | str | None]


class Group(TypedDict):
    """A group of layers of compressed-tensors."""

    weights: NotRequired[Weights | None]


class Transform(TypedDict):
    """Where a transform is applied."""

    location: NotRequired[str | None]


class TransformScheme(TypedDict):
    """A transform of compressed-tensors."""

    apply: NotRequired[list[Transform] | None]


class Transforms(TypedDict):
    """The rotations of weights and activations of compressed-tensors."""

    config_groups: NotRequired[dict[str, TransformScheme] | None]


class Quantization(TypedDict):
    """The ``quantization_config`` of a checkpoint; ModelOpt has a ``quant_algo``, DeepSeek V4 an
    ``expert_dtype``.
    """

    quant_method: NotRequired[str | None]
    quant_algo: NotRequired[str | None]
    group_size: NotRequired[int | None]
    weight_block_size: NotRequired[list[int] | None]
    config_groups: NotRequired[dict[str, Group] | None]
    transform_config: NotRequired[Transforms | None]
    expert_dtype: NotRequired[str | None]


class TextConfig(TypedDict):
    """What is read of that of the text model inside."""

    quantization_config: NotRequired[Quantization | None]


class Config(TypedDict):
    """What is read of a model's config here."""

    expert_dtype: NotRequired[str | None]
    text_config: NotRequired[TextConfig | None]
    quantization_config: NotRequired[Quantization | None]


class ModelOpt(TypedDict):
    """The hf_quant_config.json of ModelOpt."""

    quantization: Quantization


_FORMS = {
    "checkpoint": Checkpoint,
    "prequantized": Prequantized,
    "record": Record,
    "export": Export,
    "distributed": Distributed,
    "index": Index,
    "header": dict[str, HeaderEntry],
    "config": Config,
    "modelopt": ModelOpt,
}


@cache
def _adapter(form: str) -> TypeAdapter[Any]:
    return TypeAdapter(_FORMS[form])


def problem(content: Any, form: str) -> str | None:
    """What is wrong with the content of a file, None where nothing is; ``form`` is one of those
    above, in small letters.
    """
    try:
        _adapter(form).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(p) if str(p).isprintable() else ascii(p) for p in first["loc"])
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return None


def is_inside(name: str) -> bool:
    """Whether a name from a file is that of a file in the same folder or below it."""
    parts = Path(name).parts
    if not name.isprintable() or len(name) > 1000:  # what no file system takes
        return False
    return bool(parts) and name[0] != "/" and ".." not in parts and max(map(len, parts)) <= 255
