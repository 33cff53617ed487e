"""One site of a batch that is updated together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.errors import SiteError
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.site.record import COUNTERS
from falqon_fx.site.spec import RowsSpec


@dataclass(slots=True, eq=False)
class Batched:
    """The tensors of one site, in the order of `falqon_fx.rows.ops.proxy_update_`: W' as bytes."""

    index: int
    weight: Tensor
    scale: Tensor
    applied: Tensor
    counters: Tensor
    writes: Tensor
    lora_b: Tensor
    lora_a: Tensor
    base: Tensor | None
    scaling: float
    changed: Tensor | None = None

    def __post_init__(self) -> None:
        self.weight = self.weight.view(torch.uint8)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for sites that can be updated as one batch."""
        tensors = (self.weight, *self.tensors[1:], self.lora_a, self.base)
        each = (None if t is None else (t.shape, t.dtype) for t in tensors)
        return self.weight.device, *each

    @property
    def tensors(self) -> cpu.SiteTensors:
        """What `falqon_fx.kernels.cpu.native` needs, in its order."""
        state = (self.weight, self.scale, self.applied)
        return *state, self.lora_b, self.counters, self.writes, self.base

    def check(self, spec: RowsSpec) -> None:
        """Compiled code and kernels are about to be given addresses."""
        out, rank = self.lora_b.shape
        width = self.lora_a.shape[1]
        both = (torch.float32,) if spec.pending == "drop" else (torch.float32, torch.bfloat16)
        wanted = {
            "weight": ((out + rank, width), (torch.uint8,)),
            "scale": ((out + rank, 1) if spec.per_row else (), (torch.float32,)),
            "applied": ((out, rank), both),
            "counters": ((COUNTERS,), (torch.int64,)),
            "writes": ((out,), (torch.int32,)),
            "lora_a": ((rank, width), None),
            "base": ((out, width), None),
        }
        for name, (shape, dtypes) in wanted.items():
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.shape != shape or (dtypes is not None and tensor.dtype not in dtypes):
                found = f"{tensor.dtype} {list(tensor.shape)}"
                needed = f"{list(shape)}" if dtypes is None else f"{dtypes[0]} {list(shape)}"
                raise SiteError(
                    self.index,
                    f"its {name} is {found} where {needed} is needed (cast, or assigned from "
                    "another model)",
                    "Load it in its own dtype and shape; load_state_dict without assign=True does",
                )
            if tensor.device != self.lora_b.device:
                raise SiteError(
                    self.index,
                    f"its {name} is on {tensor.device}, its lora_B on {self.lora_b.device}",
                    "Move the whole model to one device",
                )
