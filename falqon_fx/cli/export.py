"""The commands ``export`` and ``prequantize`` of the ``falqon-fx`` program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.files import storage


def add_parser(subparsers: Any) -> None:
    """Add both commands; each sets ``run``, a function of the parsed arguments."""
    export = subparsers.add_parser(
        "export",
        help="write an FP8 checkpoint for serving engines",
        description="Load a base model and the falqon checkpoint trained on it, and write a "
        "folder that transformers and vLLM load.",
    )
    export.add_argument("model", help="the base model's folder, or one of falqon-fx prequantize")
    export.add_argument("out", help="a new folder")
    export.add_argument("--adapter", help="a PEFT adapter folder (also made by a Trainer)")
    export.add_argument("--checkpoint", help="a folder of falqon_fx.save_checkpoint")
    export.add_argument(
        "--base",
        help="the folder of a prequantized model's original weights, cast with the adapter",
    )
    export.add_argument(
        "--form", choices=("compressed-tensors", "fp8"), default="compressed-tensors"
    )
    export.add_argument("--max-shard-size", default="5GB")
    export.add_argument("--quiet", action="store_true", help="no progress bar")
    export.set_defaults(run=run_export)

    quantize = subparsers.add_parser(
        "prequantize",
        help="cast a model's weights to FP8, one at a time",
        description="Read a checkpoint weight by weight and write a folder that falqon_fx.load "
        "makes a trainable model from. Goes on where an interrupted run ended.",
    )
    quantize.add_argument("model", help="a folder with config.json and safetensors")
    quantize.add_argument("out", help="a new folder")
    quantize.add_argument("--rank", type=int, default=16)
    quantize.add_argument("--alpha", type=int, help="default: the rank")
    quantize.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], help="default: all-linear"
    )
    quantize.add_argument("--init", choices=("svd", "keep"), default="svd")
    quantize.add_argument("--granularity", choices=("row", "tensor"), default="row")
    quantize.add_argument("--scale", choices=("pow2", "amax"), default="pow2")
    quantize.add_argument("--workers", type=int, default=1)
    quantize.add_argument("--quiet", action="store_true", help="no progress bar")
    quantize.set_defaults(run=run_prequantize)


def run_prequantize(arguments: argparse.Namespace) -> int:
    """``falqon-fx prequantize MODEL OUT``."""
    from falqon_fx.files.prequantize import prequantize

    peft = storage.require("peft", "export")
    targets = arguments.target_modules
    lora = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha or arguments.rank,
        target_modules=targets[0] if len(targets) == 1 else targets,
        task_type="CAUSAL_LM",
    )
    config = FalqonConfig(
        init=arguments.init, granularity=arguments.granularity, scale=arguments.scale
    )
    report = prequantize(
        arguments.model,
        arguments.out,
        lora,
        config,
        workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(report)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """``falqon-fx export MODEL OUT``."""
    from falqon_fx.files.export import save_fp8

    model = _trained_model(arguments)
    report = save_fp8(
        model,
        arguments.out,
        form=arguments.form,
        base=arguments.base or (None if _is_prequantized(arguments) else arguments.model),
        max_shard_size=arguments.max_shard_size,
        progress=not arguments.quiet,
    )
    print(report)
    return 0


def _trained_model(arguments: argparse.Namespace) -> Any:
    from falqon_fx.files.checkpoint import load_checkpoint
    from falqon_fx.files.loading import load
    from falqon_fx.model.prepare import adapters, prepare

    peft = storage.require("peft", "export")
    transformers = storage.require("transformers", "export")
    if _is_prequantized(arguments):
        model: Any = load(arguments.model)
    elif arguments.adapter is None:
        raise FalqonError("--adapter", "is missing", "Name the PEFT adapter that was trained")
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="auto")
        model = peft.PeftModel.from_pretrained(base, arguments.adapter)
    if arguments.checkpoint is not None:
        load_checkpoint(model, arguments.checkpoint, rng=False)
    if not adapters(model):  # no FP8 weights came with it
        config = FalqonConfig(granularity="tensor" if arguments.form == "fp8" else "row")
        prepare(model, config, progress=not arguments.quiet)
    return model


def _is_prequantized(arguments: argparse.Namespace) -> bool:
    """Whether the model's folder is one of ``prequantize``, without its original weights."""
    from falqon_fx.files.loading import MANIFEST

    return (Path(arguments.model) / MANIFEST).is_file()
