"""What a kernel is made for: a frozen description, from which its source follows.

A spec holds plain strings, integers and booleans, so that it hashes alike in every process.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, ClassVar, Literal

from falqon_fx import config

InputDtype = Literal["float32", "bfloat16", "float16"]
Fp8Format = Literal["e4m3", "e5m2"]
POINTER = {"float32": "*fp32:16", "bfloat16": "*bf16:16", "float16": "*fp16:16"}  # aligned
MAX_RANK = 256  # the most columns of an adapter that an accumulator holds
MAX_INT8 = 1 << 17  # the most products of two bytes that an int32 sums up
MAX_TAIL = 128  # the most of one in FP8
MAX_PIECES = 8  # weights, or adapters, in one launch
MAX_SIBLINGS = 3  # adapters that read the same x: of q, k and v
CASTS = (7, 4, 2, 1)  # adapters that one launch casts: of a layer, of its attention, of q and v
# Whether sizes, and with them where rows start, are multiples of 16, which Triton compiles other
# code for: "aligned" all of them, "rank" all but those of adapters, "any" none but K.
Sizes = Literal["aligned", "rank", "any"]
# How float32 becomes FP8: by the GPU's own instruction (sm_89 and newer), or by integer steps,
# which older GPUs and Triton's interpreter need (see interpreter.py).
CastMode = Literal["hardware", "integer"]


@cache
def template_text(package: str, template: str) -> str:
    """Text of ``<template>.py.jinja`` in the package of its spec, behind the macros that all
    templates share.
    """
    places = ((__package__, "numerics"), (package, template))
    return "".join(files(at).joinpath(f"{name}.py.jinja").read_text("utf-8") for at, name in places)


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
    def text(self) -> str:
        """The template, from the folder of the spec's own package."""
        return template_text(type(self).__module__.rpartition(".")[0], self.template)

    @property
    def name(self) -> str:
        """A short readable identifier for files and modules, different for each spec."""
        raise NotImplementedError

    @property
    def key(self) -> str:
        """Hexadecimal SHA-256 of library version, template text and fields; stable over runs.

        Whatever caches something made from this spec puts the key into its own.
        """
        content = [library_version(), self.text, self.template, self.fields]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.template}({', '.join(f'{k}={v}' for k, v in self.fields.items())})"


def padded(columns: int) -> int:
    """The columns of a tile that holds so many: a power of two, of which tensor cores take 16."""
    return max(16, 1 << (columns - 1).bit_length())


def in_casts(adapters: int) -> Iterator[slice]:
    """Adapters in groups that one launch casts."""
    first = 0
    while first < adapters:
        count = next(count for count in CASTS if count <= adapters - first)
        yield slice(first, first + count)
        first += count


def sizes_of(ranks: Iterable[int], others: Iterable[int] = ()) -> Sizes:
    """What a launch is compiled for by the sizes of adapters and all others."""
    if any(size % 16 for size in others):
        return "any"
    return "rank" if any(rank % 16 for rank in ranks) else "aligned"


def columns_of(rank: int) -> int:
    """The columns that a kernel has for a rank: 16, 64, 128 or 256. With 32 one would be no faster
    than with 64.
    """
    return 16 if rank <= 16 else max(64, padded(rank))


def aligned(columns: int) -> int:
    """So many columns up to a multiple of 16: FP8 products add up in steps of 16."""
    return -(-columns // 16) * 16


def rank_of(rank: int, error: int, columns: int) -> int:
    """The rows of Â, for so many of A and of A_c, and columns of W_S behind b: with what a
    calibration has made they end at a multiple of 16, so that kernels for "aligned" sizes do.
    """
    return aligned(rank + error) if error or columns else rank


def check_literals(spec: KernelSpec) -> None:
    """Raises ValueError where a field of ``spec`` is outside its `Literal`."""
    kind: Any = type(spec)  # as a key; mypy thinks that it has no hash
    config.check_literals(spec.fields, config.literals(kind))


def check_powers_of_two(spec: KernelSpec, *names: str) -> None:
    """Raises ValueError where a field of ``spec`` is not a power of two."""
    for name in names:
        size = spec.fields[name]
        if not isinstance(size, int) or size < 1 or size & (size - 1):
            raise ValueError(f"{name}={size!r}: expected a power of two")
