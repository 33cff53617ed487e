"""`AdapterFp8Spec`: the casts of A and of scaling · B, both to FP8, of several adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from falqon_fx.config import Scale
from falqon_fx.kernels.fixed import FixedDtype
from falqon_fx.kernels.spec import (
    MAX_TAIL,
    CastMode,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
)


@dataclass(frozen=True)
class AdapterFp8Spec(KernelSpec):
    """Â_j = q(A_j) in E4M3 with one scale per row, α_j, which shares the range of E4M3 between t_j
    and b_j, and b_j = q(scaling_j · B_j · α_j / s_W), of ``adapters`` adapters j whose A and B are
    of ``input_dtype``; see `falqon_fx.ops.fp8_adapter`. Behind them stand rows and columns that
    don't train, of the dtype ``fixed``; see `falqon_fx.kernels.fixed`.

    ``rank`` is the padded largest number of columns of a b. First a program casts one row of an Â,
    in pieces of ``block`` columns, or finds the largest of ``chunks`` tiles of a b; then one casts
    a tile of a b.
    """

    template: ClassVar[str] = "adapter_fp8"

    input_dtype: InputDtype
    scale: Scale
    cast: CastMode
    adapters: int
    rank: int
    fixed: FixedDtype = "none"
    typical: float = 80.0  # root mean square of a row of q(x)
    room: float = 32.0  # from a typical t to the largest
    block: int = 4096
    tile: int = 4096
    chunks: int = 4
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "block", "tile", "num_warps")
        if self.adapters < 1 or not 16 <= self.rank <= MAX_TAIL:
            raise ValueError(f"{self}: an adapter or more, 16 to {MAX_TAIL} columns")

    @classmethod
    def for_rank(
        cls,
        rank: int,
        input_dtype: InputDtype,
        scale: Scale,
        cast: CastMode,
        adapters: int,
        fixed: FixedDtype = "none",
    ) -> AdapterFp8Spec:
        """The spec for so many columns, padded. Larger tiles would spill where columns are few, and
        where each may come from two or three matrices.
        """
        many = fixed != "none"
        return cls(
            input_dtype=input_dtype,
            scale=scale,
            cast=cast,
            adapters=adapters,
            rank=rank,
            fixed=fixed,
            block=2048 if many else 4096,
            tile=2048 if rank == 16 or many else 4096,
            num_warps=8 if many else 4,
        )

    @property
    def rows(self) -> int:
        """Rows of a tile of a B."""
        return self.tile // self.rank

    @property
    def name(self) -> str:
        fixed = "" if self.fixed == "none" else f"fixed_{self.fixed}_"
        return (
            f"{self.template}_{self.input_dtype}_{self.scale}_{self.cast}_{self.adapters}x_"
            f"{fixed}r{self.rank}_{self.block}_{self.chunks}x{self.tile}_w{self.num_warps}"
        )
