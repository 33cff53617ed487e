"""One product on given operands, and what can compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from falqon_fx import _compat
from falqon_fx.config import Accumulation, Transpose
from falqon_fx.kernels.hardware import architecture, family, int8_architecture
from falqon_fx.kernels.interpreter import runs_interpreted
from falqon_fx.kernels.products.choice import Candidate, choices_for, refuse
from falqon_fx.kernels.products.problem import bucket
from falqon_fx.kernels.spec import KernelSpec
from falqon_fx.site.numerics import INT8

S = TypeVar("S", bound=KernelSpec)
AUTO = ("auto", "max-autotune")


@dataclass(frozen=True)
class Options:
    """How the products are to be computed (see `FalqonConfig`); kernel="max-autotune" is "auto" in
    Inductor's mode of that name.
    """

    kernel: str = "auto"
    accumulation: Accumulation = "fast"
    transpose: Transpose = "auto"


@dataclass(frozen=True)
class Contest:
    """The implementations of one product on given operands; ``key`` says what it is, ``like`` is
    one of the operands, and ``wanted`` the option ``kernel``.
    """

    key: str
    candidates: dict[str, Candidate]
    like: Tensor
    wanted: str

    def run(self) -> list[Tensor]:
        """The results of the chosen one, as the function that made the contest says.

        Raises NoKernelError where no kernel, or not the one asked for, takes the operands; the
        message holds the reason of each.
        """
        like, on_gpu = self.like, self.like.is_cuda
        name = "dequantize"
        if like.shape[0] and (on_gpu or self.wanted not in AUTO):
            choices, time = choices_for(like.device), on_gpu and not _is_recording(like)
            name = choices.get(self.key, self.candidates, self.wanted, time=time).winner
        result: list[Tensor] = self.candidates[name]()
        return result


def _is_recording(like: Tensor) -> bool:
    """Whether nothing can be timed now: a graph is traced, or a CUDA graph is captured."""
    return _compat.is_fake(like) or torch.cuda.is_current_stream_capturing()


def against_aten(
    what: str,
    like: Tensor,
    made: Callable[[], Sequence[S]],
    generated: Callable[[S], list[Tensor]],
    plain: Candidate,
    kernel: str,
) -> Contest:
    """Generated kernels, of the specs that are ``made``, against ATen."""
    why = untried(runs_interpreted(like))
    candidates: dict[str, Candidate] = {}
    try:
        for spec in made():
            run = partial(refuse, why) if why else partial(generated, spec)
            candidates[f"triton:{spec.name}"] = run
    except ValueError as error:  # a dtype that no spec has
        candidates["triton"] = partial(refuse, str(error))
    wanted = kernel if kernel in ("triton", "dequantize") and candidates else "auto"
    key = f"{what} n={bucket(len(like))} {like.dtype} {' '.join(candidates)}"
    return Contest(key, {**candidates, "dequantize": plain}, like, wanted)


def where_runs(x: Tensor) -> int:
    """90 for sm_90 and those with its tensor cores, and so on; 0 for the interpreter."""
    if runs_interpreted(x):
        return 0
    return family((int8_architecture if x.dtype == INT8 else architecture)(x.device))


def untried(interpreted: bool) -> str:
    """Why generated kernels don't run here, or ""."""
    tried = interpreted or torch.version.hip is None
    return "" if tried else "no kernel has been tried on an AMD GPU"
