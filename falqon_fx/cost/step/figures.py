"""The figures that the arithmetic of a step rests on, each with where it comes from.

What an H100 reaches is published for few sizes; another card is taken to reach the same share of
what its vendor prints, unless something is published for it. A figure that nobody published says
"assumed".
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from math import log2
from typing import Any, Literal

from falqon_fx.cost.cards import CARDS, Card, find
from falqon_fx.errors import FalqonError
from falqon_fx.kernels.hardware import reads_columns

Attention = Literal["flash2", "cudnn"]


@dataclass(frozen=True)
class Figure:
    """A number, its unit, and its source."""

    value: float
    unit: str
    source: str

    @property
    def assumed(self) -> bool:
        return self.source.startswith("assumed")


@dataclass(frozen=True)
class Figures:
    """All that is taken for given about a card and its host.

    Attributes:
        bf16_gemm: cuBLAS's bf16 products, when all processors are busy.
        fp8_gemm: the library's FP8 products with a scale a row, likewise.
        int8_gemm: the library's INT8 products.
        own_gemm: our FP8 product with the adapter's product in its epilogue.
        own_int8: the same in INT8.
        summed_gemm: our dL/dx of siblings, with a second accumulator.
        bandwidth: what a kernel that only moves bytes reaches.
        addmm_passes: how often ``torch.addmm`` goes over what it adds to.
        baddbmm_passes: ``torch.baddbmm`` likewise, by which PEFT adapts stacked experts.
        thin: the share of it that a product with a thin side reaches.
        dequantize: the share of it that NF4's dequantization reaches.
        skinny_step: a program of x·Aᵀ goes through 128 of K.
        architecture: of its tensor cores, 90 for sm_90 and so on.
        tile_128, tile_64: the rate of 128 x 128 and 64 x 128 tiles, of that of 128 x 256.
        ramp: what a kernel takes to fill and to drain.
        gap: from one kernel to the next.
        launch: the host's time for a launch.
        site: the host's time for a site, in the backend around the graph.
        loss_passes: how often the loss and its gradient go over the logits.
        forward, backward: attention's rates by the length of a sequence.
    """

    processors: Figure
    architecture: Figure
    bf16_gemm: Figure
    fp8_gemm: Figure
    int8_gemm: Figure
    own_gemm: Figure
    own_int8: Figure
    summed_gemm: Figure
    bandwidth: Figure
    addmm_passes: Figure
    baddbmm_passes: Figure
    thin: Figure
    dequantize: Figure
    skinny_step: Figure
    tile_128: Figure
    tile_64: Figure
    ramp: Figure
    gap: Figure
    launch: Figure
    site: Figure
    loss_passes: Figure
    forward: dict[int, Figure]
    backward: dict[int, Figure]

    def attention(self, length: int) -> tuple[float, float]:
        """FLOP/s forward and backward: between two published lengths by their logarithm, beyond
        them that of the nearest.
        """
        return _between(self.forward, length), _between(self.backward, length)

    @property
    def has_fp8(self) -> bool:
        return self.fp8_gemm.value > 0

    @property
    def library(self) -> bool:
        """Whether torch multiplies stacked experts in FP8."""
        return self.architecture.value in (90, 100)

    @property
    def by_columns(self) -> bool:
        """Whether the tensor cores read FP8 by columns, as dL/dx reads W."""
        return reads_columns(int(self.architecture.value))

    def listed(self) -> dict[str, Figure]:
        """Every figure by its name."""
        found: dict[str, Figure] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Figure):
                found[field.name] = value
            else:
                found |= {f"attention_{field.name}_{n}": figure for n, figure in value.items()}
        return found

    def given(self, words: list[str]) -> Figures:
        """These with ``words``, each NAME=VALUE, in their place.

        Raises:
            FalqonError: a name that isn't one, or a value that is no positive number.
        """
        single = [f.name for f in fields(self) if isinstance(getattr(self, f.name), Figure)]
        changed: dict[str, Any] = {}
        for word in words:
            name, _, text = word.partition("=")
            if name not in single:
                problem = "no figure has this name"
                raise FalqonError(f"--figure {word}", problem, f"Known are {', '.join(single)}")
            try:
                value = float(text)
            except ValueError:
                value = 0.0
            if not 0 < value < float("inf"):
                problem = "its value is no positive number"
                raise FalqonError(f"--figure {word}", problem, "Give it as NAME=VALUE, in SI units")
            changed[name] = Figure(value, getattr(self, name).unit, "given on the command line")
        return replace(self, **changed)


def _between(table: dict[int, Figure], length: int) -> float:
    known = sorted(table)
    if length <= known[0]:
        return table[known[0]].value
    for low, high in pairwise(known):
        if length <= high:
            share = log2(length / low) / log2(high / low)
            return table[low].value + share * (table[high].value - table[low].value)
    return table[known[-1]].value


_PROCESSORS = {
    "RTX 3090": (82, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    "A100": (108, "NVIDIA A100 Tensor Core GPU Architecture whitepaper"),
    "RTX 4090": (128, "NVIDIA Ada GPU Architecture whitepaper"),
    "L40S": (142, "NVIDIA L40S datasheet (18176 CUDA cores of 128 a processor)"),
    "H100": (132, "NVIDIA H100 Tensor Core GPU Architecture whitepaper, SXM5"),
    "H200": (132, "NVIDIA H200: the GH100 of the H100 SXM5"),
    "B200": (148, "assumed"),
    "RTX 5090": (170, "NVIDIA RTX Blackwell GPU Architecture whitepaper"),
}
# 512 tiles of 128 x 256 on 132 processors are 3.88 waves of 4; 1536 of them 11.6 of 12.
_FP8 = 1215e12 * 4 * 132 / 512
_FP8_SOURCE = (
    "meta-pytorch/tritonbench#1149: cuBLAS, a scale a row, 4096 x 4096 x 4096: 1215 TFLOP/s, "
    "at 0.97 of full waves"
)
_BF16 = 755e12 * 12 * 132 / 1536
_BF16_SOURCE = "pytorch/FBGEMM#2766: 6144 x 8192 x 8192: 755 TFLOP/s, at 0.97 of full waves"
_OWN_SOURCE = "assumed: 650 to 850 TFLOP/s are expected of 128 x 128 tiles that no H100 has run yet"
_INT8_SOURCE = "assumed: INT8's product reaches the share of its peak that the FP8 one does"
_SUMMED_SOURCE = (
    "assumed: the low end of what is expected of own_gemm, for pointers and two accumulators"
)
_FLASH = "arXiv 2407.08608, figures 5 and 6, head size 128, H100: FlashAttention-2"
_CUDNN = "arXiv 2407.08608, figures 5 and 6, head size 128, H100: cuDNN"
_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# TFLOP/s by length: forward with a causal mask, forward without, backward without.
_ATTENTION: dict[str, tuple[str, tuple[tuple[float, ...], ...]]] = {
    "flash2": (
        _FLASH,
        (
            (191, 260, 298, 319, 333, 335),
            (309, 350, 362, 368, 370, 370),
            (214, 260, 291, 310, 318, 322),
        ),
    ),
    "cudnn": (
        _CUDNN,
        (
            (315, 410, 484, 518, 529, 539),
            (497, 574, 617, 609, 600, 595),
            (305, 408, 465, 499, 518, 516),
        ),
    ),
}
_MEMORY = "https://mikamirai.com/blog/gpu-memory-bandwidth/: H100 SXM, 2.8 of 3.35 TB/s"
_PUBLISHED = {
    ("B200", "fp8_gemm"): (
        2850e12 * 14 * 148 / 2048,
        "triton-lang/triton#9044: cuBLAS, MXFP8, 8192 x 8192 x 8192: 2850 TFLOP/s, at 0.99 of "
        "full waves; a scale a row is taken to be as fast",
    ),
}


def figures_for(name: str, attention: Attention = "flash2") -> Figures:
    """What is known of a card of the table by its name there, and of a host.

    Raises:
        FalqonError: there is no such card, or falqon has no FP8 kernels for it, or nothing is known
            of its processors.
    """
    card = find(name)
    if card.name not in _PROCESSORS:
        problem = "nothing is known of its processors, or falqon has no FP8 kernels for it"
        raise FalqonError(f"card {card.name!r}", problem, f"Name one of {', '.join(_PROCESSORS)}")
    processors, where = _PROCESSORS[card.name]
    h100 = next(other for other in CARDS if other.name == "H100")
    dense = card.flops["bfloat16"] / h100.flops["bfloat16"]

    def reached(name: str, value: float, unit: str, source: str, ratio: float) -> Figure:
        if (card.name, name) in _PUBLISHED:
            value, source = _PUBLISHED[card.name, name]
        elif card.name != h100.name:
            value, source = value * ratio, f"assumed: the H100's share of the peak ({source})"
        if not value:
            source = "the card has no FP8 matrix units"
        return Figure(value, unit, source)

    fp8 = card.flops.get("float8", 0.0) / h100.flops["float8"]
    int8 = card.flops["int8"] / h100.flops["int8"]
    forward, backward = _attention(attention, card, dense)
    return Figures(
        processors=Figure(processors, "", where),
        architecture=Figure(card.architecture, "", "NVIDIA, CUDA GPU Compute Capability"),
        bf16_gemm=reached("bf16_gemm", _BF16, "FLOP/s", _BF16_SOURCE, dense),
        fp8_gemm=reached("fp8_gemm", _FP8, "FLOP/s", _FP8_SOURCE, fp8),
        int8_gemm=reached("int8_gemm", _FP8, "FLOP/s", _INT8_SOURCE, int8),
        own_gemm=reached("own_gemm", 750e12, "FLOP/s", _OWN_SOURCE, fp8),
        own_int8=reached("own_int8", 750e12, "FLOP/s", _INT8_SOURCE, int8),
        summed_gemm=reached("summed_gemm", 650e12, "FLOP/s", _SUMMED_SOURCE, fp8),
        bandwidth=reached("bandwidth", 2.8e12, "bytes/s", _MEMORY, card.bandwidth / h100.bandwidth),
        addmm_passes=Figure(
            2, "", "in place: it reads and writes it (falqon_fx.passes.add_in_place)"
        ),
        baddbmm_passes=Figure(4, "", "pytorch/pytorch#153590: out of place it copies first"),
        thin=Figure(
            0.69, "", "pytorch/FBGEMM#2766: 6144 x 64 x 8192 in bf16 takes 52 us, its bytes 36"
        ),
        dequantize=Figure(0.85, "", "assumed: a compiled kernel; bitsandbytes' own is slower"),
        skinny_step=Figure(0.23e-6, "s", "assumed: 128 of K in a 64 x 64 tile"),
        tile_128=Figure(0.87, "", "assumed"),
        tile_64=Figure(0.62, "", "assumed"),
        ramp=Figure(1.6e-6, "s", "assumed"),
        gap=Figure(card.launch, "s", card.source["launch"]),
        launch=Figure(
            8e-6, "s", "meta-pytorch/tritonbench#1017: Inductor's launcher takes 7 to 9 us"
        ),
        site=Figure(
            1.9e-6, "s", "benchmarks/results/wrapper_time-2026-11-28-amd-epyc-2c.md, 224 sites"
        ),
        loss_passes=Figure(6, "", "assumed: three over the logits forward, three backward"),
        forward=forward,
        backward=backward,
    )


def _attention(
    kernel: Attention, card: Card, dense: float
) -> tuple[dict[int, Figure], dict[int, Figure]]:
    source, (causal, full, backward) = _ATTENTION[kernel]
    share = "" if card.name == "H100" else "assumed: the H100's share of the peak; "
    forward_source = f"{share}{source}, causal, forward"
    backward_source = (
        f"assumed: a causal mask costs backward what it costs forward; {share}{source}, backward "
        "without a mask"
    )
    rows = zip(_LENGTHS, causal, full, backward, strict=True)
    found = [(n, dense * c * 1e12, dense * b * c / f * 1e12) for n, c, f, b in rows]
    return (
        {n: Figure(rate, "FLOP/s", forward_source) for n, rate, _ in found},
        {n: Figure(rate, "FLOP/s", backward_source) for n, _, rate in found},
    )
