"""FP8 and INT8 checkpoints of others as base weights: their bytes and scales as they are. Scales
per block are made scales per row.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonConfigError, FalqonError, one_line
from falqon_fx.files import blocks, nvfp4_import, storage
from falqon_fx.files.decoded import check_finite
from falqon_fx.files.hf import (
    empty_model,
    fill,
    lora_config,
    read_entries,
    read_index,
    takes_decoded,
)
from falqon_fx.files.model_state import Site
from falqon_fx.files.nvfp4_import import is_nvfp4, quantization_of
from falqon_fx.files.public_names import without_left_out
from falqon_fx.files.published import used_by, weights_in
from falqon_fx.files.stack_files import Checkpoint
from falqon_fx.files.units import refuse_zero_points, scales_of_cache
from falqon_fx.model.lora_layers import lora_layers
from falqon_fx.site.base import Base, check_base, check_weight, digest
from falqon_fx.site.numerics import as_code, dtype_name, powers_of_two, scale_bits
from falqon_fx.site.spec import SiteSpec

_EXACT = 1e-3  # what becomes subnormal moves weights by less


def load_fp8(directory: Path, lora: Any = None, config: FalqonConfig | None = None) -> nn.Module:
    """A prepared PEFT model on the FP8 or INT8 weights of a compressed-tensors or fp8 checkpoint.

    Its scales, one per tensor or per row, stay what they are: granularity="row", and scale="amax"
    unless all are powers of two. INT8 weights make it base_dtype="int8". FP8 weights with one scale
    per block are cast again to one per row (`falqon_fx.files.blocks`), with a warning where that
    moves them. NVFP4 weights stay what they are, too, unless the config has base_dtype="fp8", which
    casts them again. Such layers without an adapter stay as they are too. Left out are static
    scales of activations, which are cast by their own largest value here, and with a warning those
    of a cache.

    Raises:
        FalqonError: no such checkpoint, one that is partly FP8 and partly INT8, scales that fit no
            block, zero points, experts in INT8 or NVFP4, or update="rows".
    """
    if config is not None and config.update == "rows":
        raise FalqonConfigError(
            "update",
            f"'rows' would write into the weights of {directory}, which are loaded as they are",
            "Set update='adapter'; or load the dense model, and call falqon_fx.prepare(model)",
        )
    if config is not None and config.init == "svd":
        raise FalqonConfigError(
            "init",
            f"'svd' starts from the error of a cast, and {directory} is cast already",
            "Set init='keep'; or call falqon_fx.prequantize on the dense model",
        )
    index, settings = read_index(directory), quantization_of(directory)
    model = empty_model(directory, lora_config(lora), len(index))
    tensors = _read(directory, without_left_out(model.get_base_model(), index))
    known = Checkpoint(model, tensors)
    tensors = known.scales_parted(tensors)
    modules: dict[str, Any] = dict(model.named_modules())

    def is_decoded(name: str) -> bool:
        path = known.layer(name)
        left = config is not None and not config.selects(path, f"{path}.base_layer")
        return takes_decoded(modules.get(path)) or (left and path in modules)

    take = _nvfp4 if is_nvfp4(settings, directory) else _eight_bits
    taken = take(tensors, settings, directory, config, is_decoded)
    bases, spec = taken.bases, SiteSpec.from_config(taken.config)
    for name, base in bases.items():
        _check_range(known.layer(name), base, directory)
    kind, dtype = spec.base, dtype_name(model.get_base_model().dtype)
    adapted = {layer.path for layer in lora_layers(model)}
    layers: dict[str, tuple[Site, Mapping[str, Tensor]]] = {}
    site: Site = {"dtype": dtype, "transposed": False, "spec": asdict(spec)}
    if kind != "fp8" and (stacks := known.stacks_of(bases)):
        problem = f"it is a stack of experts, which {directory} has in {kind.upper()}"
        raise FalqonError(stacks[0], problem, "Take an FP8 checkpoint, or a dense one")
    for path, experts, base in known.stacked(bases):
        layers[path] = ({**site, "experts": experts}, _tensors(base))
    for name, base in bases.items():
        path = known.layer(name)
        path = f"{path}.base_layer" if path in adapted else path
        if path in layers:
            raise FalqonError(name, f"{directory} has it twice, as {path}, too", "Remove one")
        layers[path] = (site, _tensors(base))
    of_cache = scales_of_cache(tensors, directory)
    rest = {n: t for n, t in tensors.items() if n not in taken.used | of_cache}
    for name, decode in taken.dense.items():
        weight = decode().to(model.get_base_model().dtype)
        rest[f"{name}.weight"] = check_finite(name, weight, directory)
    return fill(model, layers, known.placed(rest), str(directory))


@dataclass(frozen=True)
class _Taken:
    """The base weights by the paths of their layers, the config that they make, and the tensors
    used; and what decodes the weights of modules that are no linear layers, float32.
    """

    bases: dict[str, Base]
    config: FalqonConfig
    used: set[str]
    dense: dict[str, Callable[[], Tensor]]


_InBlocks = tuple[Tensor, Tensor, tuple[int, int]]  # codes, scales, block


def _eight_bits(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    directory: Path,
    config: FalqonConfig | None,
    is_decoded: Callable[[str], bool],
) -> _Taken:
    """FP8 and INT8 weights."""
    kind, weights = weights_in(tensors, settings, directory)
    refuse_zero_points(tensors.items())
    in_blocks: dict[str, _InBlocks] = {}
    of_rows: dict[str, Tensor] = {}
    for path, each in weights.items():
        code, scale = each.code, each.scale.to(torch.float32)
        if each.block is not None:
            blocks.check_blocks(path, code, scale, each.block, str(directory))
            if each.mxfp4 or not _alike(scale):
                in_blocks[path] = (code, scale, each.block)
                continue
            scale = scale.flatten()[:1]
        of_rows[path] = _row_scale(code, scale)
    config = config or FalqonConfig(base_dtype=kind)
    if config.base_dtype not in ("fp8", kind):  # "fp8" is what nobody has said
        raise FalqonConfigError(
            "base_dtype",
            f"{config.base_dtype!r} would be a second cast of {directory}, which is {kind.upper()}",
            f"Set base_dtype={kind!r}; or call falqon_fx.prequantize on the dense model",
        )
    config = replace(config, granularity="row", base_dtype=kind)
    if not all(map(powers_of_two, of_rows.values())):
        config = replace(config, scale="amax")
    bases = {path: Base(as_code(weights[path].code), scale) for path, scale in of_rows.items()}
    dense: dict[str, Callable[[], Tensor]] = {}
    for path in [path for path in bases if is_decoded(path)]:
        check_base(path, bases[path], str(directory))
        dense[path] = bases.pop(path).dequantize
    for path in [path for path in in_blocks if is_decoded(path)]:
        dense[path] = partial(blocks.dequantize, *in_blocks.pop(path))
    bases |= _cast_again(in_blocks, SiteSpec.from_config(config), directory)
    used = {name for path in weights for name in used_by(path)}
    return _Taken(bases, config, used, dense)


def _nvfp4(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    directory: Path,
    config: FalqonConfig | None,
    is_decoded: Callable[[str], bool],
) -> _Taken:
    """NVFP4 weights as they are, or cast again where the config says so."""
    names = nvfp4_import.names_of(tensors, directory)
    nvfp4_import.check_alone(tensors, names, directory)
    config = replace(config or FalqonConfig(base_dtype="nvfp4"), granularity="row")
    bases = {p: nvfp4_import.base_of(p, n, tensors, directory) for p, n in names.items()}
    used = nvfp4_import.taken(names)
    dense: dict[str, Callable[[], Tensor]] = {
        path: bases.pop(path).dequantize for path in [*bases] if is_decoded(path)
    }
    if config.base_dtype == "nvfp4":
        config = nvfp4_import.as_published(config, [base.scale for base in bases.values()])
        return _Taken(bases, config, used, dense)
    spec = SiteSpec.from_config(config)
    again = {p: nvfp4_import.cast_again(p, base, spec) for p, base in bases.items()}
    moved = blocks.Moved.total(part for _, part in again.values())
    nvfp4_import.warn_of_a_second_cast(directory, config.base_dtype, len(names), moved)
    return _Taken({p: base for p, (base, _) in again.items()}, config, used, dense)


def _tensors(base: Base) -> dict[str, Tensor]:
    """The tensors of a prepared layer."""
    own = {"code": base.code, "scale": scale_bits(base.scale)}
    return {**own, "digest": digest(base.code, base.scale)}


def _read(directory: Path, index: Mapping[str, str]) -> dict[str, Tensor]:
    """Each tensor from the file that the index says holds it."""
    names = defaultdict(list)
    for name in read_entries(directory, index):
        names[index[name]].append(name)
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file, own in names.items():
        with (
            storage.file_errors_explained(directory / file),
            safe_open(directory / file, framework="pt") as opened,
        ):
            tensors |= {name: opened.get_tensor(name) for name in own}
    return tensors


def _check_range(path: str, base: Base, directory: Path) -> None:
    """Refuse a weight that lies beyond the scales in use, as `prepare` does. A code is 6 · 448 at
    most, of NVFP4: only where scales are as large as none of a model are, weights are decoded.
    """
    if bool((base.scale >= 2.0**16 / 2688).any()):
        check_base(path, base, str(directory))
        check_weight(path, base.dequantize())


def _alike(scale: Tensor) -> bool:
    """Whether all are the same, so that one can be in their place."""
    return bool((scale == scale.flatten()[0]).all())


def _row_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """The scale of each row, float32 [out, 1]; there is one for all or one for each."""
    return scale.reshape(-1, 1).expand(weight.shape[0], 1).clone()


def _cast_again(given: Mapping[str, _InBlocks], spec: SiteSpec, directory: Path) -> dict[str, Base]:
    """The bases of weights with one scale per block; each given as codes, scales, block."""
    bases, moved = {}, []
    columns = (TextColumn("one scale per row"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, disable=not given, transient=True) as bar:
        for path, (weight, scale, size) in bar.track(given.items(), len(given)):
            bases[path], part = blocks.cast_again(path, weight, scale, size, spec)
            moved.append(part)
    change = blocks.Moved.total(moved).relative
    if change > _EXACT:
        warnings.warn(
            f"falqon: {one_line(str(directory))} has one FP8 scale per block in {len(given)} "
            "weights. W needs one per row here, so they were cast again, which moved them by "
            f"{change:.2%} (Frobenius norm; the cast that was published moved them by some 2.6%). "
            "Where a dense checkpoint is published too, falqon_fx.prequantize casts that once.",
            stacklevel=4,
        )
    return bases
