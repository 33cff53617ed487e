"""`AdapterCastSpec`: the casts of A and of scaling · B of several adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.config import Scale
from falqon_fx.kernels.fixed import FixedDtype
from falqon_fx.kernels.spec import (
    CastMode,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
)


@dataclass(frozen=True)
class AdapterCastSpec(KernelSpec):
    """Â_j = q(A_j) in E4M3 with one scale per row, and b_j = scaling_j · B_j, for ``adapters``
    adapters j whose A and B are of ``input_dtype``. Behind them stand rows and columns that don't
    train, of the dtype ``fixed``; see `falqon_fx.kernels.fixed`.

    A program casts one row of an Â, in pieces of ``block`` columns, or makes ``block`` elements of
    a b.
    """

    template: ClassVar[str] = "adapter_cast"

    input_dtype: InputDtype
    b_dtype: Literal["bfloat16", "float32"]
    scale: Scale
    cast: CastMode
    adapters: int
    fixed: FixedDtype = "none"
    block: int = 4096
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "block", "num_warps")
        if self.adapters < 1:
            raise ValueError(f"adapters={self.adapters}: expected at least one")

    @property
    def name(self) -> str:
        fixed = "" if self.fixed == "none" else f"fixed_{self.fixed}_"
        return (
            f"{self.template}_{self.input_dtype}_{self.b_dtype}_{self.scale}_{self.cast}_"
            f"{self.adapters}x_{fixed}{self.block}_w{self.num_warps}"
        )
