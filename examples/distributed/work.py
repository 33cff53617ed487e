"""What the recipes share: the device of a process, a model with LoRA, batches."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from torch import Tensor


def arguments(doc: str | None) -> argparse.Namespace:
    """The command line that the recipes have in common."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a name; by default a small random Llama")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out/distributed"))
    return parser.parse_args()


def start() -> torch.device:
    """Join the processes that torchrun started; the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")  # gloo for saves in the background
    return device


def stop() -> None:
    """Leave the processes.

    A thread of gloo may still hold the tensors of the last exchange, and one that it lets go while
    the interpreter ends aborts the process (pytorch/pytorch#190489; ``destroy_process_group`` does
    not end these threads). A barrier has no tensors, and gives them the time.
    """
    dist.barrier()
    dist.destroy_process_group()


def lora_model(name: str | None) -> Any:
    """A causal language model with LoRA on all linear layers, the same on every rank."""
    torch.manual_seed(0)
    if name is None:
        size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(num_attention_heads=4, vocab_size=512, **size)
        base = transformers.LlamaForCausalLM(config).bfloat16()
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    base.config.use_cache = False
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base, lora)


def layers(model: Any) -> Any:
    """The decoder layers, which are compiled and sharded one by one."""
    return model.get_base_model().model.layers


def batches(vocabulary: int, steps: range, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Random tokens, others in each step and on each rank. Your data comes here."""
    for step in steps:
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        ids = torch.randint(vocabulary, (2, 64), generator=generator).to(device)
        yield {"input_ids": ids, "labels": ids}
