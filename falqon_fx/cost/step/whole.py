"""A whole step: its layers, the head and the loss, the optimizer, and the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import get_args

from falqon_fx.cost.step import baseline, layer, mixture
from falqon_fx.cost.step.figures import Figures
from falqon_fx.cost.step.launches import Launch, Part, Timer
from falqon_fx.cost.step.layer import NF4_BYTES, NVFP4_BYTES, Step

RUNS = {
    "falqon": "falqon",
    "falqon_frozen_a": "falqon, A frozen",
    "falqon_int8": "falqon, INT8",
    "falqon_nvfp4": "falqon, NVFP4",
    "peft": "PEFT bf16 + Inductor",
    "nf4": "NF4 QLoRA + Inductor",
}
BASELINE = "peft"
PARTS = (*get_args(Part), "host")
# What is no figure of a card: what is done, and how that is known.
NOTES = {
    "launches, their bytes, and what is kept for backward": "benchmarks/gpu_lens.py: a decoder "
    "layer that is a graph by itself; falqon's adapters are float32, PEFT's bf16",
    "adapter_dtype=fp8": "siblings with one scale a token, r more of K for each; O by the faster "
    "of ours, and the library's on [W b], which is put together each time; dL/dx by the library's",
    "adapter_dtype=fp8, transpose=store": "A is transposed in each step, into columns beside W'; b "
    "is written behind a copy of W where the library makes O",
    "adapter_dtype=bfloat16": "for each product the faster of ours with the adapter in its "
    "epilogue, and the library's with addmm after it, as the tuner chooses",
    "adapter's product in an epilogue": "assumed: bf16 takes twice as long as FP8 there, as the "
    "vendors' peaks say",
    "attention": "causal: half of the pairs; backward is five products to forward's two",
    "NF4": "bitsandbytes' format: four bits and a float32 scale of 64, without its second level; "
    "dequantized once for forward and once for backward, compiled, adapters in bf16",
    "INT8": 'base_dtype="int8", adapters in bfloat16: O by the faster of ours, which is compiled '
    "for sm_80 to sm_89, and torch._int_mm with two passes behind it; dL/dx by cuBLAS, in bf16, of "
    "what is decoded before. assumed: what is fused with what, which the lens has not counted; it "
    "has no stacked experts",
    "NVFP4": 'base_dtype="nvfp4", adapters in bfloat16: for each product the faster of ours, which '
    "decodes W as it reads it (assumed: at half of the FP8 one's rate, as 16 bits have it), and "
    "cuBLAS's of what is decoded before; it has no stacked experts",
    "experts": "of transformers' grouped_mm, each with as many rows; their adapters by PEFT's "
    "target_parameters, traced: torch.baddbmm of all experts' W + s B A, and dL/dW' in bf16; ours "
    "with the library's FP8 product where it has one, else generated kernels, whose dL/dx decodes "
    "W and multiplies in bf16 but on sm_100. assumed: grouped products reach the rates of single "
    "ones. NF4 leaves experts in bf16, as bitsandbytes does",
    "optimizer": "fused AdamW: p, gradient and moments read, p and moments written",
    "host": "launches times their price, hidden behind the GPU unless it is longer; none with CUDA "
    "graphs",
    "not counted": "the embedding, the last norm, clipping, the allocator, guards; dL/dx of the "
    "first layer's q, k and v is counted although nothing needs it",
}
_DENSE = ("falqon_int8", "falqon_nvfp4")  # not of stacked experts
_WITHOUT_FP8 = ("falqon_int8", "peft", "nf4")  # what a card without its units multiplies natively
_FUSED_ADAMW = 36  # tensors in a launch of ATen's multi_tensor_apply with four lists


@dataclass(frozen=True)
class Run:
    """What a step of one kind takes.

    Attributes:
        seconds: of each part; "host" is what the GPU waits for it.
        host: the host's time in all, hidden or not.
        launches: of a layer; of a mixture, of one with experts.
        kept: bytes of all layers that are there for backward alone.
        weights: bytes of all layers' weights.
        library: products of a layer that the library runs because it is faster than ours with the
            adapter in the epilogue.
    """

    seconds: dict[str, float]
    host: float
    launches: int
    kept: int
    weights: float
    library: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def arithmetic(step: Step, figures: Figures, cuda_graphs: bool = False) -> dict[str, Run]:
    """Each of `RUNS` that there is of the decoder."""
    runs = [run for run in RUNS if run not in _DENSE or step.decoder.mixture is None]
    if not figures.has_fp8:
        runs = [run for run in runs if run in _WITHOUT_FP8]
    return {name: _run(name, step, Timer(figures), cuda_graphs) for name in runs}


def layer_of(name: str, step: Step, time: Timer) -> list[Launch]:
    """The launches of a layer of one run, of layers that are all alike."""
    dense = step.decoder.mixture is None
    if name in ("peft", "nf4"):
        run = baseline.whole if dense else mixture.peft
        return run(step, time, nf4=name == "nf4")
    ours = layer.falqon if dense else mixture.falqon
    if name in _DENSE:
        packed, integers = name == "falqon_nvfp4", name == "falqon_int8"
        step = replace(step, adapter_dtype="bfloat16", packed=packed, integers=integers)
    return ours(step, time, train_a=name != "falqon_frozen_a")


def kept(name: str, step: Step) -> int:
    """Bytes of such a layer that are there for backward alone."""
    of = layer.kept if step.decoder.mixture is None else mixture.kept
    if name in _DENSE:
        step = replace(step, adapter_dtype="bfloat16")
    return of(step, name)


def _run(name: str, step: Step, time: Timer, cuda_graphs: bool) -> Run:
    kinds = [replace(step, decoder=decoder) for decoder in step.decoder.kinds]
    layers = [layer_of(name, kind, time) for kind in kinds]
    rest = [*_head(step, time), _optimizer(name, step, time)]
    seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    in_all = sum(one.kernels for one in rest)
    for kind, launches in zip(kinds, layers, strict=True):
        for launch in launches:
            seconds[launch.part] += kind.decoder.layers * launch.seconds
            in_all += kind.decoder.layers * launch.kernels
    for launch in rest:
        seconds[launch.part] += launch.seconds
    host = time.figures.launch.value * in_all
    if name.startswith("falqon"):
        sites = sum(kind.decoder.layers * kind.decoder.sites for kind in kinds)
        host += time.figures.site.value * sites
    if cuda_graphs:
        host = 0.0
    seconds["host"] = max(0.0, host - sum(seconds.values()))
    return Run(
        seconds=seconds,
        host=host,
        launches=sum(one.kernels for one in layers[-1]),
        kept=sum(kind.decoder.layers * kept(name, kind) for kind in kinds),
        weights=sum(
            kind.decoder.layers * (_weights(name, kind) + sum(one.keeps for one in launches))
            for kind, launches in zip(kinds, layers, strict=True)
        ),
        library=sum(
            one.part == "products" and one.name.endswith("(library)") for one in layers[-1]
        ),
    )


def _weights(name: str, step: Step) -> float:
    """Bytes of a layer's weights. NF4 is of linear layers alone, and so is W kept both ways."""
    widths = {"peft": 2.0, "nf4": NF4_BYTES, "falqon_nvfp4": NVFP4_BYTES}
    of_linears = widths.get(name, 1.0)
    if of_linears == 1.0 and step.transpose == "store" and name != "falqon_int8":
        of_linears = 2.0
    of_stacks = 2.0 if name in ("peft", "nf4") else 1.0
    d = step.decoder
    return of_linears * d.linear_weights + of_stacks * d.stacked_weights


def _head(step: Step, time: Timer) -> list[Launch]:
    """The head's product and its dL/dx in bf16, in every run, and the loss over the logits."""
    d, n, rate = step.decoder, step.n, time.figures.bf16_gemm.value
    passes = time.figures.loss_passes.value
    half = passes / 2 * step.a(d.vocabulary)
    loss = time.moving("head", "loss", half, half)
    return [
        time.product("head", n, d.hidden, [d.vocabulary], 2, rate, part="head"),
        time.product("head's dL/dx", n, d.vocabulary, [d.hidden], 2, rate, part="head"),
        replace(loss, kernels=2),
    ]


def _optimizer(name: str, step: Step, time: Timer) -> Launch:
    """Fused AdamW: p, its gradient and both moments read, p and the moments written."""
    frozen, trained, tensors = name == "falqon_frozen_a", 0, 0
    for d in step.decoder.kinds:
        of_a, of_b = d.adapter(step.rank)
        trained += d.layers * (of_b + (0 if frozen else of_a))
        tensors += d.layers * d.sites * (1 if frozen else 2)
    width = 4 if name.startswith("falqon") else 2
    launch = time.moving("optimizer", "AdamW", 4 * width * trained, 3 * width * trained)
    kernels = ceil(tensors / _FUSED_ADAMW)
    return replace(launch, kernels=kernels)
