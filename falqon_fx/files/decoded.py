"""Weights that a checkpoint has in FP8, INT8 or four bits, decoded as `prequantize` reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError
from falqon_fx.files import blocks
from falqon_fx.files.hf import read_entries, read_tensor
from falqon_fx.files.nvfp4_import import base_of, whole_scale
from falqon_fx.files.units import SCALES, Unit, header_dtype, path_of
from falqon_fx.site.base import check_scale
from falqon_fx.site.numerics import dtype_name, powers_of_two

_SCALES = (*SCALES, "_scale_inv")  # the last of a whole stack


def read(unit: Unit, source: Path, index: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a unit, as they are in the checkpoint."""
    return {name: read_tensor(source / index[name], name) for name in unit.tensors}


def opened(unit: Unit, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same with one code a byte."""
    if not unit.mxfp4:
        return tensors
    return {n: blocks.of_mxfp4(t) if t.dtype == torch.int8 else t for n, t in tensors.items()}


def weight_of(unit: Unit, site: str, tensors: Mapping[str, Tensor], source: Path) -> Tensor:
    """The weight of a unit, decoded where it was cast already.

    Raises:
        FalqonError: codes or scales that are no numbers, or don't fit each other.
    """
    if unit.nvfp4 is not None:
        return base_of(site, unit.nvfp4, tensors, source).dequantize()
    weight = tensors[unit.tensors[0]]
    if unit.block is None:
        return weight
    scale = tensors[unit.tensors[1]]
    blocks.check_blocks(site, weight, scale, unit.block, str(source))
    return blocks.dequantize(weight, scale, unit.block)


def left_dense(unit: Unit, tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The weight of a layer that is not cast, in the model's dtype.

    Raises:
        FalqonError: as `weight_of` and `check_finite`.
    """
    path = path_of(unit.tensors[0])
    weight = weight_of(unit, path, opened(unit, tensors), source)
    weight = weight.to(getattr(torch, unit.dtype))
    return {f"{path}.weight": check_finite(path, weight, source)}


def check_finite(path: str, weight: Tensor, source: Path) -> Tensor:
    """A decoded weight of a layer that stays dense.

    Raises:
        FalqonError: it holds NaN or Inf, as of scales that are too large.
    """
    if not bool(weight.isfinite().all()):
        problem = f"decoded to {dtype_name(weight.dtype)} its weight in {source} holds NaN or Inf"
        raise FalqonError(path, problem, "Check the checkpoint")
    return weight


def shapes_of(units: Iterable[Unit], source: Path, index: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of units that are not cast, as they are written, on the meta device."""
    entries, found = read_entries(source, index), {}
    for unit in units:
        if unit.layer is not None:
            continue
        for name in unit.tensors[:1] if unit.dtype else unit.tensors:
            shape, dtype = entries[name]["shape"], header_dtype(entries[name])
            if unit.dtype:
                dtype = getattr(torch, unit.dtype)
                name = f"{path_of(name)}.weight"
                packed = unit.mxfp4 or unit.nvfp4 is not None
                shape = [*shape[:-1], 2 * shape[-1]] if packed else shape
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


def check_scales(units: Iterable[Unit], source: Path, index: Mapping[str, str]) -> None:
    """Look at the scales of weights that were cast already, before any is cast again; those of
    NVFP4's blocks are looked at with its codes. Say what a second cast costs.

    Raises:
        FalqonError: one that is no positive number.
    """
    exact = True
    for unit in units:
        for name in unit.tensors if unit.block is not None else ():
            if not name.endswith(_SCALES):
                continue
            scale = read_tensor(source / index[name], name)
            path = next((p for end in SCALES if (p := name.removesuffix(end)) != name), name)
            check_scale(path, scale.to(torch.float32), str(source))
            exact = exact and (unit.layer is None or powers_of_two(scale))
        if (names := unit.nvfp4) is not None:
            whole = read_tensor(source / index[names.whole], names.whole)
            whole_scale(path_of(names.codes), names, whole, source)
    if not exact:
        blocks.warn_of_a_second_cast(source)
