"""Everything that needs a GPU, in one call: correctness, step time, memory.

    python benchmarks/gpu.py --out "$OUT"                 # on the machine with the card
    python benchmarks/gpu.py --device cpu --sizes tiny    # a rehearsal without one

Needs torch and falqon-fx's own requirements alone. First the ops and the activation-cast kernels
are held against the CPU; a failure ends the run. Then a Llama-shaped decoder with LoRA on all its
linear layers trains in bf16 (eager, Inductor) and through falqon, one after the other in the same
process on the same data; each is timed several times. Memory is what the allocator really held at
the peak of a step.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import falqon_fx
from falqon_fx.kernels.activation_cast import activation_cast
from falqon_fx.kernels.spec import ActivationCastSpec
from falqon_fx.numerics import E4M3, amax_to_scale, encode_fp8, round_to_fp8


@dataclass(frozen=True)
class Size:
    """A decoder and its batch."""

    width: int
    hidden: int
    heads: int
    layers: int
    batch: int
    length: int
    rank: int = 64


SIZES = {
    "tiny": Size(64, 128, 4, 2, 2, 16, 8),
    "1b": Size(2048, 8192, 32, 16, 8, 512),
    "7b-quarter": Size(4096, 11008, 32, 8, 8, 512),
    "7b-quarter-long": Size(4096, 11008, 32, 8, 1, 4096),
}
CONTENDERS = ("eager", "inductor", "falqon")
VOCABULARY = 32000


# ---------------------------------------------------------------- model


class LoraLinear(nn.Module):
    """base(x) + B(A(x)), everything bf16: the fastest form of plain LoRA."""

    def __init__(self, features: int, out: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(features, out, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Block(nn.Module):
    """A decoder layer with seven sites."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, hidden, rank = size.width, size.hidden, size.rank
        self.heads = size.heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (LoraLinear(width, width, rank) for _ in range(4))
        self.gate, self.up = (LoraLinear(width, hidden, rank) for _ in range(2))
        self.down = LoraLinear(hidden, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Embedding, blocks, head; only LoRA is trained."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


# ---------------------------------------------------------------- correctness


def check_activation_cast(device: str) -> str:
    """The kernel against the CPU's cast: equal bytes, equal scales."""
    if device != "cuda":
        return "skipped: no GPU"
    x = torch.randn(333, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    for granularity in ("row", "tensor"):
        for scale_mode in ("amax", "pow2"):
            spec = ActivationCastSpec.for_width(
                x.shape[1], input_dtype="bfloat16", granularity=granularity, scale=scale_mode
            )
            q, scale = activation_cast(x.to(device), spec)
            wide = x.float()
            amax = wide.abs().amax(1, keepdim=True) if granularity == "row" else wide.abs().amax()
            expected = amax_to_scale(amax, E4M3, scale_mode)
            code = encode_fp8(round_to_fp8(wide * expected.reciprocal(), E4M3), E4M3)
            torch.testing.assert_close(scale.cpu(), expected, rtol=0, atol=0)
            torch.testing.assert_close(q.cpu().view(torch.uint8), code, rtol=0, atol=0)
    return "bit-equal to the CPU"


def check_training(device: str) -> str:
    """Three steps of a tiny decoder: the card against the CPU, falqon on both."""
    losses, codes = {}, {}
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = Decoder(SIZES["tiny"]).to(place, torch.bfloat16)
        step = stepper(model, "falqon", {"inner": "eager"}, SIZES["tiny"], place)
        losses[place] = [step() for _ in range(3)]
        codes[place] = [s.code.cpu() for s in falqon_fx.adapters(model).values()]
    a, b = torch.tensor(losses["cpu"]), torch.tensor(losses[device])
    # Both run the same casts; GEMMs differ in summation order, at most some bf16 roundings a layer.
    torch.testing.assert_close(a, b, rtol=8 * 2.0**-8, atol=0)
    same = statistics.fmean(
        (x == y).float().mean().item() for x, y in zip(codes["cpu"], codes[device], strict=True)
    )
    return f"losses agree; {same:.2%} of the FP8 weights are the same after three steps"


# ---------------------------------------------------------------- speed


def stepper(
    model: nn.Module, backend: str, options: dict[str, Any], size: Size, device: str
) -> Callable[[], float]:
    """One training step on fixed data, as a function."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    call: Any = model
    if backend != "eager":
        call = torch.compile(model, backend=backend, options=options or None)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (size.batch, size.length), generator=generator).to(device)

    def step() -> float:
        loss = call(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


@dataclass(frozen=True)
class Row:
    """What one contender did at one size."""

    size: str
    contender: str
    tokens: int
    seconds: list[float]  # median of each round
    first_step_seconds: float
    peak_gib: float


def measure(name: str, size: Size, device: str, rounds: int, steps: int) -> list[Row]:
    """All contenders, one after the other: built, measured in every round, freed."""
    rows = []
    for contender in CONTENDERS:
        torch.manual_seed(0)
        with torch.device(device):
            model = Decoder(size).to(torch.bfloat16)
        step = stepper(model, contender, {}, size, device)
        start = time.perf_counter()
        step()
        first = time.perf_counter() - start
        for _ in range(2):
            step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = [statistics.median(timed(step) for _ in range(steps)) for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        rows.append(Row(name, contender, size.batch * size.length, seconds, first, peak))
        print(rows[-1], flush=True)
        del model, step
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def timed(step: Callable[[], float]) -> float:
    """Seconds of a step; reading the loss waits for the card."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(rows: list[Row]) -> list[str]:
    """Markdown: medians, spreads and the ratio to Inductor."""
    lines = [
        "| size | tokens | run | s / step | spread | ÷ inductor | first step, s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = {row.size: statistics.median(row.seconds) for row in rows if row.contender == "inductor"}
    for row in rows:
        middle = statistics.median(row.seconds)
        lines.append(
            f"| {row.size} | {row.tokens} | {row.contender} | {middle:.4f} | "
            f"{max(row.seconds) - min(row.seconds):.4f} | {middle / base[row.size]:.3f} | "
            f"{row.first_step_seconds:.1f} | {row.peak_gib:.2f} |"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--sizes", nargs="+", default=["1b", "7b-quarter", "7b-quarter-long"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    args = parser.parse_args(argv)
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    about = {
        "device": card,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "falqon-fx": falqon_fx.__version__,
        "command": " ".join(["python", "benchmarks/gpu.py", *(argv or sys.argv[1:])]),
        "activation cast": check_activation_cast(args.device),
        "training": check_training(args.device),
    }
    print(about, flush=True)
    kernels = gpu_kernels.report(args.device, args.out)
    print("\n".join(kernels), flush=True)
    rows = []
    for name in args.sizes:
        rows += measure(name, SIZES[name], args.device, args.rounds, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"about": about, "rows": [asdict(row) for row in rows]}
    (args.out / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
    with (args.out / "gpu.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    page = "\n".join(
        [f"- {key}: {value}" for key, value in about.items()] + ["", *table(rows), "", *kernels, ""]
    )
    (args.out / "gpu.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
