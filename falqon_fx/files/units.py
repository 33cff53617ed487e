"""What `prequantize` writes: which layers it casts, and which file holds what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.files.hf import read_entries
from falqon_fx.files.nvfp4_import import OF_X, Names
from falqon_fx.files.stack_files import StackLayer
from falqon_fx.model.lora_layers import LinearLayer, linear_layers
from falqon_fx.model.sorting import skip_reason
from falqon_fx.rows import model as rows_model
from falqon_fx.site.numerics import dtype_name

_SMALL = 1 << 20  # bytes; tensors below go into one file together
SCALES = (".weight_scale", ".weight_scale_inv")  # what FP8 checkpoints call the scales of a weight
ZERO_POINT = ".weight_zero_point"
OF_INPUT = (".input_scale", ".input_zero_point")  # static ones: x is cast by its own values here
# Of an FP8 cache of keys and values, by the names of AutoFP8, compressed-tensors and vLLM.
OF_CACHE = (".k_scale", ".v_scale", ".kv_scale", "k_proj.output_scale", "v_proj.output_scale")
_CAST = {"F8_E4M3": "FP8", "I8": "INT8"}
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Unit:
    """What one file holds: a weight that is cast, or tensors as they are."""

    file: str  # in the folder, with a number of its own
    tensors: tuple[str, ...]  # weights, then the scales of those that were cast already
    layer: str | None  # path of the linear layer, or stack of experts, in the PEFT model
    bytes: int
    dtype: str = ""  # of the weight that is cast
    block: tuple[int, int] | None = None  # rows and columns per scale, of one that was cast already
    nvfp4: Names | None = None  # of one that is NVFP4 already


def layers_to_cast(
    skeleton: Any, index: Mapping[str, str], config: FalqonConfig
) -> dict[str, LinearLayer]:
    """The linear layers to cast, by path."""
    found = {}
    for layer in linear_layers(skeleton):
        tied = tensor_of(layer) not in index  # a checkpoint holds a tied weight once
        left = skip_reason(layer, config, tied)
        if config.update == "rows" and layer.lora is not None:
            left = rows_model.skip_reason(layer.lora, config)
        if left is not None:
            continue
        if tied:
            raise FalqonError(
                layer.site,
                f"the checkpoint has no tensor {tensor_of(layer)!r}",
                "Load the model with transformers and save it again; leave tied layers out",
            )
        found[layer.path] = layer
    return found


def tensor_of(layer: LinearLayer) -> str:
    """The name of its weight in the checkpoint."""
    return layer.path.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"


def tensors_of(layer: LinearLayer | StackLayer) -> tuple[str, ...]:
    """The names of its weights in the checkpoint; a stack may have many."""
    if isinstance(layer, StackLayer):
        return tuple(part.name for part in layer.parts)
    return (tensor_of(layer),)


def units_of(
    layers: Mapping[str, LinearLayer | StackLayer],
    source: Path,
    index: Mapping[str, str],
    block: tuple[int, int] | None,
    nvfp4: Mapping[str, Names],
    dtype: torch.dtype,
) -> list[Unit]:
    """The files to write, the largest first. FP8 weights with one scale per ``block``, INT8 ones
    with one per row and those in ``nvfp4`` count as dense ones of ``dtype``.
    """
    entries = read_entries(source, index)
    _refuse_zero_points(entries)
    sizes = {name: _bytes(entry) for name, entry in entries.items()}
    cast: list[Unit] = []
    for path, layer in layers.items():
        weights = tensors_of(layer)
        if (packed := _nvfp4_of(layer, weights, nvfp4)) is not None:
            size = sum(sizes[name] for name in packed.all)
            file = _file_of(len(cast), layer.site)
            cast.append(Unit(file, packed.all, path, size, dtype_name(dtype), nvfp4=packed))
            continue
        scales = tuple(s for name in weights if (s := _block_scale(name, entries, block)))
        names, found = weights + scales, {entries[name]["dtype"] for name in weights}
        if len(scales) == len(weights):
            known = dtype_name(dtype)
        elif not scales and len(found) == 1 and found <= _DTYPES.keys():
            known = _DTYPES[found.pop()]
        else:
            text = " and ".join(sorted(found))
            raise FalqonError(
                layer.site, f"its weight is {text} already", "falqon_fx.load takes FP8 as it is"
            )
        file = _file_of(len(cast), layer.site)
        of_block = block if scales else None
        if found == {"I8"}:
            of_block = (1, entries[weights[0]]["shape"][-1])
        cast.append(Unit(file, names, path, sum(sizes[n] for n in names), known, of_block))
    if not cast:
        raise FalqonError(str(source), "none of its layers is to be cast", "Check the LoraConfig")
    used = {name for unit in cast for name in unit.tensors}
    scaled = [w for unit in cast if unit.block is not None for w in unit.tensors]
    used |= {w.removesuffix(".weight") + end for w in scaled for end in OF_INPUT}
    used |= {path + end for path in nvfp4 for end in OF_X}
    used |= {name for name in index if nvfp4 and name.endswith(OF_CACHE)}
    rest = [name for name in index if name not in used]
    codes = {names.codes for names in nvfp4.values()}
    for name in rest:
        kind = "NVFP4" if name in codes else _CAST.get(entries[name]["dtype"])
        if kind is not None:
            problem = f"it is {kind} in the checkpoint, and its layer is none that is cast"
            raise FalqonError(name, problem, "Don't exclude it, or give the dense checkpoint")
    small = tuple(name for name in rest if sizes[name] < _SMALL)
    alone = [(name,) for name in rest if sizes[name] >= _SMALL]
    units = list(cast)
    for names in [*alone, small] if small else alone:
        file = _file_of(len(units), "small" if names is small else names[0])
        units.append(Unit(file, names, None, sum(sizes[name] for name in names)))
    # The largest first, so that workers end together.
    return sorted(units, key=lambda unit: -unit.bytes)


def _nvfp4_of(
    layer: LinearLayer | StackLayer, weights: Iterable[str], nvfp4: Mapping[str, Names]
) -> Names | None:
    """The tensors of a layer whose weight is NVFP4."""
    found = [p for w in weights if (p := w.removesuffix(".weight")) in nvfp4]
    if found and isinstance(layer, StackLayer):
        problem = "it is a stack of experts, which the checkpoint has in NVFP4"
        raise FalqonError(layer.site, problem, "Call falqon_fx.load on it, or give the dense one")
    return nvfp4[found[0]] if found else None


def _bytes(entry: Mapping[str, Any]) -> int:
    first, end = entry["data_offsets"]
    return int(end - first)


def _block_scale(
    weight: str, entries: Mapping[str, Any], block: tuple[int, int] | None
) -> str | None:
    """The name of the scales of an FP8 weight that has one per ``block``, or of an INT8 one."""
    scale = _scale_of(weight, entries)
    if entries[weight]["dtype"] == "I8":
        return scale
    if not block or not scale or entries[scale]["shape"] == [entries[weight]["shape"][0], 1]:
        return None
    return scale


def _scale_of(weight: str, entries: Mapping[str, Any]) -> str | None:
    """The name of the scales of an FP8 or INT8 weight."""
    if entries[weight]["dtype"] not in _CAST:
        return None
    names = (weight.removesuffix(".weight") + end for end in SCALES)
    return next((name for name in names if name in entries), None)


def _refuse_zero_points(entries: Mapping[str, Any]) -> None:
    for name in entries:
        if name.endswith(ZERO_POINT):
            raise FalqonError(
                name.removesuffix(ZERO_POINT),
                "it has zero points, and W is multiplied by scales alone",
                "Take a symmetric checkpoint, or a dense one",
            )


def _file_of(number: int, name: str) -> str:
    """A file for what a checkpoint calls ``name``: anything, a path out of the folder as well."""
    return f"weights/{number:05}.{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[-100:]}.safetensors"
