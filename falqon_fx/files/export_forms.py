"""The forms in which `save_fp8` writes base weights, by the names that engines have for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from falqon_fx.config import BaseDtype
from falqon_fx.errors import FalqonError, named
from falqon_fx.files.export_files import FUSED
from falqon_fx.files.export_layers import ExportLayer, Merged
from falqon_fx.files.export_report import Left, Source
from falqon_fx.site import nvfp4
from falqon_fx.site.base import Base, row_chunks
from falqon_fx.site.numerics import E4M3, OPERANDS

Form = Literal["compressed-tensors", "fp8"]
_BLOCK = 128  # the block size that engines have kernels for


@dataclass(frozen=True)
class Stored:
    """A tensor of a layer in a file, and how it is read off the layer's base."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    of: Callable[[Base], Tensor]


@dataclass(frozen=True)
class Packed(Base):
    """A base in NVFP4, and 1 / scale as files have it."""

    divisor: Tensor


def stored(kind: BaseDtype, shape: tuple[int, int], block: int | None) -> list[Stored]:
    """The tensors of a weight [out, in]; with ``block`` in the fp8 form, else in that of
    compressed-tensors.
    """
    out, features = shape
    if kind == "nvfp4":
        codes, blocks = (out, features // 2), (out, features // nvfp4.BLOCK)
        return [
            Stored("weight_packed", codes, torch.uint8, lambda b: nvfp4.parted(b.code)[0]),
            Stored("weight_scale", blocks, E4M3, lambda b: nvfp4.parted(b.code)[1].view(E4M3)),
            Stored("weight_global_scale", (1,), torch.float32, _divisor),
        ]
    name, grid = "weight_scale", (out, 1)
    if block is not None:
        name, grid = "weight_scale_inv", (-(-out // block), -(-features // block))
    return [
        Stored("weight", shape, OPERANDS[kind], lambda base: base.weight),
        Stored(name, grid, torch.float32, lambda base: base.scale.expand(grid).contiguous()),
    ]


def _divisor(base: Base) -> Tensor:
    assert isinstance(base, Packed), base
    return base.divisor.reshape(1).clone()  # of one that layers share each has a tensor


def block_size(layers: Iterable[ExportLayer]) -> int:
    """The largest power of two up to 128 that divides every side of every FP8 weight."""
    size = _BLOCK
    for layer in layers:
        while any(side % size for side in layer.shape):
            size //= 2
    return size


def check_form(layers: Collection[ExportLayer], stacks: Collection[str], form: Form) -> BaseDtype:
    """What all base weights are. Stacks of experts, given by their paths, are FP8.

    Raises:
        FalqonError: they are several things, or such that ``form`` has no place for them.
    """
    paths: dict[BaseDtype, str] = {layer.spec.base: layer.path for layer in layers}
    if stacks:
        paths["fp8"] = next(iter(stacks))
    if len(paths) > 1:
        (kind, path), (other, _) = list(paths.items())[:2]
        problem = f"its base weight is {kind.upper()}, and others of the model are {other.upper()}"
        raise FalqonError(path, problem, "Prepare the whole model with one base_dtype")
    ((kind, path),) = paths.items()
    if form == "fp8" and kind != "fp8":
        raise FalqonError(
            path,
            f"its base weight is {kind.upper()}, which the fp8 form can't hold",
            "Export in the compressed-tensors form",
        )
    if form == "fp8" and (rows := [layer.path for layer in layers if layer.spec.per_row]):
        raise FalqonError(
            rows[0],
            "it has one scale per row, which the fp8 form can't hold",
            "Export in the compressed-tensors form, or train with granularity='tensor'",
        )
    return kind


# -- NVFP4 -----------------------------------------------------------------------------------------


def shared_divisors(layers: Mapping[str, ExportLayer]) -> dict[str, Tensor]:
    """1 / s of NVFP4 layers that engines fuse into one, by path: the least of theirs, since vLLM
    takes one for all of a fused layer. Every process of a sharded model calls this.
    """
    found: dict[str, Tensor] = {}
    parents = dict.fromkeys(path.rpartition(".")[0] for path in layers)
    for parent in parents:
        for group in FUSED:
            members = [p for name in group if (p := f"{parent}.{name}".lstrip(".")) in layers]
            if len(members) > 1:
                whole = (layers[path].whole() for path in members)
                own = (_own_divisor(layer, layer.merged()).cpu() for layer in whole)
                found |= dict.fromkeys(members, min(own, key=float))
    return found


def _own_divisor(layer: ExportLayer, merged: Merged | None) -> Tensor:
    if merged is None:
        return nvfp4.divisor_of(layer.trained().scale)
    return nvfp4.divisor_for(merged.total.abs().amax(), layer.spec.scale)


def packed(layer: ExportLayer, divisor: Tensor | None, left: Left) -> tuple[Packed, Source]:
    """`ExportLayer.cast` to NVFP4, with this 1 / s or its own. Bytes that were trained on stay the
    numbers that they are where E4M3 has their block scales for it; else they are cast anew.
    """
    merged = layer.merged()
    divisor = _own_divisor(layer, merged) if divisor is None else divisor
    if merged is None:
        base = layer.trained()
        code = nvfp4.rescaled(base.code, base.scale, divisor)
        if code is not None:
            return Packed(code, 1 / divisor, divisor), "unchanged"
        weight, source = layer.weight()
        merged = Merged(wide := weight.to(torch.float32), wide, source)
    total = merged.total
    parts = [nvfp4.cast(total[rows], 1 / divisor, divisor) for rows in row_chunks(total)]
    made = Packed(torch.cat(parts), 1 / divisor, divisor)
    merged.note(made, left)
    return made, merged.source


def warn_of_a_second_cast(left: Left, kind: BaseDtype) -> None:
    """Say that most of what was trained is not in the folder."""
    if left.share is not None and left.share < 0.5:
        warnings.warn(
            f"falqon: only {left.share:.0%} of what the adapters add is left in {kind.upper()}: "
            "what moves a weight by less than half of a step rounds back. base= names the folder "
            "of the original weights, with which nothing is lost; or serve the adapter beside its "
            "base: model.base_model.set_adapter([]), then save_fp8, and the adapter of "
            "save_pretrained",
            stacklevel=3,
        )


def warn_of_calibration(layers: Iterable[ExportLayer]) -> None:
    """What engines read has one weight a layer, and no place for what a calibration adds."""
    calibrated = [layer for layer in layers if getattr(layer.linear, "terms", {})]
    if calibrated:
        paths = [layer.path for layer in calibrated]
        warnings.warn(
            f"falqon: {named(paths)} were calibrated, and the folder has no place for that: "
            "served, they have the cast errors that training had not "
            f"({_WITHOUT[calibrated[0].spec.base]}). base= casts the merged weights from the "
            "original ones; a checkpoint of save_checkpoint keeps what was calibrated",
            stacklevel=3,
        )


_WITHOUT: dict[BaseDtype, str] = {
    "fp8": "SmolLM2-135M, untrained: a KL of 0.063 per label to the dense model, 0.051 with ranks "
    "for W's",
    "int8": "SmolLM2-135M, untrained: a KL of 0.069 per label to the dense model, 0.054 calibrated",
    "nvfp4": "SmolLM2-135M, untrained: a KL of 0.395 per label to the dense model, 0.152 "
    "calibrated",
}
