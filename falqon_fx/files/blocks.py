"""FP8 weights with one scale per block, as DeepSeek, Qwen and GLM are published: read, and cast
again to one scale per row.

The weights of such a checkpoint are W ≈ code · scale[block of the row, block of the column]. A sum
over the columns can't take such scales out of the product, one per row it can. Where the blocks'
scales are powers of two ("ue8m0") and those of the rows too, a value changes only if it becomes
subnormal under the largest scale of its row, by half of 2⁻⁹ of that scale at most; other scales
cost a second cast (docs/checkpoints.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError, one_line
from falqon_fx.files.site_checks import described
from falqon_fx.site import nvfp4
from falqon_fx.site.base import Base, cast_base, check_base, check_weight
from falqon_fx.site.numerics import E4M3, as_code
from falqon_fx.site.spec import SiteSpec

STRIP = 1 << 24  # elements that are decoded at a time
_CHECK = "Check weight_block_size in config.json, and the checkpoint"


@dataclass(frozen=True)
class Moved:
    """How far casting again moved weights: ‖cast again − as published‖² and ‖as published‖²."""

    error: float
    norm: float

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Moved:
        return cls(float((after - before).square().sum()), float(before.square().sum()))

    @classmethod
    def total(cls, parts: Iterable[Moved]) -> Moved:
        pairs = [(part.error, part.norm) for part in parts]
        return cls(math.fsum(error for error, _ in pairs), math.fsum(norm for _, norm in pairs))

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.norm) if self.norm else 0.0


def block_size(settings: Mapping[str, Any], directory: Path) -> tuple[int, int] | None:
    """Rows and columns of a block by a ``quantization_config``; None where it names none.

    Raises:
        FalqonError: groups of layers with different blocks, or something else than two sizes.
    """
    sizes = {_size(settings.get("weight_block_size"), directory)}
    for weights in groups_of_weights(settings):
        sizes.add(_size(weights.get("block_structure"), directory))
        if weights.get("strategy") == "group":
            sizes.add(_size([1, weights.get("group_size")], directory))
    sizes.discard(None)
    if len(sizes) > 1:
        problem = f"its config.json names blocks of several sizes, {sorted(filter(None, sizes))}"
        raise FalqonError(str(directory), problem, "Dequantize it with transformers first")
    return sizes.pop() if sizes else None


def groups_of_weights(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """How groups of layers have their weights quantized, but for those that have activations alone
    (attention).
    """
    groups = (settings.get("config_groups") or {}).values()
    return [weights for group in groups if (weights := group.get("weights"))]


MXFP4 = (1, 32)  # rows and columns that share a scale


def has_mxfp4(settings: Mapping[str, Any]) -> bool:
    """Whether experts are in four bits, by a ``quantization_config`` of DeepSeek V4."""
    return settings.get("expert_dtype") == "fp4"


def of_mxfp4(packed: Tensor) -> Tensor:
    """Codes [out, in / 2] of two E2M1 values a byte, in E4M3, which has all of these."""
    return nvfp4.values(packed.view(torch.uint8)).to(E4M3)


def _size(given: Any, directory: Path) -> tuple[int, int] | None:
    if given is None:
        return None
    if isinstance(given, str):  # "128x128", as compressed-tensors wrote it once
        given = [int(n) if n.isdecimal() else n for n in given.split("x")]
    whole = [n for n in given if type(n) is int and n > 0]
    if len(given) != 2 or whole != [*given]:
        problem = f"its config.json names blocks of {given}, and a block has rows and columns"
        raise FalqonError(str(directory), problem, _CHECK)
    return (given[0], given[1])


def check_grid(
    path: str, code: Tensor, scale: Tensor, size: tuple[int, int] | None, where: str
) -> tuple[int, int]:
    """The size of the blocks whose scales are ``scale`` [⌈out / rows⌉, ⌈in / columns⌉]. Both may be
    on the meta device.

    Raises:
        FalqonError: another number of scales than blocks, or scales that are integers (the bits of
            numbers).
    """
    if not scale.is_floating_point():
        problem = f"{where} has {described(code)} with scales {described(scale)}"
        raise FalqonError(path, problem, "Check the checkpoint")
    if size is None:
        problem = f"it has {described(scale)} as its scales, and config.json names no blocks"
        raise FalqonError(path, problem, _CHECK)
    expected = tuple(-(-n // of_block) for n, of_block in zip(code.shape, size, strict=True))
    if _grid(scale).shape != expected:
        problem = (
            f"{where} has {described(scale)} as its scales, and blocks of {size[0]} x {size[1]} "
            f"of {list(code.shape)} need {list(expected)}"
        )
        raise FalqonError(path, problem, _CHECK)
    return size


def check_blocks(path: str, code: Tensor, scale: Tensor, size: tuple[int, int], where: str) -> None:
    """Look at codes and one scale per block.

    Raises:
        FalqonError: as `check_grid`; or a code that is NaN, or a scale that is no positive number.
    """
    check_grid(path, code, scale, size, where)
    check_base(path, Base(as_code(code), scale.to(torch.float32)), where)


def dequantize(code: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """W, float32 [out, in], for codes [out, in], E4M3 or int8, and one scale per block."""
    out, features = code.shape
    factors = _grid(scale).to(torch.float32).repeat_interleave(size[0], 0)[:out]
    return code.to(torch.float32) * factors.repeat_interleave(size[1], 1)[:, :features]


def _grid(scale: Tensor) -> Tensor:
    """One scale for all of a weight may have any number of dimensions."""
    return scale.reshape(1, 1) if scale.numel() == 1 else scale


def cast_again(
    path: str, code: Tensor, scale: Tensor, size: tuple[int, int], spec: SiteSpec
) -> tuple[Base, Moved]:
    """W with one scale per row, and by how much it moved. Decoded a strip of rows at a time.

    Raises:
        FalqonError: a weight that lies beyond the scales in use.
    """
    assert spec.per_row, spec
    parts, moved = [], []
    for rows, blocks in _strips(code, size):
        dense = dequantize(code[rows], scale[blocks], size)
        check_weight(path, dense)
        parts.append(cast_base(dense, spec))
        moved.append(Moved.of(dense, parts[-1].dequantize()))
    base = Base(torch.cat([p.code for p in parts]), torch.cat([p.scale for p in parts]))
    return base, Moved.total(moved)


def warn_of_a_second_cast(directory: Path) -> None:
    """Say once what casting again costs where scales are no powers of two."""
    warnings.warn(
        f"falqon: {one_line(str(directory))} has 8-bit weights with scales that are no powers of "
        "two. W is cast again here, which costs about what the cast that was published had cost "
        "(of FP8 with one scale per block 2.6% of W each, 3.7% together). Start from a dense "
        "checkpoint where there is one.",
        stacklevel=4,
    )


def _strips(code: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Rows of codes, and the rows of scales that belong to them."""
    out, features = code.shape
    blocks = max(1, STRIP // max(1, size[0] * features))
    for first in range(0, -(-out // size[0]), blocks):
        end = first + blocks
        yield slice(first * size[0], end * size[0]), slice(first, end)


def has_blocks(code: Tensor, scale: Tensor) -> bool:
    """Whether codes [out, in] have scales per block: neither one for all nor one per row."""
    per_row = scale.shape in ((len(code), 1), (len(code),))
    return scale.numel() > 1 and not per_row
