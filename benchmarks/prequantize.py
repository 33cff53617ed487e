r"""`falqon_fx.prequantize` on a generated Llama: throughput, where the time goes, peak memory.

    python benchmarks/prequantize.py --layers 20 --workers 2 --folder /tmp/big
    python benchmarks/prequantize.py --layers 40 --hidden 5120 --intermediate 13824 --rank 16 \
        --init keep --steps 2 --folder /tmp/big13

Random weights with the shapes of LLaMA-7B (20 layers are 8.6 GB in bf16) or, second, all of
LLaMA-13B, 26 GB, which is then trained for two steps, A and B. Conversion, loading and training
each run in a process of its own, whose peak resident memory is what the kernel reports of it;
mapped files are part of that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from common import environment, result_path, write_json
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


MEMORY = """
def peak(kind="VmHWM"):  # ru_maxrss would count what the process that started this one held
    text = open("/proc/self/status").read()
    return int(text.split(kind + ":")[1].split()[0]) / 1024
"""

CONVERT = """
import json, resource, sys, peft, falqon_fx
source, out, workers, rank, init = sys.argv[1:]
lora = peft.LoraConfig(r=int(rank), target_modules="all-linear", task_type="CAUSAL_LM")
before = peak()
config = falqon_fx.FalqonConfig(init=init)
report = falqon_fx.prequantize(source, out, lora, config, workers=int(workers), progress=False)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "layers": report.layers, "bytes_read": report.bytes_read,
    "bytes_written": report.bytes_written, "seconds": report.seconds,
    "cpu_seconds": used.ru_utime + used.ru_stime, "profile": report.profile,
    "peak_mib": peak(), "mib_before": before,
}))
"""

LOAD = """
import json, sys, time, torch, falqon_fx
before = peak()
start = time.perf_counter()
model = falqon_fx.load(sys.argv[1])
seconds = time.perf_counter() - start
print(json.dumps({"load_seconds": seconds, "load_mib_before": before, "load_peak_mib": peak(),
    "load_file_mib": peak("RssFile"), "load_anonymous_mib": peak("RssAnon"),
    "parameters": sum(p.numel() for p in model.parameters())}))
"""

TRAIN = """
import json, sys, time, torch, falqon_fx
model = falqon_fx.load(sys.argv[1], verify=False).train()
model = torch.compile(model, backend="falqon", options={"inner": sys.argv[2], "init": sys.argv[3]})
b = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
tokens = torch.arange(int(sys.argv[4]))[None]
losses, seconds, peaks = [], [], []
for _ in range(int(sys.argv[5])):
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    seconds.append(time.perf_counter() - start)
    peaks.append({"peak": peak(), "file": peak("RssFile"), "anonymous": peak("RssAnon")})
moved = sum(bool(parameter.any()) for parameter in b)
print(json.dumps({"sites": len(falqon_fx.adapters(model)), "adapters_moved": moved,
    "losses": losses, "step_seconds": seconds, "step_mib": peaks, "train_peak_mib": peak()}))
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
    parser.add_argument("--steps", type=int, default=0, help="training steps after loading")
    parser.add_argument("--tokens", type=int, default=16, help="of a step's sequence")
    parser.add_argument("--inner", default="eager", help="compiler of the training steps")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args(argv)

    source, out = arguments.folder / "dense", arguments.folder / "fp8"
    sizes = (arguments.hidden, arguments.intermediate, arguments.vocabulary)
    if not source.exists():
        generate(source, arguments.layers, *sizes)
    options = {k: v for k, v in vars(arguments).items() if k not in ("folder", "out")}
    result = {**environment(), "cores_used": len(os.sched_getaffinity(0)), "options": options}
    numbers = [str(arguments.workers), str(arguments.rank), arguments.init]
    result["convert"] = run(CONVERT, str(source), str(out), *numbers)
    result["load"] = run(LOAD, str(out))
    if arguments.steps:
        how = [arguments.inner, arguments.init, str(arguments.tokens), str(arguments.steps)]
        result["train"] = run(TRAIN, str(out), *how)
    largest = 2 * arguments.hidden * max(arguments.intermediate, arguments.vocabulary)
    result["limit_mib"] = 2 * largest / 2**20 + 1024
    write_json(arguments.out or result_path("prequantize", ".json"), result)
    print(json.dumps(result, indent=1))
    return 0 if result["convert"]["peak_mib"] <= result["limit_mib"] else 1


def run(code: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own prints, as its last line."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY + code, *arguments],
        check=True,
        stdout=subprocess.PIPE,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
