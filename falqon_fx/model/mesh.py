"""`MeshPlan`: processes in a mesh, and how a model is to be spread over them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.blocks import repeated_blocks
from falqon_fx.site.agreement import check_options

# The names that torchtitan, accelerate and torch's tutorials give the dimensions of a mesh.
AXES = {
    "ddp": ("ddp", "dp_replicate", "replicate"),
    "fsdp": ("fsdp", "dp_shard", "shard", "dp"),
    "tp": ("tp",),
}


@dataclass(frozen=True)
class MeshPlan:
    """Processes in a mesh, and what FSDP2 and tensor parallelism are to make of a model on it: for
    ``falqon_fx.explain(model, ..., mesh=MeshPlan(fsdp=8, tp=2))``. Nothing is started.

    Args:
        ddp: copies of the model; with ``fsdp`` copies of its shards (HSDP).
        fsdp: processes that share a copy by shards.
        tp: processes that share each layer. They are neighbours; ``ddp`` is the outermost axis.
        units: patterns of the modules that get ``fully_shard`` of their own, beside the model
            itself, such as "layers.*". By default the repeated blocks, as
            `falqon_fx.compile_blocks` finds them.
        reshard_after_forward: as ``fully_shard`` of the units has it; the model itself keeps what
            it has gathered until backward, as is torch's default.
        param_dtype: of ``MixedPrecisionPolicy``.
        reduce_dtype: of ``MixedPrecisionPolicy``.
        tp_plan: "colwise" or "rowwise" by the pattern of a layer's path, whose end is enough. By
            default that of the model's own config (``base_model_tp_plan`` of transformers).
        per_machine: GPUs that a machine's own links connect.
    """

    ddp: int = 1
    fsdp: int = 1
    tp: int = 1
    units: Sequence[str] | None = None
    reshard_after_forward: bool = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    tp_plan: Mapping[str, str] | None = None
    per_machine: int = 8

    def __post_init__(self) -> None:
        for name in (*AXES, "per_machine"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise FalqonError(
                    f"mesh {name}={value!r}", "is no number of processes", "Give 1, 2, …"
                )

    @classmethod
    def of(cls, mesh: Any) -> MeshPlan:
        """What ``mesh`` says: a plan, a DeviceMesh, or sizes by the names of its dimensions.

        Raises:
            FalqonError: a name that says nothing.
        """
        if isinstance(mesh, MeshPlan):
            return mesh
        sizes = dict(mesh) if isinstance(mesh, Mapping) else _sizes(mesh)
        named = {name: axis for axis, names in AXES.items() for name in names}
        plan = {field.name for field in fields(cls)} - {*AXES}
        given: dict[str, Any] = {}
        for name, size in sizes.items():
            key = named.get(name, name)
            if key not in {*AXES, *plan} or key in given:
                known = "; ".join(
                    f"{axis} ({', '.join(names[1:])})" for axis, names in AXES.items()
                )
                problem = "there is another of that kind" if key in given else "it says nothing"
                raise FalqonError(f"mesh dimension {name!r}", problem, f"Known are {known}")
            given[key] = size
        return cls(**given)

    @property
    def axes(self) -> dict[str, int]:
        """Processes by axis, the outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def ranks(self) -> int:
        return math.prod(self.axes.values())

    def within(self, axis: str) -> bool:
        """Whether the processes of an axis are in one machine."""
        inner = [
            size for name, size in self.axes.items() if [*AXES].index(name) >= [*AXES].index(axis)
        ]
        return math.prod(inner) <= self.per_machine

    def check(self, config: FalqonConfig) -> None:
        """Refuse the options with which training on such a mesh would be an error.

        Raises:
            FalqonError: names the option.
        """
        if config.update == "rows":
            problem = 'with update="rows" each process writes into whole FP8 weights'
            raise FalqonError("mesh", problem, 'Use update="adapter", or explain one process')
        if self.fsdp > 1 and config.transpose == "store":
            problem = (
                'transpose="store" would keep FP8 weights, which FSDP shards, whole beside them'
            )
            raise FalqonError("mesh", problem, 'Set transpose="auto"')
        if self.tp > 1:
            check_options("mesh", config)

    def units_of(self, model: nn.Module) -> list[str]:
        """The paths of the modules that FSDP gathers one by one, without the model itself.

        Raises:
            FalqonError: a pattern that no module has.
        """
        if self.fsdp == 1:
            return []
        if self.units is None:
            return [path for path, _ in repeated_blocks(model)]
        found: list[str] = []
        paths = [path for path, _ in model.named_modules() if path]
        for pattern in self.units:
            fits = [path for path in paths if _fits(path, pattern)]
            if not fits:
                raise FalqonError(
                    f"mesh units {pattern!r}",
                    "no module has such a path",
                    "See model.named_modules()",
                )
            found += fits
        return found

    def ways(self, model: nn.Module) -> Mapping[str, str]:
        """How tensor parallelism cuts what: "colwise" or "rowwise" by pattern.

        Raises:
            FalqonError: nobody says how.
        """
        if self.tp == 1:
            return {}
        if self.tp_plan is not None:
            return self.tp_plan
        for module in model.modules():
            plan = getattr(vars(module).get("config"), "base_model_tp_plan", None)
            if plan:
                return dict(plan)
        raise FalqonError(
            f"mesh tp={self.tp}",
            "the model has no plan of its own for tensor parallelism (base_model_tp_plan)",
            'Give MeshPlan(tp_plan={"*.q_proj": "colwise", "*.o_proj": "rowwise", ...})',
        )


def way(path: str, plan: Mapping[str, str]) -> str:
    """What a plan says of a layer, the first pattern that fits; "" where it says nothing."""
    return next((word for pattern, word in plan.items() if _fits(path, pattern)), "")


def _fits(path: str, pattern: str) -> bool:
    """Whether the end of a path is what a pattern means, name by name."""
    names, patterns = path.split("."), pattern.split(".")
    ends = zip(names[-len(patterns) :], patterns, strict=False)
    return len(names) >= len(patterns) and all(fnmatch.fnmatchcase(*pair) for pair in ends)


def _sizes(mesh: Any) -> dict[str, int]:
    """The sizes of a DeviceMesh by name; one dimension needs none."""
    shape = tuple(getattr(mesh, "shape", ()))
    names = getattr(mesh, "mesh_dim_names", None) or (("fsdp",) if len(shape) == 1 else ())
    if not names:
        remedy = 'Give falqon_fx.MeshPlan(fsdp=8), {"fsdp": 8} or a DeviceMesh with names'
        raise FalqonError("mesh", f"{mesh!r} is no mesh with names", remedy)
    return dict(zip(names, map(int, shape), strict=True))
