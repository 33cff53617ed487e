"""The words of each command, and the function that runs it as "module:function": what is imported
for help is this file alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_EXPLAIN = """What would be rewritten in a model, and why not, without its weights.

The model is built on the meta device from its config, with LoRA from the flags or from an adapter
folder, and called with batch x length tokens. Nothing is downloaded but the config."""

_COST = """When the rewrite of a layer pays: predicted times of its step by number of tokens.

lora is what runs without falqon; fp8_lora puts FP8 under a separate LoRA path; merged is the
rewritten layer on FP8 matrix units; emulated is the same arithmetic without them. A and B train;
W is constant. --rank 0 is a frozen layer without an adapter.

--step is the arithmetic of a model's whole training step on a GPU, from published rates: for falqon
with A trained and frozen, PEFT in bf16 with Inductor, and NF4 QLoRA. Nothing is measured."""

_EXPORT = """Write an FP8 checkpoint for serving engines.

Loads a base model and the falqon checkpoint trained on it, and writes a folder that transformers
and vLLM load."""

_PREQUANTIZE = """Cast a model's weights to FP8, one at a time.

Reads a checkpoint weight by weight and writes a folder that falqon_fx.load makes a trainable model
from. Goes on where an interrupted run ended."""

_REPRO = "Rebuild one site of a report with random data and check it; exits with 3 if wrong."

_KERNELS = "The kernel that runs each site of a report, why it was chosen, and its source."


def add_explain(subparsers: Any) -> None:
    """``falqon-fx explain MODEL``."""
    parser = _add(subparsers, "explain", _EXPLAIN, "falqon_fx_cli.explain:run")
    parser.add_argument(
        "model", metavar="MODEL", help="a transformers id, or a folder with config.json"
    )
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--adapter", type=Path, help="a PEFT adapter folder; its config is used")
    lora.add_argument("--rank", type=int, default=16)
    lora.add_argument("--alpha", type=int, help="twice the rank by default")
    lora.add_argument("--target-modules", nargs="+", default=["all-linear"])
    lora.add_argument("--frozen-a", action="store_true", help="train lora_B alone")
    step = parser.add_argument_group("step")
    step.add_argument("--batch", type=int, default=1)
    step.add_argument("--length", type=int, default=2048)
    step.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    step.add_argument(
        "--dynamic", action="store_true", help="leave batch (from 2 on) and length open"
    )
    step.add_argument("--card", default="H100", help="of the cost model (default: %(default)s)")
    step.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the backend"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--diff", action="store_true", help="the graphs before and after as well")
    output.add_argument("--html", type=Path, metavar="FILE", help="write the page as well")
    output.add_argument(
        "--svg", nargs=2, metavar=("SITE", "FILE"), help="write a site's graph as well"
    )
    output.add_argument(
        "--check",
        action="store_true",
        help="exit with 3 where an adapter is rejected or nothing is rewritten",
    )


def add_cost(subparsers: Any) -> None:
    """``falqon-fx cost``."""
    parser = _add(subparsers, "cost", _COST, "falqon_fx_cli.cost:run")
    parser.add_argument("--card", help="by default the one at hand")
    parser.add_argument("--cards", action="store_true", help="list the cards and their sources")
    parser.add_argument(
        "--calibrate", metavar="DEVICE", nargs="?", const="", help="measure cpu or cuda and keep it"
    )
    parser.add_argument("--in", dest="features", type=int, default=4096)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--frozen-a", action="store_true", help="lora_A doesn't train (LoRA-FA)")
    parser.add_argument(
        "--siblings", type=int, default=1, help="layers alike that read one input (q, k, v: 3)"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="of a call; with --step, of a sequence (4096)"
    )
    parser.add_argument(
        "--adapter-dtype",
        choices=["float32", "bfloat16", "fp8"],
        help="of A and B, float32 or bfloat16 (float32); with --step how falqon adds the adapter: "
        "bfloat16 in the epilogue of its own product or after the library's, fp8 as r more of K "
        "(bfloat16)",
    )
    parser.add_argument("--symbolic", action="store_true", help="FLOPs and bytes as formulas")
    step = parser.add_argument_group("a whole step")
    step.add_argument("--step", action="store_true", help="of a model, on a card of the table")
    step.add_argument("--model", help="llama-7b, llama-3-8b, qwen3-8b or a config.json (llama-7b)")
    step.add_argument("--batch", type=int, help="sequences (1)")
    step.add_argument(
        "--transpose",
        choices=["transient", "store"],
        help="whether W is transposed each step, or kept both ways (transient)",
    )
    step.add_argument(
        "--attention",
        choices=["flash2", "cudnn"],
        help="the kernel of scaled_dot_product_attention, in every run (flash2)",
    )
    step.add_argument("--cuda-graphs", action="store_true", default=None, help="no host time")
    step.add_argument(
        "--figure",
        action="append",
        metavar="NAME=VALUE",
        help="instead of the one that --json lists under this name",
    )


def add_export(subparsers: Any) -> None:
    """``falqon-fx export MODEL OUT``."""
    parser = _add(subparsers, "export", _EXPORT, "falqon_fx_cli.export:run_export")
    parser.add_argument("model", help="the base model's folder, or one of falqon-fx prequantize")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--adapter", help="a PEFT adapter folder (also made by a Trainer)")
    parser.add_argument("--checkpoint", help="a folder of falqon_fx.save_checkpoint")
    parser.add_argument(
        "--base",
        help="the folder of a prequantized model's original weights, cast with the adapter",
    )
    parser.add_argument(
        "--form", choices=("compressed-tensors", "fp8"), default="compressed-tensors"
    )
    parser.add_argument("--max-shard-size", default="5GB")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_prequantize(subparsers: Any) -> None:
    """``falqon-fx prequantize MODEL OUT``."""
    parser = _add(subparsers, "prequantize", _PREQUANTIZE, "falqon_fx_cli.export:run_prequantize")
    parser.add_argument("model", help="a folder with config.json and safetensors")
    parser.add_argument("out", help="a new folder")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, help="default: the rank")
    parser.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], help="default: all-linear"
    )
    parser.add_argument("--init", choices=("svd", "keep"), default="svd")
    parser.add_argument("--granularity", choices=("row", "tensor"), default="row")
    parser.add_argument("--scale", choices=("pow2", "amax"), default="pow2")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_repro(subparsers: Any) -> None:
    """``falqon-fx repro REPORT SITE``."""
    parser = _add(subparsers, "repro", _REPRO, "falqon_fx_cli.repro:run_repro")
    _add_report(parser)
    parser.add_argument("--tokens", type=int, help="by default those of the report, at most 4096")
    parser.add_argument("--device", help="by default the site's, or the CPU where there is no GPU")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="write the program, don't run it"
    )


def add_kernels(subparsers: Any) -> None:
    """``falqon-fx kernels REPORT``."""
    parser = _add(subparsers, "kernels", _KERNELS, "falqon_fx_cli.repro:run_kernels")
    _add_report(parser)
    parser.add_argument("--source", action="store_true", help="print the source as well")


ALL = (add_explain, add_cost, add_export, add_prequantize, add_repro, add_kernels)


def _add(subparsers: Any, name: str, text: str, run: str) -> argparse.ArgumentParser:
    summary = text.splitlines()[0]
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=summary, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--json", action="store_true", help="print JSON (no table, no progress bar)"
    )
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "report", type=Path, metavar="REPORT", help="of falqon-fx explain --json, or FALQON_DUMP's"
    )
    parser.add_argument("site", nargs="?", metavar="SITE", help="a path (default: the first site)")
