"""What `prequantize` writes: which layers it casts, and which file holds what."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError, one_line
from falqon_fx.files import blocks
from falqon_fx.files.hf import read_entries, read_tensor
from falqon_fx.files.nvfp4_import import OF_X, Names
from falqon_fx.files.stack_files import StackLayer
from falqon_fx.model.lora_layers import LinearLayer, linear_layers
from falqon_fx.model.sorting import skip_reason
from falqon_fx.rows import model as rows_model
from falqon_fx.site.numerics import dtype_name

_SMALL = 1 << 20  # bytes; tensors below go into one file together
# What FP8 checkpoints call the scales of a weight; the last is DeepSeek V4's.
SCALES = (".weight_scale", ".weight_scale_inv", ".scale")
ZERO_POINT = ".weight_zero_point"
# Static ones of activations: x is cast by its own values here.
OF_INPUT = (".input_scale", ".input_zero_point", ".activation_scale")
# Of an FP8 cache of keys and values, by the names of AutoFP8, compressed-tensors and vLLM, and of
# the queries beside them.
OF_CACHE = (
    ".q_scale", ".k_scale", ".v_scale", ".kv_scale", "k_proj.output_scale", "v_proj.output_scale",
)  # fmt: skip
_CAST = {"F8_E4M3": "FP8", "I8": "INT8"}
FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # by the names in headers
_DTYPES: dict[str, torch.dtype] = {
    **{name: getattr(torch, dtype) for name, dtype in FLOATS.items()},
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "BOOL": torch.bool, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


def header_dtype(entry: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a tensor by its entry in a header; bytes where that is not known."""
    return _DTYPES.get(entry["dtype"], torch.uint8)


@dataclass(frozen=True)
class Unit:
    """What one file holds: a weight that is cast, or tensors as they are."""

    file: str  # in the folder, with a number of its own
    tensors: tuple[str, ...]  # weights, then the scales of those that were cast already
    layer: str | None  # path of the linear layer, or stack of experts, in the PEFT model, if cast
    bytes: int
    dtype: str = ""  # of the weight that is cast
    block: tuple[int, int] | None = None  # rows and columns per scale, of one that was cast already
    nvfp4: Names | None = None  # of one that is NVFP4 already
    mxfp4: bool = False  # two codes a byte


def layers_to_cast(
    skeleton: Any, named: Mapping[str, str], config: FalqonConfig
) -> dict[str, LinearLayer]:
    """The linear layers to cast, by path; ``named`` are the tensors of the checkpoint by the
    model's names.
    """
    found = {}
    for layer in linear_layers(skeleton):
        tied = tensor_of(layer) not in named  # a checkpoint holds a tied weight once
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
    """What the model calls its weight, without PEFT's wrappers."""
    return layer.path.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"


def path_of(weight: str) -> str:
    """The path of the layer of a weight in the checkpoint, packed or not."""
    return weight.removesuffix(".weight").removesuffix(".weight_packed")


def the_scale(path: str, known: Collection[str]) -> str | None:
    """The name of the scales of a weight among those of a checkpoint.

    Raises:
        FalqonError: it has several.
    """
    found = [name for end in SCALES if (name := path + end) in known]
    if len(found) > 1:
        raise FalqonError(path, f"it has scales as {' and as '.join(found)}", "Remove all but one")
    return found[0] if found else None


def scales_of_cache(names: Iterable[str], directory: Path) -> set[str]:
    """The scales of a cache among the tensors of a quantized checkpoint, which are left out, with
    a warning.
    """
    found = {name for name in names if name.endswith(OF_CACHE)}
    if found:
        warnings.warn(
            f"falqon: {one_line(str(directory))} holds {len(found)} scales of an FP8 cache of keys "
            "and values: training has none, and they are left out. A server that wants them needs "
            "them again.",
            stacklevel=4,
        )
    return found


def tensors_of(layer: LinearLayer | StackLayer, named: Mapping[str, str]) -> tuple[str, ...]:
    """The names of its weights in the checkpoint; a stack may have many."""
    if isinstance(layer, StackLayer):
        return tuple(part.name for part in layer.parts)
    return (named[tensor_of(layer)],)


def units_of(
    layers: Mapping[str, LinearLayer | StackLayer],
    named: Mapping[str, str],
    source: Path,
    index: Mapping[str, str],
    settings: Mapping[str, Any],
    nvfp4: Mapping[str, Names],
    dtype: torch.dtype,
) -> list[Unit]:
    """The files to write, the largest first. By the ``settings`` of their quantization FP8 weights
    with one scale per block, INT8 ones with one per row and those in ``nvfp4`` count as dense ones
    of ``dtype``; those of layers that are not cast become that.
    """
    given = read_entries(source, index), blocks.block_size(settings, source), nvfp4
    known = _Headers(*given, dtype_name(dtype), blocks.has_mxfp4(settings))
    zero_points = [name for name in index if name.endswith(ZERO_POINT)]
    refuse_zero_points((name, read_tensor(source / index[name], name)) for name in zero_points)
    units = [known.cast(i, p, layer, named) for i, (p, layer) in enumerate(layers.items())]
    if not units:
        raise FalqonError(str(source), "none of its layers is to be cast", "Check the LoraConfig")
    used = {name for unit in units for name in unit.tensors}.union(zero_points)
    for name in index:
        if name not in used and not name.endswith(OF_INPUT) and known.form(name) is not None:
            units.append(known.decoded(len(units), name))
            used |= {*units[-1].tensors}
    scaled = [w for unit in units if unit.block is not None for w in unit.tensors]
    used |= {w.removesuffix(".weight") + end for w in scaled for end in OF_INPUT}
    used |= {path + end for path in nvfp4 for end in OF_X}
    if scaled or nvfp4:
        used |= scales_of_cache(index, source)
    rest = [name for name in index if name not in used]
    small = tuple(name for name in rest if known.bytes(name) < _SMALL)
    alone = [(name,) for name in rest if known.bytes(name) >= _SMALL]
    for names in [*alone, small] if small else alone:
        file = file_of(len(units), "small" if names is small else names[0])
        units.append(Unit(file, names, None, known.bytes(*names)))
    # The largest first, so that workers end together.
    return sorted(units, key=lambda unit: -unit.bytes)


@dataclass(frozen=True)
class _Headers:
    """What the headers of a checkpoint's files say of its weights."""

    entries: Mapping[str, Any]
    block: tuple[int, int] | None
    nvfp4: Mapping[str, Names]
    dtype: str  # of the model
    mxfp4: bool  # whether what is stored as int8 is that

    def bytes(self, *names: str) -> int:
        ends = (self.entries[name]["data_offsets"] for name in names)
        return sum(int(end - first) for first, end in ends)

    def form(self, name: str) -> str | None:
        """The form of a weight that was cast already."""
        path = path_of(name)
        if path in self.nvfp4 and self.nvfp4[path].codes == name:
            return "NVFP4"
        return _CAST.get(self.entries[name]["dtype"])

    def cast(
        self, number: int, path: str, layer: LinearLayer | StackLayer, named: Mapping[str, str]
    ) -> Unit:
        """A layer that is cast, or cast again.

        Raises:
            FalqonError: it was cast in a way that isn't read here.
        """
        weights = tensors_of(layer, named)
        file = file_of(number, layer.site)
        if isinstance(layer, LinearLayer):
            self._check_shape(layer, weights[0])
        packed = [self.nvfp4[p] for w in weights if (p := w.removesuffix(".weight")) in self.nvfp4]
        if packed and isinstance(layer, StackLayer):
            problem = "it is a stack of experts, which the checkpoint has in NVFP4"
            remedy = "Call falqon_fx.load on it, or give the dense one"
            raise FalqonError(layer.site, problem, remedy)
        if packed:
            return self._packed(file, path, packed[0])
        whole = layer.scale if isinstance(layer, StackLayer) else None
        if (unit := self._scaled(file, path, weights, whole)) is not None:
            return unit
        found = {self.entries[name]["dtype"] for name in weights}
        if len(found) > 1 or not found <= FLOATS.keys():
            raise _refused(layer.site, " and ".join(sorted(found)))
        return Unit(file, weights, path, self.bytes(*weights), FLOATS[found.pop()])

    def decoded(self, number: int, name: str) -> Unit:
        """A weight that was cast already, of a layer that is not.

        Raises:
            FalqonError: it was cast in a way that isn't read here.
        """
        file, path = file_of(number, name), path_of(name)
        if path in self.nvfp4:
            return self._packed(file, None, self.nvfp4[path])
        if (unit := self._scaled(file, None, (name,), None)) is None:
            raise _refused(name, self.entries[name]["dtype"])
        return unit

    def _packed(self, file: str, path: str | None, names: Names) -> Unit:
        return Unit(file, names.all, path, self.bytes(*names.all), self.dtype, nvfp4=names)

    def _scaled(
        self, file: str, path: str | None, weights: tuple[str, ...], whole: str | None
    ) -> Unit | None:
        """Weights in FP8 with a scale per block, or in INT8; the scales of a stack may be one
        tensor.
        """
        scales = tuple(s for name in weights if (s := self._block_scale(name)))
        in_blocks = self.block is not None and self.form(weights[0]) == "FP8"
        if not scales and in_blocks and whole is not None and whole in self.entries:
            scales = (whole,)
        elif len(scales) < len(weights) or len(self.entries[weights[0]]["shape"]) != 2:
            return None
        block, entry = self.block, self.entries[weights[0]]
        in_four = entry["dtype"] == "I8" and self.mxfp4
        if entry["dtype"] == "I8":
            rows, columns = entry["shape"]
            whole_scale = math.prod(self.entries[scales[0]]["shape"]) == 1
            block = blocks.MXFP4 if in_four else (rows if whole_scale else 1, columns)
        size = self.bytes(*weights, *scales)
        return Unit(file, weights + scales, path, size, self.dtype, block, mxfp4=in_four)

    def _block_scale(self, weight: str) -> str | None:
        """The name of the scales of an FP8 weight that has one per block, or of an INT8 one."""
        entry = self.entries[weight]
        if entry["dtype"] not in _CAST:
            return None
        scale = the_scale(weight.removesuffix(".weight"), self.entries)
        if scale is None or entry["dtype"] == "I8":
            return scale
        if self.block is None:
            return None
        given, (rows, *_, columns) = self.entries[scale]["shape"], entry["shape"]
        whole = math.prod(given) == 1 and (rows > self.block[0] or columns > self.block[1])
        return None if whole or given in ([rows, 1], [rows]) else scale

    def _check_shape(self, layer: LinearLayer, weight: str) -> None:
        """Compare a weight's shape in the checkpoint with that in the model.

        Raises:
            FalqonError: they differ.
        """
        names = self.nvfp4.get(weight.removesuffix(".weight"))
        entry = self.entries[weight if names is None else names.codes]
        packed = names is not None or (self.mxfp4 and entry["dtype"] == "I8")
        found, wanted = [*entry["shape"]], [*layer.module.weight.shape]
        found[-1:] = [n * (1 + packed) for n in found[-1:]]
        if found != wanted:
            problem = f"its weight is {found}, by config.json {wanted}"
            raise FalqonError(layer.site, problem, "Fetch the folder again")


def _refused(site: str, form: str) -> FalqonError:
    """What to raise of a weight that is neither dense nor decoded here. One in FP8 has a scale per
    row or one for all of it: all others `check_headers` refuses.
    """
    if form == "F8_E4M3":
        problem = "its weight is FP8 already, with a scale per row or one for all of it"
        return FalqonError(site, problem, "falqon_fx.load takes it as it is")
    problem = f"its weight is {form}"
    return FalqonError(site, problem, "Take a checkpoint that is dense, FP8, INT8 or NVFP4")


def refuse_zero_points(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Look at the zero points among named tensors.

    Raises:
        FalqonError: some are not zero.
    """
    for name, tensor in tensors:
        if name.endswith(ZERO_POINT) and tensor.any():
            raise FalqonError(
                name.removesuffix(ZERO_POINT),
                "it has zero points that are not zero, and W is multiplied by scales alone",
                "Take a symmetric checkpoint, or a dense one",
            )


def file_of(number: int, name: str) -> str:
    """A file for what a checkpoint calls ``name``: anything, a path out of the folder as well."""
    return f"weights/{number:05}.{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[-100:]}.safetensors"
