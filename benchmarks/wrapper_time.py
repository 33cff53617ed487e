"""What the backend spends around a compiled graph in each call, with nothing in the graph.

    python benchmarks/wrapper_time.py [--repeats 9]

Stacks of attention and MLP blocks, seven linears each, rank 8, bf16, 32 features: the contents of
the weights lie in the cache, so what is timed is the host's own work. The inner compiler gives a
graph that returns at once. Process time (CPU seconds of this process), of each repeat the mean of
its calls. "4096" has weights of 4096 x 4096, whose sampled contents come from memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import common
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import falqon_fx
from falqon_fx import backend

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = ((7, 32), (56, 32), (224, 32), (7, 4096))  # sites, features
COLUMNS = ["update", "base weights", "sites", "features", "min, µs", "median, µs", "min, µs a site"]


class Block(nn.Module):
    """One layer of a transformer without what is no linear."""

    def __init__(self, features: int) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Linear(features, features, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, o, gate, up, down = (self.get_submodule(name) for name in NAMES)
        x = o(q(x) + k(x) + v(x))
        result: Tensor = down(nn.functional.silu(gate(x)) * up(x))
        return result


def returns_at_once(*_: Any) -> Callable[..., Any]:
    """In the place of the inner compiler."""
    return lambda *inputs: ()


def wrapper(update: str, prepared: bool, sites: int, features: int) -> Callable[[], Any]:
    """One call of what the backend gives Dynamo, with the arguments that Dynamo gives it."""
    torch._dynamo.reset()
    blocks = nn.Sequential(*(Block(features) for _ in range(sites // len(NAMES))))
    model = get_peft_model(blocks, LoraConfig(r=8, target_modules=list(NAMES)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    config = falqon_fx.FalqonConfig.from_options({"update": update, "inner": "eager"})
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    calls: list[Callable[[], Any]] = []

    def compile_graph(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        with mock.patch.object(backend, "_compile", returns_at_once):
            run = backend.falqon(gm, inputs, options={"config": config})

        def record(*args: Any) -> Any:
            calls.append(lambda: run(*args))
            run(*args)
            return gm(*args)

        return record

    torch.compile(model, backend=compile_graph)(torch.randn(4, features, dtype=torch.bfloat16))
    (call,) = calls
    return call


def measure(update: str, prepared: bool, sites: int, features: int, repeats: int) -> list[str]:
    """One row of the table."""
    call = wrapper(update, prepared, sites, features)
    count = max(20, 14_000 // sites)
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.process_time()
        for _ in range(count):
            call()
        times.append((time.process_time() - start) / count * 1e6)
    least, middle = min(times[1:]), statistics.median(times[1:])
    weights = "FP8 alone" if prepared else "bf16 and FP8"
    numbers = (f"{least:.0f}", f"{middle:.0f}", f"{least / sites:.2f}")
    return [update, weights, str(sites), str(features), *numbers]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(argv)
    rows = []
    for update in ("adapter", "rows"):
        for prepared in (False, True):
            for sites, features in CASES if update == "adapter" else CASES[:3]:
                rows.append(measure(update, prepared, sites, features, args.repeats))
                print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    page = common.markdown("The backend's own time a call", common.environment(), COLUMNS, rows)
    file = common.result_path("wrapper_time", ".md")
    file.write_text(page, encoding="utf-8")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()
