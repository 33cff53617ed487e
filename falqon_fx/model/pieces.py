"""The parameters of a model as `prepare` leaves them, by layer: what several processes share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.prepare import sort_layers
from falqon_fx.passes.match.frozen import site_of
from falqon_fx.site.base import DIGEST_BYTES
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.spec import SiteSpec

Kind = Literal["base", "scales", "digest", "a", "b", "bias", "rest"]
_STATE: dict[str, Kind] = {"code": "base", "scale": "scales", "digest": "digest"}


@dataclass(frozen=True)
class Piece:
    """A parameter; ``when``: "before" `prepare`, "after" it, or "" for both."""

    path: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool = False
    when: Literal["before", "after", ""] = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes(self, dtype: torch.dtype | None = None) -> int:
        """Its size, as a float in ``dtype``."""
        cast = dtype is not None and self.dtype.is_floating_point
        return self.numel * (dtype if cast and dtype else self.dtype).itemsize

    def cut(self, dimension: int, parts: int) -> Piece:
        """The largest of its parts."""
        sizes = [*self.shape]
        sizes[dimension] = -(-sizes[dimension] // parts)
        return replace(self, shape=tuple(sizes))


def pieces(model: nn.Module, config: FalqonConfig) -> Iterator[Piece]:
    """Every parameter once."""
    casts = {id(layer.module): layer for layer in sort_layers(model, config)[0]}
    seen: set[int] = set()
    for name, module in model.named_modules():
        path, kind = _owner(without_wrappers(name))
        prepared = module if isinstance(module, Fp8Linear) else None
        for part, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if prepared is not None and part in _STATE:
                yield Piece(
                    path, _STATE[part], tuple(parameter.shape), parameter.dtype, when="after"
                )
                if part == "code":
                    shape = (prepared.out_features, prepared.in_features)
                    yield _as_it_was(path, shape, prepared.dtype, prepared.transposed)
            elif id(module) in casts and part == "weight":
                yield from _as_cast(path, parameter, casts[id(module)].transposed, config)
            else:
                of_layer = part == "bias" and (prepared is not None or id(module) in casts)
                what: Kind = "bias" if of_layer else kind
                shape = tuple(parameter.shape)
                yield Piece(path, what, shape, parameter.dtype, parameter.requires_grad)


def _owner(path: str) -> tuple[str, Kind]:
    """The layer that a module is a part of, and which."""
    names = path.split(".")
    halves: dict[str, Kind] = {"lora_A": "a", "lora_B": "b"}
    for name, kind in halves.items():
        if name in names:
            return ".".join(names[: names.index(name)]), kind
    return site_of(path), "rest"


def _as_cast(path: str, weight: Tensor, transposed: bool, config: FalqonConfig) -> Iterator[Piece]:
    """What `prepare` makes of a weight, and the weight."""
    shape = tuple(weight.shape[::-1] if transposed else weight.shape)
    scales = (shape[0], 1) if SiteSpec.from_config(config).per_row else (1,)
    yield Piece(path, "base", shape, torch.uint8, when="after")
    yield Piece(path, "scales", scales, torch.int32, when="after")
    yield Piece(path, "digest", (DIGEST_BYTES,), torch.uint8, when="after")
    yield _as_it_was(path, shape, weight.dtype, transposed)


def _as_it_was(path: str, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> Piece:
    return Piece(path, "base", shape[::-1] if transposed else shape, dtype, when="before")
