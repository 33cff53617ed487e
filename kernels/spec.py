"""What a kernel is made for: a frozen description, from which its source follows.

A spec holds plain strings, integers and booleans, so that it hashes alike in every process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

InputDtype = Literal["float32", "bfloat16", "float16"]
Fp8Format = Literal["e4m3", "e5m2"]
Granularity = Literal["tensor", "row"]
ScaleMode = Literal["amax", "pow2"]
# How float32 becomes FP8: by the GPU's own instruction (sm_89 and newer), or by integer steps,
# which older GPUs and Triton's interpreter need (see interpreter.py).
CastMode = Literal["hardware", "integer"]

_TILE = 4096  # elements that four warps hold in 32 registers a thread
_MAX_ROW = 16384  # widest row that stays in the registers of one program


@cache
def template_text(template: str) -> str:
    """Text of ``templates/<template>.py.jinja``, behind the macros that all templates share."""
    folder = files(__package__).joinpath("templates")
    names = ("numerics", template)
    return "".join(folder.joinpath(f"{name}.py.jinja").read_text("utf-8") for name in names)


@cache
def library_version() -> str:
    """The installed version of falqon-fx."""
    try:
        return version("falqon-fx")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0"


@dataclass(frozen=True)
class KernelSpec:
    """Base of all specs: a subclass names its template and adds the fields that fill it."""

    template: ClassVar[str]

    @property
    def fields(self) -> dict[str, str | int | bool]:
        """Name and value of each field, in the order of declaration."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def name(self) -> str:
        """A short readable identifier for files and modules, different for each spec."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Hexadecimal SHA-256 of library version, template text and fields; stable over runs.

        Whatever caches something made from this spec puts the key into its own.
        """
        content = [library_version(), template_text(self.template), self.template, self.fields]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.template}({', '.join(f'{k}={v}' for k, v in self.fields.items())})"


@cache
def _literals(kind: type) -> dict[str, tuple[object, ...]]:
    """The values that each `Literal` field of a class of specs may have."""
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def check_literals(spec: KernelSpec) -> None:
    """Raises ValueError where a field of ``spec`` is outside its `Literal`."""
    kind: Any = type(spec)  # as a key; mypy thinks that it has no hash
    for name, valid in _literals(kind).items():
        if spec.fields[name] not in valid:
            raise ValueError(
                f"{name}={spec.fields[name]!r}: expected one of {', '.join(map(str, valid))}"
            )


def check_powers_of_two(spec: KernelSpec, *names: str) -> None:
    """Raises ValueError where a field of ``spec`` is not a power of two."""
    for name in names:
        size = spec.fields[name]
        if not isinstance(size, int) or size < 1 or size & (size - 1):
            raise ValueError(f"{name}={size!r}: expected a power of two")


@dataclass(frozen=True)
class ActivationCastSpec(KernelSpec):
    """The cast of x [n, width] to FP8 with one scale per tensor or per row.

    ``block_rows`` × ``block_width`` is the tile that one program holds, ``num_warps`` the warps
    that share it. ``loop`` (row only) reads rows wider than a tile piece by piece; without it the
    row is read once. ``programs`` (tensor only) bounds the grid, and with it the partial maxima.

    Raises ValueError for a value outside its `Literal`, a size that is not a power of two, or a
    field that the granularity has no use for.
    """

    template: ClassVar[str] = "activation_cast"

    input_dtype: InputDtype
    fp8: Fp8Format
    granularity: Granularity
    scale: ScaleMode
    cast: CastMode
    block_rows: int
    block_width: int
    loop: bool = False
    programs: int = 1
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "block_rows", "block_width", "programs", "num_warps")
        if self.granularity == "tensor" and self.loop:
            raise ValueError("loop=True: only granularity='row' loops over a row")
        if self.granularity == "row" and self.programs != 1:
            raise ValueError("programs: only granularity='tensor' bounds its grid")

    @property
    def name(self) -> str:
        loop = "_loop" if self.loop else ""
        programs = f"_p{self.programs}" if self.granularity == "tensor" else ""
        return (
            f"{self.template}_{self.input_dtype}_{self.fp8}_{self.granularity}_{self.scale}_"
            f"{self.cast}_{self.block_rows}x{self.block_width}{loop}{programs}_w{self.num_warps}"
        )

    @classmethod
    def for_width(
        cls,
        width: int,
        *,
        input_dtype: InputDtype,
        fp8: Fp8Format = "e4m3",
        granularity: Granularity = "tensor",
        scale: ScaleMode = "amax",
        cast: CastMode = "hardware",
    ) -> ActivationCastSpec:
        """The spec for rows of ``width`` elements, with tiles of about 4096 elements.

        A row up to 16384 stays in registers, with more warps as it gets wider.
        """
        padded = max(16, 1 << (width - 1).bit_length()) if width > 0 else 16
        block_width, loop, num_warps = min(padded, _TILE), False, 4
        if granularity == "row":
            loop = padded > _MAX_ROW
            block_width = _TILE if loop else padded
            num_warps = max(4, block_width // 1024)
        return cls(
            input_dtype=input_dtype,
            fp8=fp8,
            granularity=granularity,
            scale=scale,
            cast=cast,
            block_rows=max(1, _TILE // block_width),
            block_width=block_width,
            loop=loop,
            programs=1024 if granularity == "tensor" else 1,
            num_warps=num_warps,
        )
