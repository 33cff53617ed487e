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
from falqon_fx.model.sorting import sort_layers
from falqon_fx.model.stacks import Fp8Stack, sort_stacks
from falqon_fx.passes.match.frozen import site_of
from falqon_fx.site.base import DIGEST_BYTES
from falqon_fx.site.forms import code_of, scale_shape
from falqon_fx.site.paths import stack_path, without_wrappers
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
    stacks = {id(stack.weight): stack for stack in sort_stacks(model, config)[0]}
    seen: set[int] = set()
    for name, module in model.named_modules():
        path, kind = _owner(without_wrappers(name))
        if isinstance(module, Fp8Stack):
            path = stack_path(f"{name}.code", prepared=True)
        for part, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, Fp8Linear) and part in _STATE:
                shape = tuple(parameter.shape)
                yield Piece(path, _STATE[part], shape, parameter.dtype, when="after")
                if part == "code":
                    yield Piece(path, "base", _shape_before(module), module.dtype, when="before")
            elif id(module) in casts and part == "weight":
                yield from _as_cast(path, parameter, casts[id(module)].transposed, config)
            elif id(parameter) in stacks:
                stack = stacks[id(parameter)]
                yield from _as_cast(stack.site, parameter, stack.transposed, config)
            else:
                of_layer = isinstance(module, Fp8Linear) or id(module) in casts
                what: Kind = "bias" if of_layer and part == "bias" else kind
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
    """What `prepare` makes of a weight [..., out, in], and the weight."""
    *experts, out, features = weight.shape
    rows = math.prod(experts) * (features if transposed else out)
    spec = SiteSpec.from_config(config)
    shape, code = code_of(rows, out if transposed else features, spec)
    yield Piece(path, "base", shape, code, when="after")
    yield Piece(path, "scales", scale_shape(rows, spec) or (1,), torch.int32, when="after")
    yield Piece(path, "digest", (DIGEST_BYTES,), torch.uint8, when="after")
    yield Piece(path, "base", tuple(weight.shape), weight.dtype, when="before")


def _shape_before(layer: Fp8Linear) -> tuple[int, ...]:
    """That of the weight that a prepared layer, or stack of experts, was made of."""
    experts = (layer.experts,) if isinstance(layer, Fp8Stack) else ()
    out, features = layer.out_features // math.prod(experts), layer.in_features
    return (*experts, features, out) if layer.transposed else (*experts, out, features)
