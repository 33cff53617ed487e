"""Forms in which a frozen base can be held: bytes, error of the cast, KL per label.

    python benchmarks/forms.py [--forms fp8_row int8]

SmolLM2-135M-Instruct, untrained, in float32: the values of each linear layer's W and x are those
that a form can hold, the products are exact. So nothing but the casts is told apart, whether this
library computes in the form or not. Texts and labels are those of ``benchmarks/calibration.py``.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import calibration
import common
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from falqon_fx.site import nvfp4 as of_nvfp4
from falqon_fx.site.numerics import E4M3, amax_to_scale, round_to_fp8

Cast = Callable[[Tensor], Tensor]
BLOCK = 128  # of DeepSeek, Qwen3-FP8, GLM
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def fp8(values: Tensor, amax: Tensor, scale: Any = "pow2") -> Tensor:
    """Values that E4M3 holds with a scale for each ``amax``."""
    factor = amax_to_scale(amax, E4M3, scale)
    return round_to_fp8(values * factor.reciprocal(), E4M3) * factor


def by_row(values: Tensor, scale: Any = "pow2") -> Tensor:
    return fp8(values, values.abs().amax(-1, keepdim=True), scale)


def by_group(values: Tensor, size: int, cast: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Groups of ``size`` neighbours in a row, each with its own amax; the last may be shorter."""
    width = values.shape[-1]
    padded = nn.functional.pad(values, (0, -width % size))
    groups = padded.unflatten(-1, (-1, size))
    return cast(groups, groups.abs().amax(-1, keepdim=True)).flatten(-2)[..., :width]


def by_block(values: Tensor, scale: Any = "amax") -> Tensor:
    """One scale for each 128 x 128, float32 or a power of two."""
    out, width = values.shape
    padded = nn.functional.pad(values, (0, -width % BLOCK, 0, -out % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    cast = fp8(blocks, blocks.abs().amax((1, 3), keepdim=True), scale)
    return cast.flatten(2, 3).flatten(0, 1)[:out, :width]


def by_row_least(values: Tensor) -> Tensor:
    """Of 32 scales of a row, from amax / 448 to twice that, the one that moves it least."""
    amax = values.abs().amax(-1, keepdim=True)
    best, least = values, torch.full_like(amax, float("inf"))
    for step in range(32):
        cast = fp8(values, amax * 2 ** (step / 32), "amax")
        off = (cast - values).square().sum(-1, keepdim=True)
        best, least = torch.where(off < least, cast, best), torch.minimum(off, least)
    return best


def int8(values: Tensor) -> Tensor:
    """One float32 scale for each row, codes from -127 to 127."""
    scale = (values.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo().tiny)
    return (values / scale).round() * scale


def nvfp4(values: Tensor) -> Tensor:
    """E2M1 with a scale in E4M3 for each 16 of a row, and one in float32 for all."""
    whole = values.abs().amax().clamp(min=torch.finfo().tiny) / (448 * 6)

    def cast(groups: Tensor, amax: Tensor) -> Tensor:
        scale = round_to_fp8(amax / 6 / whole, E4M3) * whole
        return to_e2m1(groups / scale.clamp(min=torch.finfo().tiny)) * scale

    return by_group(values, 16, cast)


def nvfp4_of_this_library(values: Tensor) -> Tensor:
    """The same with a power of two for all, as base_dtype="nvfp4" has it."""
    scale = of_nvfp4.tensor_scale(values.abs().amax(), "pow2")
    return of_nvfp4.decode(of_nvfp4.cast(values, scale), scale, torch.float32)


def nf4(values: Tensor) -> Tensor:
    """As bitsandbytes casts it for QLoRA: one float32 scale for each 64, which takes the bytes of
    NVFP4. (Its "double quantization" of the scales would take 0.516.)
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(values.contiguous(), blocksize=64, quant_type="nf4")
    cast: Tensor = dequantize_4bit(codes, state)
    return cast


def mxfp4(values: Tensor) -> Tensor:
    """E2M1 with a power of two for each 32 of a row, the least whose codes hold all of them."""

    def cast(groups: Tensor, amax: Tensor) -> Tensor:
        scale = (amax / 6).clamp(min=torch.finfo().tiny).log2().ceil().exp2()
        return to_e2m1(groups / scale) * scale

    return by_group(values, 32, cast)


def to_e2m1(values: Tensor) -> Tensor:
    """The nearest, of those that are as near the one nearer to zero; 6 beyond."""
    middles = (E2M1[1:] + E2M1[:-1]) / 2
    return E2M1[torch.bucketize(values.abs().clamp(max=6), middles)] * values.sign()


def same(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Form:
    """How W and x are cast, and the bytes that a value of W takes in a matrix of 4096 x 4096."""

    title: str
    weight: Cast
    x: Cast
    bytes: float


def mx(values: Tensor) -> Tensor:
    return by_group(values, 32, fp8)


FORMS = {
    "fp8_row": Form("FP8, a power of two a row and token", by_row, by_row, 1 + 4 / 4096),
    "fp8_row_amax": Form(
        "FP8, amax / 448 a row and token",
        lambda w: by_row(w, "amax"),
        lambda x: by_row(x, "amax"),
        1 + 4 / 4096,
    ),
    "fp8_tensor": Form(
        "FP8, a power of two for all of W, and a token's of x",
        lambda w: fp8(w, w.abs().amax()),
        by_row,
        1 + 4 / 4096**2,
    ),
    "mxfp4_row": Form(
        "MXFP4, cast again to FP8 by row", lambda w: by_row(mxfp4(w)), by_row, 1 + 4 / 4096
    ),
    "fp8_block": Form(
        "FP8 blocks of 128 x 128, x in groups of 128",
        by_block,
        lambda x: by_group(x, BLOCK, lambda g, amax: fp8(g, amax, "amax")),
        1 + 4 / BLOCK**2,
    ),
    "fp8_block_row": Form(
        "FP8 blocks, cast again by row", lambda w: by_row(by_block(w)), by_row, 1 + 4 / 4096
    ),
    "fp8_block_token": Form(
        "FP8 blocks of 128 x 128, x by token", by_block, by_row, 1 + 4 / BLOCK**2
    ),
    "fp8_block_row_amax": Form(
        "FP8 blocks, cast again by row, amax / 448 a row and token",
        lambda w: by_row(by_block(w), "amax"),
        lambda x: by_row(x, "amax"),
        1 + 4 / 4096,
    ),
    "fp8_block_row_least": Form(
        "FP8 blocks, cast again by row, the scale of a row that loses least",
        lambda w: by_row_least(by_block(w)),
        by_row,
        1 + 4 / 4096,
    ),
    "fp8_block_pow2_row": Form(
        "FP8 blocks with powers of two, cast again by row",
        lambda w: by_row(by_block(w, "pow2")),
        by_row,
        1 + 4 / 4096,
    ),
    "mxfp8": Form("MXFP8, both", mx, mx, 1 + 1 / 32),
    "int8": Form("INT8, a scale a row and token", int8, int8, 1 + 4 / 4096),
    "int8_fp8": Form("W in INT8, x in FP8", int8, by_row, 1 + 4 / 4096),
    "nvfp4": Form("W in NVFP4, x in FP8", nvfp4, by_row, 0.5 + 1 / 16),
    "nvfp4_both": Form("NVFP4, both", nvfp4, nvfp4, 0.5 + 1 / 16),
    "nvfp4_exact": Form("W in NVFP4, x exact", nvfp4, same, 0.5 + 1 / 16),
    "nvfp4_pow2": Form(
        "W in NVFP4, a power of two for all of it, x in FP8",
        nvfp4_of_this_library,
        by_row,
        0.5 + 1 / 16,
    ),
    "nf4": Form("W in NF4, x in FP8", nf4, by_row, 0.5 + 4 / 64),
    "nf4_exact": Form("W in NF4, x exact", nf4, same, 0.5 + 4 / 64),
    "fp8_exact": Form("W in FP8 by row, x exact", by_row, same, 1 + 4 / 4096),
    "int8_exact": Form("W in INT8, x exact", int8, same, 1 + 4 / 4096),
}


@dataclass(frozen=True)
class Run:
    """One form. ``error``: ‖cast - W‖ / ‖W‖ over all layers."""

    form: str
    bytes: float
    error: float
    kl: float
    kl_error: float
    labels: int
    kl_reviews: float
    kl_reviews_error: float
    labels_reviews: int


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What `falqon_fx.prepare` casts, by path."""
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and ".layers." in name}


@torch.no_grad()
def measure(bench: calibration.Bench, name: str) -> Run:
    form, model = FORMS[name], copy.deepcopy(bench.base)
    off, norm = [], []
    for layer in layers(model).values():
        cast = form.weight(layer.weight)
        off.append(float((cast - layer.weight).square().sum()))
        norm.append(float(layer.weight.square().sum()))
        layer.weight.copy_(cast)
        layer.register_forward_pre_hook(lambda _, given: (form.x(given[0]),))
    found = [calibration.log_probabilities(model, e) for e in (bench.held_out, bench.reviews)]
    judged = [calibration.divergence(*pair) for pair in zip(bench.wanted, found, strict=True)]
    error = math.sqrt(math.fsum(off) / math.fsum(norm))
    return Run(name, form.bytes, error, *judged[0], *judged[1])


def changed_by_row() -> float:
    """The share of normally distributed values in FP8 blocks with powers of two that changes where
    they are cast again by row, at the standard deviation with the largest. (Those of SmolLM2 are
    decoded from eight bits, and none is small enough.)
    """
    values = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    each = (by_block(values * 2 ** (i / 16), "pow2") for i in range(16))
    return max(float((by_row(blocks) != blocks).float().mean()) for blocks in each)


HEADER = ("form", "bytes a weight", "error of W", "KL", "KL of reviews")


def summary(runs: Sequence[Run]) -> list[list[str]]:
    return [
        [
            FORMS[run.form].title,
            f"{run.bytes:.3f}",
            f"{run.error:.4f}",
            f"{run.kl:.4f} ± {run.kl_error:.4f}",
            f"{run.kl_reviews:.4f} ± {run.kl_reviews_error:.4f}",
        ]
        for run in runs
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="*", default=[*FORMS], choices=[*FORMS])
    args = parser.parse_args(argv)
    console, file = Console(), common.result_path("forms", ".json")
    runs = [Run(**run) for run in common.read_json(file)["runs"]] if file.exists() else []
    bench = calibration.Bench(0)
    changed = changed_by_row()
    done = {run.form for run in runs}  # an interrupted benchmark goes on
    for name in args.forms:
        if name in done:
            continue
        runs.append(measure(bench, name))
        console.print(runs[-1], soft_wrap=True, highlight=False)
        about = {"environment": common.environment(), "changed_by_row": changed}
        common.write_json(file, {**about, "runs": [asdict(run) for run in runs]})
    table = Table(*HEADER)
    for row in summary(runs):
        table.add_row(*row)
    console.print(table)
    page = common.markdown(
        "Forms of a frozen base, untrained, by the casts alone",
        common.environment(),
        HEADER,
        summary(runs),
    )
    page += f"\n{runs[0].labels} labels of chats, {runs[0].labels_reviews} of reviews; ± is a "
    page += "standard error over labels. Bytes: of a matrix of 4096 x 4096.\n"
    page += "\nOf normally distributed values in FP8 blocks with powers of two at most "
    page += f"{changed:.4%} change where they are cast again by row.\n"
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
