"""``falqon-fx explain``: a transformers model, built without weights, and its report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.explain import explain
from falqon_fx_cli.exit_codes import DONE, FOUND
from falqon_fx_cli.output import write_text


def run(arguments: argparse.Namespace) -> int:
    """Build the model, explain it, print the report."""
    config = FalqonConfig.from_options(
        {"card": arguments.card, **dict(_option(text) for text in arguments.option)}
    )
    model = build(arguments)
    batch = max(arguments.batch, 2 if arguments.dynamic else 1)  # a size of 1 is always fixed
    with torch.device("meta"):
        ids = torch.zeros(batch, arguments.length, dtype=torch.int64)
    if arguments.dynamic:
        for dimension in (0, 1):
            torch._dynamo.mark_dynamic(ids, dimension)
    report = explain(model, input_ids=ids, config=config)
    print(
        report.to_json(graphs=arguments.diff, indent=1) if arguments.json else report,
        end="\n" if arguments.json else "",
    )
    if arguments.diff and not arguments.json:
        print(report.to_diff())
    if arguments.html:
        write_text(arguments.html, report.to_html())
    if arguments.svg:
        write_text(Path(arguments.svg[1]), report.to_svg(arguments.svg[0]))
    failed = bool(report.rejected) or not report.sites
    return FOUND if arguments.check and failed else DONE


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise FalqonError(f"--option {text}", "has no value", "Write --option name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:  # a bare word
        return name, value


def build(arguments: argparse.Namespace) -> nn.Module:
    """The model of the command line, with LoRA, on the meta device.

    Raises:
        FalqonError: transformers or PEFT is missing or can't use what is asked.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise FalqonError("explain", f"{error}", "pip install 'falqon-fx[peft]'") from error
    with _errors_explained(arguments.model, "its config can't be read"):
        config = transformers.AutoConfig.from_pretrained(arguments.model)
    if arguments.adapter is not None:
        with _errors_explained(str(arguments.adapter), "its config can't be read"):
            lora = peft.PeftConfig.from_pretrained(str(arguments.adapter))
        lora.inference_mode = False
    else:
        targets = arguments.target_modules
        lora = peft.LoraConfig(
            r=arguments.rank,
            lora_alpha=arguments.alpha or 2 * arguments.rank,
            target_modules=targets[0] if targets == ["all-linear"] else targets,
        )
    with torch.device("meta"):
        with _errors_explained(arguments.model, "no model can be made from its config"):
            model = _model_class(transformers, config)(config)
        if model.main_input_name != "input_ids":
            raise FalqonError(
                arguments.model,
                f"takes {model.main_input_name}, and this command can only make tokens",
                "Call falqon_fx.explain(model, ...) with your inputs",
            )
        model = model.to(getattr(torch, arguments.dtype))
        with _errors_explained(arguments.model, "it can't have such an adapter"):
            model = peft.get_peft_model(model, lora).train()
    for name, parameter in model.named_parameters():
        if arguments.frozen_a and ".lora_A." in name:
            parameter.requires_grad_(False)
    return model  # type: ignore[no-any-return]


@contextmanager
def _errors_explained(name: str, problem: str) -> Iterator[None]:
    """Of a config transformers and PEFT take any value, and fail at it anywhere."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        remedy = "Give a folder with config.json, or an id that this machine can reach"
        raise FalqonError(name, f"{problem} ({reason})", remedy) from error


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that a config names, if it is one of a model: transformers has other names, too."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return (
        known[type(config)] if type(config) in known else transformers.MODEL_MAPPING[type(config)]
    )
