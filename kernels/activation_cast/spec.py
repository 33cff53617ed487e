"""`ActivationCastSpec`: the cast of x or dL/dO to FP8, with its scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from falqon_fx.config import Granularity, Scale
from falqon_fx.kernels.spec import (
    CastMode,
    Fp8Format,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
)

_TILE = 4096  # elements that four warps hold in 32 registers a thread
_MAX_ROW = 16384  # widest row that stays in the registers of one program


@dataclass(frozen=True)
class ActivationCastSpec(KernelSpec):
    """The cast of x [n, width] to FP8 with one scale per tensor or per row.

    ``block_rows`` × ``block_width`` is the tile that one program holds, ``num_warps`` the warps
    that share it. ``loop`` (row only) reads rows wider than a tile piece by piece; without it the
    row is read once. ``programs`` (tensor only) bounds the grid, and with it the partial maxima.

    Raises ValueError for a value outside its `Literal`, a size that is not a power of two, or a
    field that the granularity has no use for.
    """

    template: ClassVar[str] = "activation_cast"

    input_dtype: InputDtype
    fp8: Fp8Format
    granularity: Granularity
    scale: Scale
    cast: CastMode
    block_rows: int
    block_width: int
    loop: bool = False
    programs: int = 1
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "block_rows", "block_width", "programs", "num_warps")
        if self.granularity == "tensor" and self.loop:
            raise ValueError("loop=True: only granularity='row' loops over a row")
        if self.granularity == "row" and self.programs != 1:
            raise ValueError("programs: only granularity='tensor' bounds its grid")

    @property
    def name(self) -> str:
        loop = "_loop" if self.loop else ""
        programs = f"_p{self.programs}" if self.granularity == "tensor" else ""
        return (
            f"{self.template}_{self.input_dtype}_{self.fp8}_{self.granularity}_{self.scale}_"
            f"{self.cast}_{self.block_rows}x{self.block_width}{loop}{programs}_w{self.num_warps}"
        )

    @classmethod
    def for_width(
        cls,
        width: int,
        *,
        input_dtype: InputDtype,
        fp8: Fp8Format = "e4m3",
        granularity: Granularity = "tensor",
        scale: Scale = "amax",
        cast: CastMode = "hardware",
    ) -> ActivationCastSpec:
        """The spec for rows of ``width`` elements, with tiles of about 4096 elements.

        A row up to 16384 stays in registers, with more warps as it gets wider.
        """
        padded = max(16, 1 << (width - 1).bit_length()) if width > 0 else 16
        block_width, loop, num_warps = min(padded, _TILE), False, 4
        if granularity == "row":
            loop = padded > _MAX_ROW
            block_width = _TILE if loop else padded
            num_warps = max(4, block_width // 1024)
        return cls(
            input_dtype=input_dtype,
            fp8=fp8,
            granularity=granularity,
            scale=scale,
            cast=cast,
            block_rows=max(1, _TILE // block_width),
            block_width=block_width,
            loop=loop,
            programs=1024 if granularity == "tensor" else 1,
            num_warps=num_warps,
        )
