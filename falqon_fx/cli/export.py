"""The commands ``export`` and ``prequantize`` of the ``falqon-fx`` program."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.checkpoint import load_checkpoint
from falqon_fx.files.export import ExportReport, save_fp8
from falqon_fx.files.loading import MANIFEST, load
from falqon_fx.files.prequantize import PrequantizeReport, prequantize
from falqon_fx.files.seals import is_export
from falqon_fx.model.prepare import adapters, prepare
from falqon_fx_cli.exit_codes import DONE


def run_prequantize(arguments: argparse.Namespace) -> int:
    """``falqon-fx prequantize MODEL OUT``."""
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
        progress=not (arguments.quiet or arguments.json),
    )
    _print(report, arguments.json)
    return DONE


def run_export(arguments: argparse.Namespace) -> int:
    """``falqon-fx export MODEL OUT``."""
    model = _trained_model(arguments)
    report = save_fp8(
        model,
        arguments.out,
        form=arguments.form,
        base=arguments.base or (None if _is_prequantized(arguments) else arguments.model),
        max_shard_size=arguments.max_shard_size,
        progress=not (arguments.quiet or arguments.json),
    )
    _print(report, arguments.json)
    return DONE


def _print(report: ExportReport | PrequantizeReport, as_json: bool) -> None:
    print(json.dumps(asdict(report), default=str, indent=1) if as_json else report)


def _trained_model(arguments: argparse.Namespace) -> Any:
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
        prepare(model, config, progress=not (arguments.quiet or arguments.json))
    return model


def _is_prequantized(arguments: argparse.Namespace) -> bool:
    """Whether the model's folder is one of ``prequantize``, without its original weights."""
    folder = Path(arguments.model)
    return (folder / MANIFEST).is_file() and not is_export(folder)
