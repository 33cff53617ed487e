"""NVFP4 checkpoints of others: which weights are NVFP4, and what their tensors mean.

compressed-tensors (``nvfp4-pack-quantized``) and ModelOpt (``hf_quant_config.json``, or the same in
config.json) keep codes, block scales and the scale of all of W apart, under names of their own
(`falqon_fx.site.nvfp4`). How activations were to be cast is left out: x is cast here by its own
largest values.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonConfigError, FalqonError, one_line
from falqon_fx.files import storage
from falqon_fx.files.blocks import STRIP, Moved, groups_of_weights
from falqon_fx.files.hf import quantization_config
from falqon_fx.files.site_checks import described
from falqon_fx.site import nvfp4
from falqon_fx.site.base import Base, cast_base, check_base, check_scale, check_weight
from falqon_fx.site.numerics import E4M3, powers_of_two
from falqon_fx.site.spec import SiteSpec

MODELOPT = "hf_quant_config.json"
# Of the same weights; what they say of x doesn't matter here.
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8")
_CHECK = "Check the checkpoint"
_MIXED = "Take a checkpoint in one form, or a dense one"
_CAST = (torch.uint8, torch.int8, E4M3)
# Of activations, which are cast by their own largest values.
OF_X = (".input_scale", ".input_global_scale")


@dataclass(frozen=True)
class Names:
    """The tensors of a weight: codes, block scales and the scale of all of it, which is 1 / s where
    ``divides``.
    """

    codes: str
    blocks: str
    whole: str
    divides: bool

    @property
    def all(self) -> tuple[str, str, str]:
        return self.codes, self.blocks, self.whole


def quantization_of(directory: Path) -> Mapping[str, Any]:
    """The ``quantization_config`` of config.json, or else what ModelOpt has written beside it.

    Raises:
        FalqonError: one with transforms of activations (SpinQuant, QuIP).
    """
    settings = quantization_config(directory)
    _refuse_transforms(settings, directory)
    if settings or not (directory / MODELOPT).is_file():
        return settings
    content = storage.read_json(directory / MODELOPT)
    storage.check_form(directory / MODELOPT, content, "modelopt")
    return {"quant_method": "modelopt", **content["quantization"]}


def _refuse_transforms(settings: Mapping[str, Any], directory: Path) -> None:
    """Transforms of weights are in them; those of activations undo them as the model runs."""
    transforms = settings.get("transform_config") or {}
    for name, scheme in (transforms.get("config_groups") or {}).items():
        places = {str(each.get("location")) for each in scheme.get("apply") or ()}
        if online := sorted(places - {"weight_input", "weight_output"}):
            problem = (
                f"its weights are made for a transform of activations ({one_line(name)}: "
                f"{', '.join(online)}), by its config.json, and x is multiplied as it is here"
            )
            raise FalqonError(str(directory), problem, "Take a checkpoint without, or a dense one")


def is_nvfp4(settings: Mapping[str, Any], directory: Path) -> bool:
    """Whether a ``quantization_config`` is that of NVFP4 weights.

    Raises:
        FalqonError: another form of ModelOpt's, NVFP4 beside other forms, or blocks that are not of
            16 weights.
    """
    groups = groups_of_weights(settings)
    sizes = {group.get("group_size") for group in groups}
    if settings.get("quant_method") == "modelopt":
        algorithm = settings.get("quant_algo")
        if algorithm not in _ALGORITHMS:
            problem = f"ModelOpt has written {algorithm} weights"
            known = " and ".join(_ALGORITHMS[:2])
            raise FalqonError(str(directory), problem, f"{known} can be trained on as they are")
        sizes |= {settings.get("group_size", 16)}
    else:
        four = [_is_of_nvfp4(group) for group in groups]
        if not any(four):
            return False
        if not all(four):
            problem = "some of its weights are NVFP4 and others are not, by its config.json"
            raise FalqonError(str(directory), problem, _MIXED)
    if sizes - {16}:
        found = sorted(map(str, sizes - {16}))
        problem = f"its weights have blocks of {', '.join(found)}, and NVFP4 has blocks of 16"
        raise FalqonError(str(directory), problem, _CHECK)
    return True


def _is_of_nvfp4(weights: Mapping[str, Any]) -> bool:
    """Whether a group of compressed-tensors says that its weights are NVFP4."""
    form = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    return form == (4, "float", "tensor_group")


def names_of(entries: Iterable[str], directory: Path) -> dict[str, Names]:
    """The NVFP4 weights among the names of tensors, by the paths of their layers.

    Raises:
        FalqonError: one that lacks a scale, or that has two forms.
    """
    known = set(entries)
    found: dict[str, Names] = {}
    ends = {
        ".weight_packed": (".weight_global_scale", True),
        ".weight": (".weight_scale_2", False),
    }
    for end, (of_whole, divides) in ends.items():
        others = {of_whole for of_whole, _ in ends.values()} - {of_whole}
        for name in sorted(known):
            path = name.removesuffix(end)
            names = Names(name, f"{path}.weight_scale", path + of_whole, divides)
            has = [scale in known for scale in names.all[1:]]
            if path == name or (end == ".weight" and not any(has)):
                continue  # another tensor, or a dense weight
            if path in found or any(path + other in known for other in others):
                raise FalqonError(path, f"{directory} has it in two forms", _CHECK)
            for there, scale in zip(has, names.all[1:], strict=True):
                if not there:
                    raise FalqonError(path, f"{directory} lacks its {scale}", _CHECK)
            found[path] = names
    return found


def check_alone(tensors: Mapping[str, Tensor], names: Mapping[str, Names], directory: Path) -> None:
    """Refuse weights in another form beside those in NVFP4, or none at all.

    Raises:
        FalqonError: there are such.
    """
    if not names:
        problem = "it is NVFP4 by its config, and holds no such weight"
        raise FalqonError(str(directory), problem, _CHECK)
    own = taken(names)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and name not in own and tensor.dtype in _CAST:
            problem = f"{directory} has {described(tensor)} there, and NVFP4 elsewhere"
            raise FalqonError(name, problem, _MIXED)


def check_sizes(path: str, names: Names, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Look at dtypes and shapes of a weight's tensors, which may be on the meta device.

    Raises:
        FalqonError: they are others.
    """
    codes, blocks, whole = (tensors[name] for name in names.all)
    right = codes.dtype == torch.uint8 and codes.dim() == 2 and blocks.dtype == E4M3
    right = right and whole.dtype == torch.float32 and whole.numel() == 1
    if not right or codes.shape != (len(blocks), 8 * blocks.shape[-1]) or blocks.dim() != 2:
        problem = (
            f"{directory} has {described(codes)}, {described(blocks)} and {described(whole)} as "
            "its codes, block scales and scale: two codes are a byte, and 16 have a scale"
        )
        raise FalqonError(path, problem, _CHECK)


def whole_scale(path: str, names: Names, given: Tensor, directory: Path) -> Tensor:
    """s, float32 [], of the tensor ``names.whole``.

    Raises:
        FalqonError: it is NaN, Inf, zero or negative, or so small that 1 / s is Inf.
    """
    check_scale(path, given, str(directory))
    scale = given.reshape(())
    if names.divides and not (1 / scale).isfinite():
        problem = f"the weights of {directory} are to be divided by {float(scale)}, which gives Inf"
        raise FalqonError(path, problem, _CHECK)
    return 1 / scale if names.divides else scale


def base_of(path: str, names: Names, tensors: Mapping[str, Tensor], directory: Path) -> Base:
    """The base weight of an NVFP4 weight: its own bytes, and s.

    Raises:
        FalqonError: as `check_sizes` and `whole_scale`; block scales that are NaN or negative.
    """
    check_sizes(path, names, tensors, directory)
    codes, blocks, whole = (tensors[name] for name in names.all)
    packed = nvfp4.joined(codes, blocks.view(torch.uint8))
    base = Base(packed, whole_scale(path, names, whole, directory))
    check_base(path, base, str(directory))
    return base


def taken(names: Mapping[str, Names]) -> set[str]:
    """The tensors of some weights, and those of what they are multiplied with."""
    of_weights = {name for each in names.values() for name in each.all}
    return of_weights | {path + end for path in names for end in OF_X}


def cast_again(path: str, base: Base, spec: SiteSpec) -> tuple[Base, Moved]:
    """W in FP8, and by how much it moved. Decoded a strip of rows at a time.

    Raises:
        FalqonError: a weight that lies beyond the scales in use.
    """
    parts, moved = [], []
    rows = max(1, STRIP // max(1, base.code[0].numel() * 2))
    for code in base.code.split(rows):
        dense = nvfp4.decode(code, base.scale, torch.float32)
        check_weight(path, dense)
        parts.append(cast_base(dense, spec))
        moved.append(Moved.of(dense, parts[-1].dequantize()))
    again = Base(torch.cat([p.code for p in parts]), torch.cat([p.scale for p in parts]))
    return again, Moved.total(moved)


def as_published(config: FalqonConfig, scales: Iterable[Tensor]) -> FalqonConfig:
    """The config that keeps NVFP4 weights with these scales of all of W as they are."""
    if config.init == "svd":
        raise FalqonConfigError(
            "init",
            "'svd' starts from the error of a cast, and NVFP4 weights are kept as they are",
            'Set init="keep"',
        )
    return config if all(map(powers_of_two, scales)) else replace(config, scale="amax")


def warn_of_a_second_cast(
    directory: Path, base_dtype: str, count: int, moved: Moved | None = None
) -> None:
    """Say what it costs to hold NVFP4 weights in eight bits."""
    cost = "which moves them once more"
    if moved is not None:
        cost = f"which moved them by {moved.relative:.2%}"
    warnings.warn(
        f"falqon: {one_line(str(directory))} has {count} weights in NVFP4, and base_dtype="
        f'"{base_dtype}" casts them again, {cost} (Frobenius norm; the cast that was published '
        "moved them by some 9.5%, one to FP8 by row moves weights by 2.6%) and takes 1.8 times "
        'the memory. base_dtype="nvfp4" keeps them.',
        stacklevel=4,
    )
