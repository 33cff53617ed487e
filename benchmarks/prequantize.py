"""`falqon_fx.prequantize` on a generated Llama: throughput, where the time goes, peak memory.

    python benchmarks/prequantize.py --layers 20 --workers 2 --folder /tmp/big

Random weights with the shapes of LLaMA-7B; 20 layers are 8.6 GB in bf16. The conversion runs in a
process of its own, whose peak resident memory is what the kernel reports of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file


def generate(folder: Path, layers: int, hidden: int, intermediate: int, vocabulary: int) -> None:
    """A checkpoint written layer by layer, so that making it needs little memory too."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = max(1, hidden // 128)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)

    for i in range(layers):
        prefix = f"model.layers.{i}."
        tensors = {
            f"{prefix}{n}.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
        for n in "qkvo":
            tensors[f"{prefix}self_attn.{n}_proj.weight"] = random(hidden, hidden)
        for n in ("gate", "up"):
            tensors[f"{prefix}mlp.{n}_proj.weight"] = random(intermediate, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = random(hidden, intermediate)
        write(f"model-{i + 1:05}.safetensors", tensors)
    ends = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "lm_head.weight": random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    write("model-00000.safetensors", ends)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CONVERT = """
import json, resource, sys, time, torch, peft, falqon_fx
source, out, workers, rank, init = sys.argv[1:]
lora = peft.LoraConfig(r=int(rank), target_modules="all-linear", task_type="CAUSAL_LM")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = falqon_fx.FalqonConfig(init=init)
report = falqon_fx.prequantize(source, out, lora, config, workers=int(workers), progress=False)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "layers": report.layers, "bytes_read": report.bytes_read,
    "bytes_written": report.bytes_written, "seconds": report.seconds,
    "cpu_seconds": used.ru_utime + used.ru_stime, "profile": report.profile,
    "peak_mib": used.ru_maxrss / 1024, "mib_before": before / 1024,
}))
"""

LOAD = """
import json, resource, sys, time, torch, falqon_fx
start = time.perf_counter()
model = falqon_fx.load(sys.argv[1], verify=False)
seconds = time.perf_counter() - start
print(json.dumps({"load_seconds": seconds,
    "load_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "parameters": sum(p.numel() for p in model.parameters())}))
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="gets the model and the result")
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--init", choices=("svd", "keep"), default="svd")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args(argv)

    source, out = arguments.folder / "dense", arguments.folder / "fp8"
    if not source.exists():
        sizes = (arguments.hidden, arguments.intermediate, arguments.vocabulary)
        generate(source, arguments.layers, *sizes)
    numbers = (str(arguments.workers), str(arguments.rank), arguments.init)
    options = {k: v for k, v in vars(arguments).items() if k not in ("folder", "out")}
    result = {"cores": len(os.sched_getaffinity(0)), "date": time.strftime("%Y-%m-%d"), **options}
    for code, args in ((CONVERT, (str(source), str(out), *numbers)), (LOAD, (str(out),))):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *args], check=True, stdout=subprocess.PIPE
        )
        result |= json.loads(done.stdout.splitlines()[-1])
    largest = 2 * max(
        arguments.hidden * arguments.intermediate, arguments.hidden * arguments.vocabulary
    )
    result["limit_mib"] = 2 * largest / 2**20 + 1024
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0 if result["peak_mib"] <= result["limit_mib"] else 1


if __name__ == "__main__":
    sys.exit(main())
