"""`SiteSpec`: the plan of a site as one string, carried by the ops in the graph.

The string makes a graph readable and keys the disk caches of Inductor and AOTAutograd: they hash
the graph, not our lowering of it, so the version of the lowering stands in the string.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from falqon_fx.config import FalqonConfig
from falqon_fx.numerics import E4M3, E5M2, ScaleMode


@functools.cache
def lowering_version() -> str:
    """Hash of the sources that decide what a ``falqon::`` op is lowered to."""
    digest = hashlib.sha256()
    for name in (
        "numerics",
        "spec",
        "lowering",
        "update",
        "ops",
        "cuda",
        "products",
        "passes.recompute_weights",
    ):
        spec = importlib.util.find_spec(f"falqon_fx.{name}")
        assert spec is not None
        digest.update(Path(str(spec.origin)).read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class SiteSpec:
    """What the ops of a site need to know beyond their tensors."""

    granularity: str
    scale: ScaleMode
    pending: str
    grad: str
    topk: str
    rounding: str
    seed: int
    kernel: str = "auto"
    accumulation: str = "fast"
    transpose: str = "auto"
    output: str = "own"  # O's memory: "own", or "strided", a view of [O | O_A]

    @classmethod
    def from_config(cls, config: FalqonConfig) -> SiteSpec:
        autotunes = config.kernel == "auto" and (config.mode or "").startswith("max-autotune")
        kernel = "max-autotune" if autotunes else config.kernel
        return cls(
            config.granularity,
            config.scale,
            config.pending,
            config.grad_dtype,
            repr(config.topk).strip("'"),
            config.rounding,
            config.seed,
            kernel,
            config.accumulation,
            config.transpose,
        )

    @property
    def grad_dtype(self) -> torch.dtype:
        return {"e5m2": E5M2, "e4m3": E4M3}[self.grad]

    @property
    def per_row(self) -> bool:
        return self.granularity == "row"

    def rows(self, out: int) -> int:
        """Rows written per step (see `FalqonConfig.rows`)."""
        value = self.topk
        if value in ("all", "None"):
            topk: Any = None if value == "None" else value
        else:
            topk = int(value) if value.isdigit() else float(value)
        return FalqonConfig(topk=topk).rows(out)

    def __str__(self) -> str:
        return (
            f"{self.granularity} {self.scale} {self.pending} {self.grad} topk={self.topk} "
            f"{self.rounding} seed={self.seed} {self.kernel} {self.accumulation} {self.transpose} "
            f"{self.output} #{lowering_version()}"
        )


@functools.lru_cache(maxsize=1024)
def parse_spec(text: str) -> SiteSpec:
    """The inverse of ``str(spec)``."""
    granularity, scale, pending, grad, topk, rounding, seed, *kernels, _ = text.split(" ")
    return SiteSpec(
        granularity,
        "pow2" if scale == "pow2" else "amax",
        pending,
        grad,
        topk.removeprefix("topk="),
        rounding,
        int(seed.removeprefix("seed=")),
        *kernels,
    )
