"""Time and memory of `falqon_fx.explain` on the meta device, by number of layers.

    python benchmarks/explain_time.py [--layers 10 20 40 80]

A Llama of 70B proportions (hidden 8192, 64 heads and 8 for keys and values, 28672 between), rank 16
on the seven projections of each layer, 4 x 2048 tokens. Each size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

import common
import torch

import falqon_fx

COLUMNS = [
    "layers", "sites", "explain, s", "CPU, s", "of it passes, s", "model alone, GiB", "peak, GiB",
]  # fmt: skip


def measure(layers: int) -> list[str]:
    """One row of the table, from this process."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config).bfloat16(), lora)
        ids = torch.zeros(4, 2048, dtype=torch.int64)
    before = _peak()
    start, cpu = time.perf_counter(), time.process_time()
    report = falqon_fx.explain(model, input_ids=ids, config=falqon_fx.FalqonConfig(card="H100"))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    passes = sum(sum(graph.pass_seconds.values()) for graph in report.graphs)
    numbers = (f"{seconds:.1f}", f"{cpu:.1f}", f"{passes:.2f}", f"{before:.2f}", f"{_peak():.2f}")
    return [str(layers), str(len(report.sites)), *numbers]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print("\t".join(measure(args.one)))
        return
    rows = []
    for layers in args.layers:
        command = [sys.executable, __file__, "--one", str(layers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(done.stdout.splitlines()[-1].split("\t"))
        print(dict(zip(COLUMNS, rows[-1], strict=True)))
    page = common.markdown("explain on the meta device", common.environment(), COLUMNS, rows)
    file = common.result_path("explain_time", ".md")
    file.write_text(page, encoding="utf-8")
    print(f"Written: {file}")


if __name__ == "__main__":
    main()
