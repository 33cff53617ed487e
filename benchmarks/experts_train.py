"""A small mixture of experts, trained with LoRA on its experts: falqon's losses beside PEFT's.

    python benchmarks/experts_train.py         # three seeds, 200 steps; some minutes on 2 cores

A Qwen3-MoE of 2 layers and 8 experts, which starts from random numbers and reads bytes, is trained
whole for `BASE` steps on half of the chatterbot conversations. LoRA on attention and all experts
then learns the other half: by PEFT as it is, and by falqon after `prepare`. A seed sets the base,
the start of A and the order of the batches, the same for both. Held-out conversations are of the
second half.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common
import peft
import smollm
import torch
import transformers
from torch import Tensor, nn

import falqon_fx
from falqon_fx.integrations.peft import trace_param_wrappers

BASE, STEPS, BATCH, LENGTH = 300, 200, 8, 128
RATES = {"base": 3e-3, "lora": 2e-3}
HELD_OUT = 16  # rows of LENGTH bytes
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of the conversations, [rows, LENGTH + 1]: of the first half, the second, held out."""
    texts = [f"{chat.question}\n{chat.response}\n\n" for chat in smollm.chatterbot_pairs()]
    halves = []
    for part in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
        flat = torch.frombuffer(bytearray("".join(part).encode()), dtype=torch.uint8).long()
        halves.append(flat[: len(flat) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))
    first, second = halves
    held = torch.arange(len(second)) % (len(second) // HELD_OUT) == 0
    return first, second[~held], second[held]


def build(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    return transformers.AutoModelForCausalLM.from_config(config)


def loss_of(model: Any, row: Tensor) -> Tensor:
    """The mean NLL of each byte after the first, in nats."""
    logits = model(input_ids=row[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten())


def train(model: Any, data: Tensor, steps: int, rate: float, seed: int) -> list[float]:
    """The loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for _ in range(steps):
        loss = loss_of(model, data[torch.randint(len(data), (BATCH,), generator=generator)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        losses.append(float(loss.detach()))
    return losses


def nll(model: Any, data: Tensor) -> float:
    """Of held-out rows; with gradients on, as in training, so that it is the same graph."""
    return statistics.fmean(float(loss_of(model, part).detach()) for part in data.split(BATCH))


def run(seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Both ways of one seed."""
    first, second, held = rows()
    base = build(seed)
    train(base, first, given.base, RATES["base"], seed)
    base.requires_grad_(False)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=STACKS,
    )  # fmt: skip
    torch.manual_seed(seed)
    plain: Any = peft.get_peft_model(base, config)
    ours = copy.deepcopy(plain)
    trace_param_wrappers(ours)
    report = falqon_fx.prepare(ours, progress=False)
    found: dict[str, Any] = {"seed": seed, "untrained": nll(plain, held)}
    found["prepared"] = sorted(report.prepared)
    torch._dynamo.reset()
    for name, call in (("PEFT", plain), ("falqon", torch.compile(ours, backend="falqon"))):
        start = time.perf_counter()
        losses = train(call, second, given.steps, RATES["lora"], seed)
        found[name] = {"losses": losses, "seconds": time.perf_counter() - start}
        found[name] |= {"held_out": nll(call, held)}
        print(f"seed {seed}: {name}: {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--base", type=int, default=BASE)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args(argv)
    runs = [run(seed, given) for seed in range(given.seeds)]
    about = common.environment()
    path = given.result or common.result_path("experts_train", ".json")
    common.write_json(path, {**about, "steps": given.steps, "runs": runs})
    text = common.markdown(
        "LoRA on a mixture of experts: losses beside PEFT's", about, HEADER, table(runs)
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


HEADER = (
    "seed",
    "held out before",
    "PEFT",
    "falqon",
    "PEFT, last 20 steps",
    "falqon",
    "largest gap",
)


def table(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Nats a byte; the gap is the largest one between the two at any step."""
    lines = []
    for found in runs:
        ways = [found[name] for name in ("PEFT", "falqon")]
        ends = [statistics.fmean(way["losses"][-20:]) for way in ways]
        gap = max(abs(a - b) for a, b in zip(*(way["losses"] for way in ways), strict=True))
        held = [found["untrained"], *(way["held_out"] for way in ways)]
        lines.append([str(found["seed"]), *(f"{n:.4f}" for n in (*held, *ends, gap))])
    return lines


if __name__ == "__main__":
    sys.exit(main())
