"""`SiteSpec`: the options of a site's arithmetic, which the ops in the graph carry as one string.

The string makes a graph readable and keys the disk caches of Inductor and AOTAutograd: they hash
the graph, not our lowering of it, so the version of the lowering stands in the string.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from falqon_fx._compat import native_bf16
from falqon_fx.config import (
    Accumulation,
    AdapterForm,
    BaseDtype,
    FalqonConfig,
    GradDtype,
    Granularity,
    Kernel,
    Pending,
    Rounding,
    Scale,
    Transpose,
    check_literals,
    literals,
)
from falqon_fx.site.numerics import FP8_DTYPES, OPERANDS

Choosing = Literal[Kernel, "max-autotune"]  # what chooses the kernel of a product

# What decides what an op computes, or what stands in a compiled graph: folders and files of the
# package. AOTAutograd's disk cache sees the ops, and not the kernels that they are opened into.
_LOWERING = (
    "site",
    "ops",
    "rows",
    "kernels",
    "_compat",
    "passes.recompute_weights",
    "passes.add_in_place",
)


@functools.cache
def lowering_version() -> str:
    """Hash of the sources that decide what a ``falqon::`` op is lowered to, and of the dtype that
    this CPU multiplies.
    """
    digest = hashlib.sha256(str(native_bf16()).encode())
    for name in _LOWERING:
        spec = importlib.util.find_spec(f"falqon_fx.{name}")
        assert spec is not None
        folders = [Path(folder) for folder in spec.submodule_search_locations or []]
        inside = [file for folder in folders for file in sorted(folder.rglob("*"))]
        for file in inside if folders else [Path(str(spec.origin))]:
            if file.suffix in (".py", ".jinja", ".cpp"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class SiteSpec:
    """What the ops of a site need to know beyond their tensors."""

    granularity: Granularity
    scale: Scale
    grad: GradDtype
    adapter: AdapterForm = "bfloat16"
    kernel: Choosing = "auto"
    accumulation: Accumulation = "fast"
    transpose: Transpose = "auto"
    base: BaseDtype = "fp8"

    @classmethod
    def from_config(cls, config: FalqonConfig) -> SiteSpec:
        autotunes = config.kernel == "auto" and (config.mode or "").startswith("max-autotune")
        kernel: Choosing = "max-autotune" if autotunes else config.kernel
        assert config.scale is not None
        return SiteSpec(
            config.granularity,
            config.scale,
            config.grad_dtype,
            "fp8" if config.adapter_dtype == "fp8" else "bfloat16",
            kernel,
            config.accumulation,
            config.transpose,
            config.base_dtype,
        )

    @property
    def operand(self) -> torch.dtype:
        """What x and A are cast to, and W unless it is NVFP4."""
        return OPERANDS[self.base]

    @property
    def scales_inside(self) -> bool:
        """Whether a CPU multiplies operands that contain their scales: exactly, in any float."""
        return self.scale == "pow2" and self.base != "int8"

    @property
    def grad_dtype(self) -> torch.dtype:
        return FP8_DTYPES[self.grad]

    @property
    def base_per_row(self) -> bool:
        """Whether each row of W has a scale, which NVFP4 has for blocks and for all of it."""
        return self.per_row and self.base != "nvfp4"

    @property
    def per_row(self) -> bool:
        return self.granularity == "row"

    def __str__(self) -> str:
        return f"{self._site()} #{lowering_version()}"

    def _site(self) -> str:
        return (
            f"{self.granularity} {self.scale} {self.grad} {self.adapter} {self.kernel} "
            f"{self.accumulation} {self.transpose} {self.base}"
        )


@dataclass(frozen=True)
class RowsSpec(SiteSpec):
    """The same with what ``falqon::proxy_update_`` of update="rows" needs."""

    pending: Pending = "apply"
    topk: str = "None"
    rounding: Rounding = "stochastic"
    seed: int = 0

    @classmethod
    def from_config(cls, config: FalqonConfig) -> RowsSpec:
        assert config.pending is not None
        assert config.rounding is not None
        return cls(
            **vars(SiteSpec.from_config(config)),
            pending=config.pending,
            topk=repr(config.topk).strip("'"),
            rounding=config.rounding,
            seed=config.seed,
        )

    @property
    def site(self) -> SiteSpec:
        """The part that the products need."""
        return SiteSpec(**{f.name: getattr(self, f.name) for f in fields(SiteSpec)})

    def rows(self, out: int) -> int:
        """Rows written per step (see `FalqonConfig.rows`)."""
        value = self.topk
        if value in ("all", "None"):
            topk: Any = None if value == "None" else value
        else:
            topk = int(value) if value.isdigit() else float(value)
        return FalqonConfig(update="rows", topk=topk).rows(out)

    def __str__(self) -> str:
        return (
            f"{self._site()} {self.pending} topk={self.topk} {self.rounding} seed={self.seed} "
            f"#{lowering_version()}"
        )


_FIELDS = {kind: tuple(f.name for f in fields(kind)) for kind in (SiteSpec, RowsSpec)}
_VALUES = {kind: literals(kind) for kind in (SiteSpec, RowsSpec)}


@functools.lru_cache(maxsize=1024)
def parse_spec(text: str) -> SiteSpec:
    """The inverse of ``str(spec)``.

    Raises:
        ValueError: a text that no spec has.
    """
    *values, _ = [word.rpartition("=")[2] for word in text.split(" ")]
    kind = RowsSpec if "topk=" in text else SiteSpec
    if len(values) == len(_FIELDS[kind]) - 1:  # of before there was a choice of the base's dtype
        values.insert(_FIELDS[kind].index("base"), "fp8")
    given: dict[str, Any] = dict(zip(_FIELDS[kind], values, strict=True))
    check_literals(given, _VALUES[kind])
    if kind is RowsSpec:
        given["seed"] = int(given["seed"])
    return kind(**given)


def parse_rows_spec(text: str) -> RowsSpec:
    """The inverse of ``str(spec)`` for a `RowsSpec`."""
    spec = parse_spec(text)
    assert isinstance(spec, RowsSpec)
    return spec
