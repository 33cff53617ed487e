"""A layer of stacked experts with LoRA on a CPU: seconds a step of falqon and of others.

    python benchmarks/experts.py               # E = 32 and 128, top 8; five minutes on 2 cores

The shapes are half of Qwen3-30B-A3B's (hidden 2048, experts of 768) in bfloat16, rank 16 on
gate_up and down. The ways take turns in each round, the first of them another each time, and route
each step anew. The median counts; beside it the least and the most.

    PEFT          as it is: W + s·B·A of all experts in each pass, uncompiled
    PEFT, traced  `trace_param_wrappers`, compiled by Inductor
    split         grouped products of W, A and B, each by itself, written plainly; compiled
    falqon        the same model traced, prepared, and compiled with backend="falqon"
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import environment, markdown, result_path, write_json
from torch import Tensor, nn
from torch.nn import functional as F

import falqon_fx
from falqon_fx.integrations.peft import trace_param_wrappers

RANK, ALPHA, TOP = 16, 32, 8
STACKS = ("gate_up_proj", "down_proj")


class Layer(nn.Module):
    """The experts alone: what is routed comes from outside."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, ids, weights)
        return y


class Split(nn.Module):
    """The same with the adapter's products beside those of W."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.experts = len(weights[STACKS[0]])
        for name, weight in weights.items():
            experts, out, features = weight.shape
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))
            a, b = torch.randn(experts, RANK, features) / 50, torch.randn(experts, out, RANK) / 50
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(b))

    def product(self, name: str, x: Tensor, offs: Tensor) -> Tensor:
        w, a, b = (getattr(self, f"{name}{end}") for end in ("", "_a", "_b"))
        base = F.grouped_mm(x, w.mT, offs=offs)
        low = F.grouped_mm(x, a.to(x.dtype).mT, offs=offs)
        return base + ALPHA / RANK * F.grouped_mm(low, b.to(x.dtype).mT, offs=offs)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        in_order, perm = torch.sort(ids.reshape(-1))
        last = self.experts - 1
        counts = torch.histc(in_order.float(), bins=self.experts, min=0, max=last)
        offs = torch.cumsum(counts, dim=0, dtype=torch.int32)
        gate, up = self.product("gate_up_proj", x[perm // TOP], offs).chunk(2, dim=-1)
        y = self.product("down_proj", F.silu(gate) * up, offs)
        y = y * weights.reshape(-1)[perm].unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.shape[0])
        return y[inverse].view(*ids.shape, -1).sum(1).to(x.dtype)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: of one thread"
    )
    parser.add_argument("--result", type=Path)
    given = parser.parse_args(argv)
    if given.clock == "cpu":  # what other programs do beside it plays little part
        torch.set_num_threads(1)
    rows = [measure(given, experts) for experts in given.experts]
    about = environment()
    path = given.result or result_path("experts", ".json")
    write_json(path, {**about, "tokens": given.tokens, "rank": RANK, "top": TOP, "rows": rows})
    names = list(rows[0]["seconds"])
    table = []
    for row in rows:
        seconds = [_shown(row["seconds"][name]) for name in names]
        table.append([row["experts"], *seconds, f"{row['ratio']:.2f}", f"{row['memory']:.3f}"])
    header = ["E", *(f"{name}, s" for name in names), "falqon / fastest other", "weights"]
    of = "seconds a step" if given.clock == "wall" else "seconds of one thread's CPU time a step"
    text = markdown(f"Stacked experts, {of}", about, header, table)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def measure(given: Any, experts: int) -> dict[str, Any]:
    """The seconds of each way, and the share of bytes that `prepare` leaves."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=given.hidden,
        moe_intermediate_size=given.inner,
        num_experts=experts,
        num_experts_per_tok=TOP,
    )
    config._experts_implementation = "grouped_mm"
    layer = Layer(config).to(torch.bfloat16).requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    split = Split({name: getattr(layer.experts, name).detach() for name in STACKS})
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in STACKS],
    )
    plain: Any = peft.get_peft_model(layer, lora)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    traced, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    for model in (traced, ours):
        trace_param_wrappers(model)
    report = falqon_fx.prepare(ours, progress=False)
    ways: dict[str, Callable[..., Tensor]] = {
        "PEFT": plain,
        "PEFT, traced": torch.compile(traced),
        "split": torch.compile(split),
        "falqon": torch.compile(ours, backend="falqon"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    clock = time.process_time if given.clock == "cpu" else time.perf_counter
    for turn in range(given.rounds + 2):
        batch = _batch(given, experts)
        order.append(order.pop(0))
        for name in order:
            start = clock()
            ways[name](*batch).float().square().mean().backward()
            if turn > 1:  # the first compile
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    others = min(value for name, value in medians.items() if name != "falqon")
    return {
        "experts": experts,
        "seconds": seconds,
        "ratio": medians["falqon"] / others,
        "memory": report.bytes_after / report.bytes_before,
    }


def _shown(seconds: list[float]) -> str:
    """The median, the least and the most."""
    return f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"


def _batch(given: Any, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(given.tokens, given.hidden, dtype=torch.bfloat16).requires_grad_()
    scores = torch.randn(given.tokens, experts).softmax(-1)
    weights, ids = scores.topk(TOP, dim=-1)
    return x, ids, weights.to(torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
