"""What the cost model knows of a card: its peak rates and where each figure comes from.

Figures of vendors are peaks that no kernel reaches; `calibrate` measures the card at hand and
stores what it reached, and a stored card is preferred to the table.
"""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from falqon_fx._compat import scaled_mm
from falqon_fx.errors import FalqonError
from falqon_fx.kernels.cache import cache_folder, write_file
from falqon_fx.kernels.cpu import integers
from falqon_fx.kernels.hardware import fp8_architecture
from falqon_fx.report.checked import STRICT, read
from falqon_fx.site.numerics import dtype_name


@dataclass(frozen=True)
class Card:
    """Rates of one device.

    Attributes:
        flops: dense matrix multiplication by dtype, with float32 accumulation, FLOP/s; of "int8"
            with int32. A card without "float8" has no FP8 matrix unit.
        bandwidth: device memory, bytes/s.
        casts: FP8 casts and decodings, elements/s; 0 where memory alone bounds them.
        launch: seconds from one kernel to the next.
        architecture: 90 for sm_90 and so on; 0 of other vendors', and of what was measured and has
            no FP8 kernels.
        source: where each figure comes from.
        thin: bytes/s of products with one side of `_THIN`, by dtype, where those are slower than
            memory (packing the operands); else none.
        fresh: bytes/s at which the system hands out memory that is touched for the first time, on
            top of writing it; 0 where the allocator keeps what is freed.
        gpu: whether it is one.
    """

    __pydantic_config__ = STRICT

    name: str
    flops: dict[str, float]
    bandwidth: float
    casts: float
    launch: float
    source: dict[str, str]
    architecture: int = 0
    thin: dict[str, float] = field(default_factory=dict)
    fresh: float = 0.0
    gpu: bool = False

    @property
    def has_fp8(self) -> bool:
        return "float8" in self.flops


# The gap between two kernels of a stream that is kept filled: 3.8 us a kernel of 2.9 us.
_LAUNCH = 0.9e-6
_LAUNCH_SOURCE = (
    "NVIDIA blog, Getting Started with CUDA Graphs (2019): 3.8 us a kernel of 2.9 us on a V100; "
    "taken for every GPU"
)


def _gpu(
    name: str,
    bf16: float,
    fp8: float | None,
    int8: float | None,
    f32: float,
    bandwidth: float,
    source: str,
    architecture: int,
) -> Card:
    """TFLOP/s and GB/s as vendors print them; ``f32`` is TF32 or FP32, whichever torch's default
    (FP32 without TF32) runs. None where there are no such units, or this library has no INT8.
    """
    given = {"bfloat16": bf16, "float8": fp8, "int8": int8, "float32": f32}
    flops = {name: rate * 1e12 for name, rate in given.items() if rate is not None}
    sources = {"flops": source, "bandwidth": source, "launch": _LAUNCH_SOURCE}
    given_card = name, flops, bandwidth * 1e9, 0.0, _LAUNCH, sources, architecture
    return Card(*given_card, gpu=True)


_A100 = "NVIDIA A100 Tensor Core GPU datasheet, 80 GB SXM (dense)"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A (dense, FP32 accumulate)"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A (dense, FP32 accumulate)"
_L40S = "NVIDIA L40S datasheet (dense; half of the starred figures)"
_HOPPER = "NVIDIA {} Tensor Core GPU datasheet, SXM (dense: half of the figures with sparsity)"
_HGX = "NVIDIA Blackwell datasheet, HGX B200, per GPU (dense: half of the figures with sparsity)"
_MI = "AMD Instinct MI300X datasheet (dense)"
_RTX = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A (dense, FP32 accumulate)"

CARDS: tuple[Card, ...] = (
    _gpu("RTX 3090", 71, None, 284, 35.6, 936, _AMPERE, 86),
    _gpu("A100", 312, None, 624, 19.5, 2039, _A100, 80),
    _gpu("RTX 4090", 165.2, 330.3, 660.6, 82.6, 1008, _ADA, 89),
    _gpu("L40S", 362.05, 733, 733, 91.6, 864, _L40S, 89),
    _gpu("H100", 989.5, 1979, 1979, 67, 3350, _HOPPER.format("H100"), 90),
    _gpu("H200", 989.5, 1979, 1979, 67, 4800, _HOPPER.format("H200"), 90),
    _gpu("B200", 2250, 4500, 4500, 75, 7700, _HGX, 100),
    _gpu("MI300X", 1307.4, 2614.9, None, 163.4, 5300, _MI, 0),
    _gpu("RTX 5090", 209.5, 419, 838, 104.8, 1792, _RTX, 120),
)


def cards_file() -> Path:
    """Where calibrated cards are kept."""
    return cache_folder() / "cards.json"


def calibrated() -> dict[str, Card]:
    """The calibrated cards by name.

    Raises:
        FalqonError: their file is damaged.
    """
    path = cards_file()
    if not path.exists():
        return {}
    try:
        cards: dict[str, Card] = read(dict[str, Card], path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "Remove it, and measure again with `falqon-fx cost --calibrate cuda` (or cpu)"
        raise FalqonError(str(path), f"it holds no cards ({error})", remedy) from error
    return cards


def find(name: str) -> Card:
    """The card called ``name``, calibrated if there is such a one.

    Raises:
        FalqonError: there is no such card; the message names the nearest.
    """
    known = {card.name: card for card in CARDS} | calibrated()
    folded = {key.casefold(): key for key in known}
    if name.casefold() in folded:
        return known[folded[name.casefold()]]
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.0)[0]
    raise FalqonError(
        f"card {name!r}",
        f"is unknown: there are {', '.join(known)}",
        f"The nearest is {folded[near]!r}; `falqon-fx cost --calibrate cuda` adds the card at hand",
    )


def at_hand(device: torch.device) -> Card | None:
    """The calibrated card, or the table's, for a device; None where neither knows it."""
    name = device_name(device)
    known = calibrated()
    if name in known:
        return known[name]
    # The longest name that fits: "H200" must not be taken for an "H100 ..." and the like.
    fits = [card for card in CARDS if card.name.casefold() in name.casefold()]
    return max(fits, key=lambda card: len(card.name), default=None)


def unknown(device: torch.device) -> tuple[str, str]:
    """What is missing where `at_hand` knows no card, and the remedy."""
    choose = "Give card= (`falqon-fx cost --cards` lists them)"
    if device.type not in ("cpu", "cuda"):
        return f"the {device.type} device is no card", choose
    measure = f"or measure it with `falqon-fx cost --calibrate {device.type}`"
    return f"nothing is known of this {device.type} ({device_name(device)})", f"{choose}, {measure}"


def device_name(device: torch.device) -> str:
    """What a card is stored under: the GPU's name, or the CPU's model and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads" if device.type == "cpu" else ""


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "CPU"


def calibrate(device: torch.device, size: int = 2048, repeats: int = 5) -> Card:
    """Measure the card at hand (medians of ``repeats``) and store it.

    Raises:
        FalqonError: a device that can't be measured.
    """
    if device.type not in ("cpu", "cuda"):
        raise FalqonError(f"device {device}", "can't be measured", "Give cpu or cuda")
    card = _measure(device, size, repeats)
    known = {name: asdict(other) for name, other in (calibrated() | {card.name: card}).items()}
    write_file(cards_file(), json.dumps(known, indent=1).encode())
    return card


_LAUNCHES = 1000
_THIN = 16  # a common rank
_LARGE = 64 << 20  # bytes: more than any C library's allocator keeps when it is freed


def _measure(device: torch.device, size: int, repeats: int) -> Card:
    def median(run: Callable[[], object]) -> float:
        run()
        times = []
        for _ in range(repeats):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2]

    flops, thin = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        name = dtype_name(dtype)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = median(lambda a=a, b=b: a @ b.t())  # type: ignore[misc]
        flops[name] = 2 * size**3 / seconds
        thin[name] = _thin(a, median)
    if fp8_architecture(device):
        flops["float8"] = 2 * size**3 / median(_scaled_mm(device, size))
    if device.type == "cuda" or integers.exact():
        left, right = (torch.randint(-9, 9, (size, size), device=device).char() for _ in range(2))
        flops["int8"] = 2 * size**3 / median(lambda: torch.ops.aten._int_mm(left, right.t()))
    big = torch.randn(16 * size * size, device=device)
    other = torch.empty_like(big)
    bandwidth = 2 * big.nbytes / median(lambda: other.copy_(big))
    small = torch.zeros(16, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1.0)

    measured = f"measured: medians of {repeats}, square GEMMs of {size}, torch {torch.__version__}"
    return Card(
        device_name(device),
        flops,
        bandwidth,
        _casts(device, size, median),
        median(many) / _LAUNCHES,
        dict.fromkeys(("flops", "bandwidth", "casts", "launch", "thin", "fresh"), measured),
        fp8_architecture(device),
        thin,
        _fresh(median) if device.type == "cpu" else 0.0,  # torch keeps a GPU's memory
        device.type == "cuda",
    )


def _thin(square: torch.Tensor, median: Callable[[Callable[[], object]], float]) -> float:
    """Bytes/s of the products that a low rank takes part in: x·Aᵀ, O_A·Bᵀ, dLᵀ·O_A and O_Aᵀ·x."""
    narrow = square[:, :_THIN].contiguous()
    pairs = (
        (square, narrow),
        (narrow, narrow.t().contiguous()),
        (square.t(), narrow),
        (narrow.t(), square),
    )
    moved = seconds = 0.0
    for a, b in pairs:
        moved += a.nbytes + b.nbytes + a.shape[0] * b.shape[1] * a.element_size()
        seconds += median(lambda a=a, b=b: a @ b)  # type: ignore[misc]
    return moved / seconds


def _fresh(median: Callable[[Callable[[], object]], float]) -> float:
    kept = torch.empty(_LARGE, dtype=torch.uint8)
    extra = median(lambda: torch.empty_like(kept).zero_()) - median(kept.zero_)
    return _LARGE / extra if extra > 0 else 0.0


def _casts(
    device: torch.device, size: int, median: Callable[[Callable[[], object]], float]
) -> float:
    """Elements/s of the library's own decoding, compiled as it runs in a graph: from E4M3."""
    from falqon_fx.site.numerics import E4M3, decode_fp8

    code = torch.randint(0, 120, (size, size), dtype=torch.uint8, device=device).view(E4M3)
    scale = torch.ones(size, 1, dtype=torch.float32, device=device)
    decode = torch.compile(lambda c, s: decode_fp8(c, s, torch.bfloat16))
    return size * size / median(lambda: decode(code, scale))


def _scaled_mm(device: torch.device, size: int) -> Callable[[], object]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), dtype=torch.float32, device=device)
    return lambda: scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
