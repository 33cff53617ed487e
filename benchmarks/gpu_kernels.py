"""The kernels of `benchmarks/gpu.py`: each candidate against float64 on the device, then timed.

Rehearse without a GPU: ``python benchmarks/gpu_kernels.py --device cpu`` (interpreted, tiny).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from falqon_fx import FalqonConfig, MergedAdapter, cuda
from falqon_fx import update as reference
from falqon_fx.kernels import dispatch
from falqon_fx.kernels.choice import Choice, choices_for
from falqon_fx.kernels.gemm import Piece, Product
from falqon_fx.merged import create
from falqon_fx.numerics import E4M3, E5M2

KERNELS = ("triton", "scaled_mm", "dequantize")
# (tokens, out, in, rank) of what is checked, and of Llama-7B's layers, which are timed.
CHECKED = ((256, 512, 1024, 16), (100, 1040, 272, 64), (1, 256, 4096, 8))
TINY = ((17, 48, 64, 16),)
TIMED = tuple(
    (n, out, features, rank)
    for rank in (16, 64)
    for n in (512, 4096, 16384)
    for out, features in ((4096, 4096), (11008, 4096), (4096, 11008))
)


@dataclass(frozen=True)
class Checked:
    """The largest error of one kernel, in units of its bound (below 1)."""

    what: str
    kernel: str
    shape: tuple[int, ...]
    worst: float


def fp8(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 4).to(dtype).to(device)


def positive(rows: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 1, generator=generator) + 0.1).to(device)


def bound(q: Tensor, weight: Tensor, scales: Tensor, exact: Tensor) -> Tensor:
    """How far a bfloat16 result may be off.

    Tensor cores add 32 products at a time, and keep at least 13 bits behind the leading one of the
    largest addend (as has been reported of Hopper's). Each of the 32 loses 2**-13 of that largest
    one, and each of the K/32 sums 2**-13 of what has been added up so far; both are below |q| |W|.
    "dequantize" rounds the raw sum to bfloat16, and so does the result.
    """
    steps = q.shape[1] / 32 + 32
    gauge = q.double().abs() @ weight.double().abs().t() * scales
    return gauge * (steps * 2.0**-13) + exact.abs() * 2.0**-6


def check_products(device: str) -> Iterator[Checked]:
    """Forward and dL/dx by each kernel that takes them.

    Raises AssertionError where one is beyond its bound.
    """
    for shape in CHECKED if device == "cuda" else TINY:
        n, out, features, rank = shape
        q, q_scale = fp8(n, features, E4M3, device, 0), positive(n, device, 1)
        merged, scale = fp8(out + rank, features, E4M3, device, 2), positive(out + rank, device, 3)
        g, g_scale = fp8(n, out, E5M2, device, 4), positive(n, device, 5)
        pieces = [Piece(merged[:out], scale[:out]), Piece(merged[out:], scale[out:])]
        for kernel in KERNELS:
            options = dispatch.Options(kernel=kernel)
            try:
                y, a = dispatch.forward(
                    q, q_scale, pieces, 1, torch.bfloat16, torch.bfloat16, options
                )
                product = Product(g, g_scale, merged[:out])
                dx = dispatch.grad_x([product], None, None, torch.bfloat16, options)
            except ValueError as error:  # it does not take this shape, and says why
                print(f"{kernel} {shape}: {error}", flush=True)
                continue
            scales = q_scale.double() * scale.double().t()
            yield _compare("O, O_A", kernel, shape, torch.cat([y, a], 1), q, merged, scales)
            yield _compare("dL/dx", kernel, shape, dx, g, merged[:out].t(), g_scale.double())


def _compare(
    what: str,
    kernel: str,
    shape: tuple[int, ...],
    actual: Tensor,
    q: Tensor,
    weight: Tensor,
    scales: Tensor,
) -> Checked:
    exact = q.double() @ weight.double().t() * scales
    error = (actual.double() - exact).abs() / bound(q, weight, scales, exact).clamp(min=1e-300)
    worst = error.max().item()
    assert worst < 1, f"{what} by {kernel}, {shape}: {worst:.2f} of the bound"
    return Checked(what, kernel, shape, worst)


def make_state(out: int, features: int, rank: int) -> tuple[MergedAdapter, Tensor, Tensor, Tensor]:
    """A site whose sums are exact in float32: small multiples of powers of two."""
    generator = torch.Generator().manual_seed(out)

    def dyadic(rows: int, columns: int, most: int, step: float) -> Tensor:
        return torch.randint(-most, most + 1, (rows, columns), generator=generator) * step

    base, lora_a = dyadic(out, features, 16, 2.0**-3), dyadic(rank, features, 16, 2.0**-3)
    lora_b = dyadic(out, rank, 64, 2.0**-6)
    state = create("site", base, lora_a, lora_b, 2.0, FalqonConfig())
    lora_b += dyadic(out, rank, 16, 2.0**-8)
    return state, base, lora_a, lora_b


def check_update(device: str) -> str:
    """The update's kernels against the CPU op, bit for bit.

    Raises AssertionError where a byte, a scale or a counter differs.
    """
    shapes = ((512, 256, 16), (96, 1024, 16)) if device == "cuda" else ((48, 32, 16),)
    results = []
    for place in ("cpu", device):
        made = [make_state(*shape) for shape in shapes]
        states = [[t.to(place) for t in state.tensors] for state, *_ in made]
        columns = [[*column] for column in zip(*states, strict=True)]
        base, lora_a, lora_b = ([m[i].to(place) for m in made] for i in (1, 2, 3))
        # The first is the reference; a second run on "cpu" is the kernels, interpreted.
        run = cuda.proxy_update_ if results else reference.proxy_update_
        run(*columns, lora_b, lora_a, base, [2.0] * len(made), str(made[0][0].plan))
        results.append([t.cpu() for column in columns for t in column])
    for expected, actual in zip(*results, strict=True):
        same = expected.view(torch.uint8) == actual.view(torch.uint8)
        assert same.all(), f"{(~same).sum().item()} bytes of {tuple(expected.shape)} differ"
    return f"{len(shapes)} sites bit-equal to the CPU, random bits included"


def time_products(device: str) -> list[Choice]:
    """What `kernel="auto"` chooses on Llama-7B's shapes, with the seconds of each candidate."""
    for n, out, features, rank in TIMED if device == "cuda" else TINY:
        q, q_scale = fp8(n, features, E4M3, device, 0), positive(n, device, 1)
        merged, scale = fp8(out + rank, features, E4M3, device, 2), positive(out + rank, device, 3)
        g, g_scale = fp8(n, out, E5M2, device, 4), positive(n, device, 5)
        o_a = torch.randn(n, rank, device=device).bfloat16()
        pieces = [Piece(merged[:out], scale[:out]), Piece(merged[out:], scale[out:])]
        pending = Piece(merged[:out], scale[:out], None, o_a, o_a.new_zeros(out, rank))
        bf16, options = torch.bfloat16, dispatch.Options()
        dispatch.forward(q, q_scale, pieces, 1, bf16, bf16, options)
        dispatch.forward(q, q_scale, pieces[1:], 1, bf16, bf16, options)
        dispatch.forward(q, q_scale, [pending], 0, bf16, bf16, options)
        dispatch.grad_x([Product(g, g_scale, merged[:out])], None, None, bf16, options)
        dispatch.grad_b(g.to(bf16), o_a, 1.0, torch.float32, "auto")
    if device == "cpu":
        return []
    return choices_for(torch.device("cuda", torch.cuda.current_device())).all()


def time_update(device: str) -> list[float]:
    """Seconds of one update of a Llama-7B layer's seven sites, nine times; B changes each time."""
    square, up, down = (4096, 4096, 16), (11008, 4096, 16), (4096, 11008, 16)
    shapes = (square,) * 4 + (up, up, down) if device == "cuda" else ((48, 32, 16),)
    made = [make_state(*shape) for shape in shapes]
    columns = [[t.to(device) for t in column] for column in zip(*(m[0].tensors for m in made))]
    base, lora_a, lora_b = ([m[i].to(device) for m in made] for i in (1, 2, 3))

    def run() -> None:
        torch._foreach_add_(lora_b, 2.0**-8)
        cuda.proxy_update_(*columns, lora_b, lora_a, base, [2.0] * len(made), str(made[0][0].plan))

    run()
    return [timed(run, device) for _ in range(9 if device == "cuda" else 1)]


def timed(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def report(device: str, out: Path) -> list[str]:
    """Checks and times everything, writes ``kernels.json``, returns lines of markdown."""
    checked = [*check_products(device)]
    update = check_update(device)
    choices, seconds = time_products(device), time_update(device)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "checked": [asdict(c) for c in checked],
        "update": update,
        "update_seconds": seconds,
        "choices": [asdict(c) for c in choices],
    }
    (out / "kernels.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = ["| result | kernel | tokens, out, in, rank | error / bound |", "|---|---|---|---|"]
    lines += [f"| {c.what} | {c.kernel} | {c.shape} | {c.worst:.3f} |" for c in checked]
    lines += ["", f"- update: {update}"]
    lines += [f"- update of one layer's sites: {statistics.median(seconds):.6f} s"]
    return lines + [f"- {choice}" for choice in choices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args()
    print("\n".join(report(args.device, args.out)))


if __name__ == "__main__":
    main()
