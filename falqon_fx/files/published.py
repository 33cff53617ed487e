"""Quantized weights of published checkpoints: which tensors they are, and whether what belongs to
one is there and of its size. `load` asks with the tensors at hand, `prequantize` with their headers
(tensors on the meta device), before it casts the first: both refuse the same by the same words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.config import BaseDtype
from falqon_fx.errors import FalqonError
from falqon_fx.files import blocks, nvfp4_import
from falqon_fx.files.hf import read_entries
from falqon_fx.files.site_checks import described
from falqon_fx.files.stack_files import Checkpoint
from falqon_fx.files.units import OF_INPUT, SCALES, ZERO_POINT, header_dtype, the_scale
from falqon_fx.site.numerics import E4M3, INT8

_OPERANDS: dict[torch.dtype, BaseDtype] = {E4M3: "fp8", INT8: "int8"}
_TYPES: dict[str, BaseDtype] = {"float": "fp8", "int": "int8"}  # of compressed-tensors
_BESIDE = (*OF_INPUT, ".weight_shape", ZERO_POINT)
_CHECK = "Check the checkpoint"
_ONE = "Take a checkpoint in one form, or a dense one"


@dataclass(frozen=True)
class Weight:
    """A weight in FP8 or INT8: ``code`` [out, in], with scales as the checkpoint has them: one,
    one per row, or one per ``block`` of so many rows and columns.
    """

    code: Tensor
    scale: Tensor
    block: tuple[int, int] | None
    mxfp4: bool = False  # unpacked: E4M3, in which all of its values are


def weights_in(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], directory: Path
) -> tuple[BaseDtype, dict[str, Weight]]:
    """What all of the weights are, and they by the paths of their layers. Of values nothing is
    looked at.

    Raises:
        FalqonError: none is quantized, some are FP8 and some INT8, some are E5M2, or config.json
            says otherwise; one lacks scales or has several, or scales that don't fit it.
    """
    cast = _cast_in(tensors)
    _check_settings(settings, cast, directory)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e5m2 and name.endswith(".weight"):
            problem = f"{directory} has {described(tensor)} for it, and FP8 weights are E4M3 here"
            raise FalqonError(name.removesuffix(".weight"), problem, _ONE)
    codes = {n.removesuffix(".weight"): t for n, t in cast.items() if not n.endswith(SCALES)}
    four = blocks.has_mxfp4(settings)
    packed = {path for path, code in codes.items() if four and code.dtype == INT8}
    codes |= {path: blocks.of_mxfp4(codes[path]) for path in packed}
    kind = _base_dtype(codes, settings, directory)
    size = blocks.block_size(settings, directory)
    found = {}
    for path, code in codes.items():
        scale, own = _scale(path, code, tensors, directory), None
        if path in packed or blocks.has_blocks(code, scale):
            given = blocks.MXFP4 if path in packed else size
            own = blocks.check_grid(path, code, scale, given, str(directory))
        found[path] = Weight(code, scale, own, path in packed)
    return kind, found


def used_by(path: str) -> set[str]:
    """What may belong to the weight of a layer."""
    return {f"{path}{end}" for end in (".weight", *_BESIDE, *SCALES)}


def check_headers(
    model: Any,
    source: Path,
    index: Mapping[str, str],
    settings: Mapping[str, Any],
    nvfp4: Mapping[str, nvfp4_import.Names],
) -> None:
    """Refuse a checkpoint of an empty PEFT model whose quantized weights `load` would refuse for
    their dtypes and shapes, which the headers of its files say.

    Raises:
        FalqonError: as `weights_in`; in NVFP4 as `nvfp4_import.base_of`, or another form beside it.
    """
    entries = read_entries(source, index)
    tensors = {
        name: torch.empty(e["shape"], dtype=header_dtype(e), device="meta")
        for name, e in entries.items()
    }
    tensors = Checkpoint(model, tensors).scales_parted(tensors)
    if nvfp4:
        nvfp4_import.check_alone(tensors, nvfp4, source)
        for path, names in nvfp4.items():
            nvfp4_import.check_sizes(path, names, tensors, source)
    elif _cast_in(tensors):
        weights_in(tensors, settings, source)


def _cast_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, by their dtype; NVFP4's scales and what else has it."""
    found = tensors.items()
    return {n: t for n, t in found if t.dtype in _OPERANDS and not n.endswith(_BESIDE)}


def _check_settings(
    settings: Mapping[str, Any], cast: Mapping[str, Tensor], directory: Path
) -> None:
    """Refuse a ``quantization_config`` that is not of an FP8 or INT8 checkpoint."""
    method = settings.get("quant_method")
    if cast and not settings:
        name, tensor = next(iter(cast.items()))
        problem = f"{directory} has {described(tensor)}, and its config.json has no"
        raise FalqonError(name, f"{problem} quantization_config", "Fetch config.json again")
    if method not in ("compressed-tensors", "fp8"):
        dense = "Call falqon_fx.prequantize on it, or load it with transformers"
        raise FalqonError(
            str(directory),
            "it is neither a folder of falqon_fx.prequantize nor an FP8, INT8 or NVFP4 checkpoint "
            f"(quant_method={method!r})",
            "Load it with transformers, and save what that has decoded" if settings else dense,
        )
    for weights in blocks.groups_of_weights(settings):
        kind, whole = weights.get("type"), weights.get("strategy") in ("channel", "tensor")
        if weights.get("num_bits") != 8 or kind not in _TYPES or (kind == "int" and not whole):
            raise FalqonError(
                str(directory),
                f"its weights have {weights.get('num_bits')} bits of type {kind!r}, and scales by "
                f"{weights.get('strategy')!r}",
                "8-bit floats can be trained on as they are, and 8-bit integers with a scale per "
                "row (channel) or one for all",
            )


def _base_dtype(
    codes: Mapping[str, Tensor], settings: Mapping[str, Any], directory: Path
) -> BaseDtype:
    """What all of the weights are. Where they differ the error is of the fewest."""
    found: dict[BaseDtype, list[str]] = defaultdict(list)
    for path, code in codes.items():
        found[_OPERANDS[code.dtype]].append(path)
    if not found:
        problem = "it holds no float8_e4m3fn or int8 weight"
        raise FalqonError(str(directory), problem, "Use transformers")
    if len(found) > 1:
        few, many = sorted(found, key=lambda kind: len(found[kind]))
        problem = f"{directory} has it in {few.upper()}, and {found[many][0]} in {many.upper()}"
        raise FalqonError(found[few][0], problem, _ONE)
    ((kind, paths),) = found.items()
    said = {_TYPES[weights["type"]] for weights in blocks.groups_of_weights(settings)}
    said |= {"fp8"} if settings.get("quant_method") == "fp8" else set()
    if said - {kind}:
        text = " and ".join(sorted(said)).upper()
        problem = f"{directory} has it in {kind.upper()}, by its config.json weights are {text}"
        raise FalqonError(paths[0], problem, _ONE)
    return kind


def _scale(path: str, code: Tensor, tensors: Mapping[str, Tensor], directory: Path) -> Tensor:
    """The scales of a weight, as the checkpoint has them."""
    name = the_scale(path, tensors)
    if name is None:
        problem = f"{directory} holds no scale for it, which is {described(code)}"
        raise FalqonError(path, problem, _CHECK)
    scale = tensors[name]
    if not scale.is_floating_point() or not scale.numel() or code.dim() != 2:
        problem = f"{directory} has {described(code)} with scales {described(scale)}"
        raise FalqonError(path, problem, _CHECK)
    return scale
