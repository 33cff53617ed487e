"""`UpdateSpec`: the proxy update of all sites of a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from falqon_fx.config import Granularity, Rounding, Scale
from falqon_fx.kernels.spec import (
    CastMode,
    InputDtype,
    KernelSpec,
    check_literals,
    check_powers_of_two,
)

AppliedDtype = Literal["float32", "bfloat16"]
BaseDtype = Literal["none", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class UpdateSpec(KernelSpec):
    """The row-wise proxy update (`falqon_fx.rows.update`) as four kernels, each over all sites.

    The dtypes are those of lora_B, lora_A, `applied` and the base weight ("none" where prepare()
    freed it: then rows are cast from what they were, else from the base weight). ``drop`` is
    pending="drop": B holds the step itself, and `applied` is float32. ``rank`` is the padded rank.
    ``aligned`` says that all rows of W' are multiples of 16 bytes; ``base_aligned`` says it of the
    base weights, whose columns then stand side by side, and which else may have any strides. A
    program that writes holds ``rows`` × ``width`` elements; ``loop`` reads wider rows piece by
    piece, twice where they get a new scale.

    Raises ValueError for a value outside its `Literal`, a size that is not a power of two, or steps
    that `applied` would round away.
    """

    template: ClassVar[str] = "update"

    b_dtype: InputDtype
    a_dtype: InputDtype
    applied_dtype: AppliedDtype
    base_dtype: BaseDtype
    granularity: Granularity
    scale: Scale
    rounding: Rounding
    drop: bool
    cast: CastMode
    rank: int
    aligned: bool
    base_aligned: bool
    rows: int
    width: int
    loop: bool
    block: int = 512
    num_warps: int = 4

    def __post_init__(self) -> None:
        check_literals(self)
        check_powers_of_two(self, "rank", "rows", "width", "block", "num_warps")
        if self.width < 8:
            raise ValueError(f"width={self.width}: eight columns share a block of random bits")
        if self.drop and self.applied_dtype != "float32":
            raise ValueError(f"applied_dtype={self.applied_dtype!r}: with drop it is float32")

    @property
    def name(self) -> str:
        flags = "".join(
            f"_{text}"
            for text, on in (
                ("drop", self.drop),
                ("aligned", self.aligned),
                ("base", self.base_aligned),
                ("loop", self.loop),
            )
            if on
        )
        return (
            f"{self.template}_{self.b_dtype}_{self.a_dtype}_{self.applied_dtype}_{self.base_dtype}_"
            f"{self.granularity}_{self.scale}_{self.rounding}_{self.cast}{flags}_r{self.rank}_"
            f"{self.rows}x{self.width}_b{self.block}_w{self.num_warps}"
        )
