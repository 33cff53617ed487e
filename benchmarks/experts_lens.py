"""What a GPU would be told to do in the experts of a layer, seen without a GPU.

    python benchmarks/experts_lens.py [--experts 4 128] [--tokens 4096] [--results]

As `gpu_lens.py`, of transformers' experts of Qwen3-MoE (sizes of Qwen3-30B-A3B) with PEFT's
adapters on gate_up and down: how many kernels are launched in a step for each number of experts,
which, and how many bytes they read and write. Routing comes from outside.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import common
import peft
import torch
import transformers
from lens import fake_gpu
from lens.launches import Launch, Launches
from lens.lens import Run, trace
from lens.models import Adapter
from lens.passes import Passes, Tokens
from torch import Tensor, nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from falqon_fx.integrations.peft import trace_param_wrappers

STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Sizes:
    """Of a layer's experts, and of a step."""

    hidden: int = 2048
    inner: int = 768
    top: int = 8
    tokens: int = 4096
    rank: int = 16
    implementation: str = "grouped_mm"  # of transformers


class Experts(nn.Module):
    """The experts alone."""

    def __init__(self, sizes: Sizes, experts: int) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(
            hidden_size=sizes.hidden, moe_intermediate_size=sizes.inner, num_experts=experts
        )
        config._experts_implementation = sizes.implementation
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, ids, weights)
        return y


def look(sizes: Sizes, experts: int, kernel: str = "auto") -> tuple[list[Launch], list[Launch]]:
    """The launches of a forward and a backward pass with so many experts."""
    with torch.device("meta"):
        plain = Experts(sizes, experts).to(torch.bfloat16).requires_grad_(False)
        names = [f"experts.{name}" for name in STACKS]
        lora = peft.LoraConfig(r=sizes.rank, target_modules=[], target_parameters=names)
        model: Any = peft.get_peft_model(plain, lora)
        trace_param_wrappers(model)
        x = torch.empty(sizes.tokens, sizes.hidden, dtype=torch.bfloat16, requires_grad=True)
        ids = torch.empty(sizes.tokens, sizes.top, dtype=torch.int64)
        weights = torch.empty(sizes.tokens, sizes.top, dtype=torch.bfloat16)
    with fake_gpu.h100(), fake_gpu.compiled_graphs() as graphs:
        trace(model, (x, ids, weights), Run("falqon", Adapter(sizes.rank), {"kernel": kernel}))
        found = []
        for graph in graphs:
            launches = Launches(
                Passes(
                    Tokens(1, sizes.tokens, sizes.hidden), [graph.inputs[i] for i in graph.static]
                )
            )
            graph.call(launches)
            found.append(launches.made)
    forward, backward = found
    return forward, backward


def counts(launches: Sequence[Launch]) -> Counter[str]:
    """How often each kernel is launched; those that Inductor writes are one."""
    return Counter("inductor's" if x.kernel.startswith("triton_") else x.kernel for x in launches)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--results", action="store_true", help="write benchmarks/results/")
    given = parser.parse_args(argv)
    rows = []
    for experts in given.experts:
        for name, launches in zip(
            ("forward", "backward"),
            look(Sizes(tokens=given.tokens), experts, given.kernel),
            strict=True,
        ):
            each = ", ".join(f"{count} {name}" for name, count in sorted(counts(launches).items()))
            read, written = (sum(getattr(x, way) for x in launches) for way in ("reads", "writes"))
            sizes = [f"{size / 2**20:.0f}" for size in (read, written)]
            rows.append([experts, name, len(launches), *sizes, each])
    header = ("E", "", "launches", "read, MiB", "written, MiB", "of these")
    about = common.environment()
    text = common.markdown(
        "What a GPU would launch for the experts of a layer", about, header, rows
    )
    print(text)
    if given.results:
        (common.RESULTS / "experts_lens.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
