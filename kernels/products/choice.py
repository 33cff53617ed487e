"""Which implementation computes a product: timed once per device, kept in memory and on disk.

A candidate is a name and a function of no arguments. One that raises is passed over, and so is one
whose numbers are not those of "dequantize", which torch multiplies; the reason is kept, and so are
the times of the winner and the others, for the report.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from falqon_fx.errors import NoKernelError
from falqon_fx.kernels.cache import cache_folder, replace_file
from falqon_fx.kernels.spec import library_version

Candidate = Callable[[], Any]
# Of twice the L2 cache, 40 us each on an H100: a call takes the host 100 to 400 us.
_FLUSHES = 16
# What a candidate raises where it does not take the operands: our own checks, torch's, Triton's. A
# fault of the card is none: whatever ran next would fail, too.
Refusal = (ValueError, TypeError, NotImplementedError, RuntimeError, triton.errors.TritonError)
Fault = torch.AcceleratorError
# Results are rounded to bfloat16, as is O_A before it is multiplied (2**-9 each); tensor cores
# add FP8 products in 14 bits. One wrong element in 4096 makes a difference of 2**-6.
_ALIKE = 2.0**-6


@dataclass(frozen=True)
class Choice:
    """What was chosen for ``key``, with seconds per call of each candidate and why others fell out.

    ``seconds`` is empty where nothing was timed: a forced or the only candidate.
    """

    key: str
    winner: str
    seconds: dict[str, float]
    refused: dict[str, str]

    def __str__(self) -> str:
        text = f"{self.key}: {self.winner}"
        others = sorted((t, name) for name, t in self.seconds.items() if name != self.winner)
        if others and others[0][0] > 0:  # there was a clock
            text += f", {others[0][0] / self.seconds[self.winner]:.2f}x the speed of {others[0][1]}"
        return text + "".join(f"; not {name}: {why}" for name, why in self.refused.items())


class Choices:
    """The choices of one process for one device, and their file.

    ``environment`` names all that a time depends on beside the problem: card, capability, versions.
    """

    def __init__(self, environment: str, timer: Callable[[Candidate], float]) -> None:
        self._timer = timer
        self._environment = environment
        self._known: dict[tuple[str, str], Choice] | None = None
        self._passing: dict[tuple[str, str], Choice] = {}  # made while memory was short: not kept

    @property
    def path(self) -> str:
        """Where choices are kept."""
        digest = hashlib.sha256(self._environment.encode()).hexdigest()[:16]
        return str(cache_folder() / f"choices-{digest}.json")

    def known(self, key: str, wanted: str) -> Choice | None:
        """The choice for ``key`` where it was made before; see `get`."""
        return self._load().get((key, wanted)) or self._passing.get((key, wanted))

    def get(
        self,
        key: str,
        candidates: Mapping[str, Candidate],
        wanted: str = "auto",
        *,
        time: bool = True,
    ) -> Choice:
        """The choice for ``key``: the fastest candidate, or the first that works.

        ``wanted`` forces a candidate, or those of a family ("triton" for "triton:..."). With
        ``time=False`` (while a CUDA graph is captured) nothing new is timed, and nothing is kept.

        Raises NoKernelError where no candidate works; the message holds each reason.
        """
        place, known = (key, wanted), self.known(key, wanted)
        if known is not None and known.winner in candidates:
            return known
        matching = {
            name: run
            for name, run in candidates.items()
            if wanted in ("auto", "max-autotune", name, re.split("[:+]", name)[0])
        }
        if not matching:
            raise NoKernelError(f"kernel={wanted!r}: {key} has {', '.join(candidates) or 'none'}")
        if not time:
            works = [name for name, run in matching.items() if not refuses(run)]
            return Choice(key, [*works, *matching][0], {}, {})
        choice, lasting = self._measure(key, matching, candidates.get("dequantize"))
        if lasting:
            self._store(place, choice)
        else:
            self._passing[place] = choice
        return choice

    def _measure(
        self, key: str, candidates: Mapping[str, Candidate], plain: Candidate | None
    ) -> tuple[Choice, bool]:
        """The choice, and whether it is to last: memory may be short just now."""
        seconds: dict[str, float] = {}
        refused: dict[str, str] = {}
        lasting = True
        for name, run in candidates.items():
            try:
                if plain is not None and run is not plain:
                    check_alike(run(), plain())
                seconds[name] = self._timer(run)
            except Fault:
                raise
            except Refusal as error:
                refused[name] = _first_line(error)
                lasting &= not isinstance(error, torch.OutOfMemoryError)
        if not seconds:
            reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
            raise NoKernelError(f"no kernel takes {key}: {reasons}")
        return Choice(key, min(seconds, key=seconds.__getitem__), seconds, refused), lasting

    def _load(self) -> dict[tuple[str, str], Choice]:
        if self._known is None:
            self._known = _read(self.path, self._environment)
        return self._known

    def _store(self, place: tuple[str, str], choice: Choice) -> None:
        # Another process may have added its own since: keep both.
        merged = _read(self.path, self._environment) | self._load() | {place: choice}
        self._known = merged
        content = {
            "environment": self._environment,
            "choices": [{"wanted": wanted, **asdict(c)} for (_, wanted), c in merged.items()],
        }
        replace_file(self.path, json.dumps(content, indent=1).encode())


def refuse(why: str) -> Any:
    """What a candidate does that doesn't take the operands."""
    raise ValueError(why)


def refuses(run: Candidate) -> bool:
    """Whether a candidate is known not to take the operands."""
    return getattr(run, "func", None) is refuse


def check_alike(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raises ValueError where results are not those that are wanted, up to roundings."""
    for result, other in zip(results, wanted, strict=True):
        exact, norm = other.to(torch.float32), torch.linalg.vector_norm
        size = float(norm(exact))
        if not math.isfinite(size):  # an overflow, as where a loss scale is found: nothing is told
            continue
        difference = float(norm(result.to(torch.float32) - exact)) / max(size, 1e-30)
        if not difference <= _ALIKE:
            raise ValueError(f"its numbers are off by {difference:.2g} of those of torch")


def _read(path: str, environment: str) -> dict[tuple[str, str], Choice]:
    """The choices in a file; none where it is missing, damaged or another environment's."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if content["environment"] != environment:
            return {}
        return {(str(c["key"]), str(c["wanted"])): _choice(c) for c in content["choices"]}
    except _DAMAGE:  # the file is written anew
        return {}


_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def _choice(content: Mapping[str, Any]) -> Choice:
    seconds = {str(name): float(value) for name, value in content["seconds"].items()}
    refused = {str(name): str(why) for name, why in content["refused"].items()}
    if seconds and content["winner"] not in seconds:
        raise ValueError("the winner was not timed")
    return Choice(str(content["key"]), str(content["winner"]), seconds, refused)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@functools.cache
def choices_for(device: torch.device) -> Choices:
    """The choices for a device."""
    timer = partial(cuda_seconds, device) if device.type == "cuda" else run_once
    return Choices(environment_of(device), timer)


def environment_of(device: torch.device) -> str:
    """All that times on ``device`` depend on, as text."""
    versions = (
        f"torch {torch.__version__}, triton {triton.__version__}, falqon-fx {library_version()}"
    )
    if device.type != "cuda":
        return f"{device.type}, {versions}"
    about = torch.cuda.get_device_properties(device)
    card = f"{about.name}, sm_{about.major}{about.minor}, {about.multi_processor_count} processors"
    return f"{card}, cuda {torch.version.cuda}, {versions}"


def cuda_seconds(device: torch.device, run: Candidate) -> float:
    """Median of nine timings by CUDA events, behind three calls that compile and warm up.

    As in a step the operands are not in the L2 cache, which is overwritten before each call; that
    takes longer than the host needs to queue the call, so that no time of the host is in between.
    """
    with torch.cuda.device(device):
        for _ in range(3):
            run()
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        pairs = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(_FLUSHES):
                flush.zero_()
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(device)
    return statistics.median(float(start.elapsed_time(end)) / 1e3 for start, end in pairs)


def run_once(run: Candidate) -> float:
    """Whether a candidate works, on devices that are not timed; the first one wins."""
    run()
    return 0.0
