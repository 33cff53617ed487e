"""What `falqon_fx.save_fp8` says that it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from falqon_fx.config import BaseDtype
from falqon_fx.errors import printable

Source = Literal["unchanged", "base weight", "FP8 weight", "INT8 weight", "NVFP4 weight"]
FROM_CAST: dict[BaseDtype, Source] = {
    "fp8": "FP8 weight",
    "int8": "INT8 weight",
    "nvfp4": "NVFP4 weight",
}
_TWICE = (
    "{} were cast a second time, from {}s with the adapters (base= names the folder of the "
    "original ones)"
)
_SAID: dict[Source, str] = {
    "unchanged": "{} hold the bytes that were trained on",
    "base weight": "{} were cast from their base weights with the adapters",
    **dict.fromkeys(FROM_CAST.values(), _TWICE),
}


@dataclass
class Left:
    """How much of what adapters add is left after second casts, summed over layers: ⟨after -
    before, added⟩ and ‖added‖². What is less than half of a step rounds back to where it was.
    """

    kept: float = 0.0
    added: float = 0.0

    def note(self, before: Tensor, merged: Tensor, after: Tensor) -> None:
        """Add a layer: its W before, with the adapters, and as it was cast again."""
        added = merged - before
        self.kept += float(((after - before) * added).double().sum())
        self.added += float(added.double().square().sum())

    @property
    def share(self) -> float | None:
        return self.kept / self.added if self.added else None


@dataclass(frozen=True)
class FlushReport:
    """What writing the pending rows of update="rows" changed.

    ``relative_change`` is ‖dq(W) after - dq(W) before‖ / ‖dq(W) before‖ over the layers that had
    pending rows (Frobenius); ``left`` the largest |scaling · (B - applied)| that could not be
    written, because ``applied`` rounds B to 16 bits.
    """

    layers: int
    rows: int
    relative_change: float
    left: float

    def __str__(self) -> str:
        if not self.rows:
            return "no row was pending"
        return (
            f"{self.rows} pending rows in {self.layers} layers were written first, which changed "
            f"their FP8 weights by {self.relative_change:.2%}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What `save_fp8` wrote: layers that were cast, layers left dense and why, files and bytes.

    ``cast_from`` says what each cast layer's bytes were made from: "base weight", the original one
    with the adapters; "FP8 weight" (or "INT8 weight", "NVFP4 weight"), the same where `prepare` had
    freed the original, which rounds twice; or they are "unchanged", those of training. ``left``
    is the share of what the adapters add that is left where weights were rounded twice, None where
    none was.
    """

    directory: Path
    form: str
    cast_from: dict[str, Source]
    dense: dict[str, str]
    flushed: FlushReport
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = field(default=())
    base_dtype: BaseDtype = "fp8"
    left: float | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of the layers that were cast."""
        return tuple(self.cast_from)

    def __str__(self) -> str:
        kind = self.base_dtype.upper()
        lines = [
            f"{self.directory}: {len(self.layers)} layers in {kind} ({self.form}), "
            f"{self.bytes / 2**20:.1f} MiB in {len(self.files)} files"
        ]
        sources = list(self.cast_from.values())
        lines += [text.format(sources.count(s), s) for s, text in _SAID.items() if s in sources]
        if self.left is not None:
            lines.append(f"{self.left:.0%} of what their adapters add is left by the second cast")
        if self.flushed.rows:
            lines.append(str(self.flushed))
        lines += [f"dense: {path}: {reason}" for path, reason in self.dense.items()]
        return printable("\n".join([*lines, *self.notes]))
