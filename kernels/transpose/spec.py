"""Specs of the transpose of W for dL/dx: made each time, or kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from falqon_fx.kernels.spec import KernelSpec, check_powers_of_two
from falqon_fx.site.record import COUNTERS, FINGERPRINT_A, FINGERPRINT_W, SITE, STEP


@dataclass(frozen=True)
class TransposeSpec(KernelSpec):
    """The transposes of ``matrices`` byte matrices, one ``block`` × ``block`` tile a program.

    ``fp8``: they come as FP8, and not as bytes, which the interpreter and GPUs below sm_89 need.
    Words are stored in either case: a store of transposed FP8 values comes out wrong on some GPUs
    (triton#11111).
    """

    template: ClassVar[str] = "transpose"

    matrices: int = 1
    fp8: bool = True
    block: int = 128
    num_warps: int = 8

    def __post_init__(self) -> None:
        check_powers_of_two(self, "block", "num_warps")
        if self.matrices < 1:
            raise ValueError(f"matrices={self.matrices}: expected at least one")

    @property
    def name(self) -> str:
        kind = "fp8" if self.fp8 else "bytes"
        return f"{self.template}_{self.matrices}x_{kind}_{self.block}_w{self.num_warps}"


@dataclass(frozen=True)
class StoredSpec(KernelSpec):
    """Refreshes the kept copies of Wᵀ; a program handles ``rows`` rows by ``width`` bytes."""

    template: ClassVar[str] = "stored"

    rows: int = 16
    width: int = 256
    block: int = 512
    num_warps: int = 4
    # Places in `MergedAdapter.counters`, and how many there are.
    fingerprint_a: int = FINGERPRINT_A
    fingerprint_w: int = FINGERPRINT_W
    step: int = STEP
    site_number: int = SITE
    counters: int = COUNTERS

    def __post_init__(self) -> None:
        check_powers_of_two(self, "rows", "width", "block", "num_warps")

    @property
    def name(self) -> str:
        return f"{self.template}_{self.rows}x{self.width}_b{self.block}_w{self.num_warps}"
