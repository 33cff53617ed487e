"""``falqon-fx explain``: a transformers model, built without weights, and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from falqon_fx.config import FalqonConfig
from falqon_fx.cost import cards
from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.model.explain import explain
from falqon_fx.model.mesh import MeshPlan
from falqon_fx_cli import lora
from falqon_fx_cli.exit_codes import DONE, FOUND
from falqon_fx_cli.output import write_text

_QUANTIZED = (
    "config.json has a quantization_config: the layers here are those of a checkpoint in 16 bits, "
    "as falqon_fx.load makes them, too"
)
_UNREAD = "Give a folder with config.json, or an id that this machine can reach"


@dataclass(frozen=True)
class Explain:
    """What was given on the command line (`falqon_fx_cli.commands.explain`)."""

    model: str
    adapter: Path | None
    rank: int | None
    alpha: int | None
    target_modules: list[str] | None
    frozen_a: bool
    batch: int
    length: int
    dtype: Literal["bfloat16", "float16", "float32"]
    dynamic: bool
    card: str | None
    mesh: list[str] | None
    option: list[str] | None
    diff: bool
    html: Path | None
    svg: tuple[str, Path] | None
    check: bool
    as_json: bool

    def run(self) -> int:
        """Build the model, explain it, print the report."""
        config, mesh = self._config(), _mesh(self.mesh)
        model = self._model()
        batch = max(self.batch, 2 if self.dynamic else 1)  # a size of 1 is always fixed
        with torch.device("meta"):
            ids = torch.zeros(batch, self.length, dtype=torch.int64)
        if self.dynamic:
            for dimension in (0, 1):
                torch._dynamo.mark_dynamic(ids, dimension)
        report = explain(model, input_ids=ids, config=config, mesh=mesh)
        if getattr(model.config, "quantization_config", None):
            report = replace(report, notes=(_QUANTIZED, *report.notes))
        if self.as_json:
            print(report.to_json(graphs=self.diff, indent=1))
        else:
            print(report, end="")
        if self.diff and not self.as_json:
            print(report.to_diff())
        if self.html:
            write_text(self.html, report.to_html())
        if self.svg:
            write_text(self.svg[1], report.to_svg(self.svg[0]))
        failed = bool(report.rejected) or not report.sites
        return FOUND if self.check and failed else DONE

    def _config(self) -> FalqonConfig:
        options = dict(map(_option, self.option or ()))
        if self.card is not None:
            options.setdefault("card", self.card)
        config = FalqonConfig.from_options(options)
        if config.card is not None:
            cards.find(config.card)
        return config

    def _lora(self) -> Any:
        """The adapter's config.

        Raises:
            FalqonError: PEFT is missing, or an adapter's folder is named beside words of a new one.
        """
        if self.adapter is None:
            return lora.new_config(self.rank, self.alpha, self.target_modules, task_type=None)
        beside = {"rank": self.rank, "alpha": self.alpha, "target-modules": self.target_modules}
        for name, value in beside.items():
            if value is not None:
                problem = f"an adapter has its own, and {self.adapter} is named"
                raise FalqonError(f"--{name}", problem, f"Leave out --{name} or --adapter")
        config = lora.config_of(self.adapter)
        config.inference_mode = False
        return config

    def _model(self) -> nn.Module:
        """The model of the command line, with LoRA, on the meta device.

        Raises:
            FalqonError: transformers or PEFT is missing or can't use what is asked.
        """
        peft = storage.require("peft", "peft")
        transformers = storage.require("transformers", "peft")
        adapter = self._lora()
        with lora.errors_explained(self.model, "its config can't be read", _UNREAD):
            config = transformers.AutoConfig.from_pretrained(self.model)
        with torch.device("meta"):
            with lora.errors_explained(self.model, "no model can be made from its config", _UNREAD):
                model = _model_class(transformers, config)(config)
            if model.main_input_name != "input_ids":
                raise FalqonError(
                    self.model,
                    f"takes {model.main_input_name}, and this command can only make tokens",
                    "Call falqon_fx.explain(model, ...) with your inputs",
                )
            model = model.to(getattr(torch, self.dtype))
            fitting = "Give the names of linear layers of this model"
            with lora.errors_explained(self.model, "it can't have such an adapter", fitting):
                model = peft.get_peft_model(model, adapter).train()
        for name, parameter in model.named_parameters():
            if self.frozen_a and ".lora_A." in name:
                parameter.requires_grad_(False)
        return model  # type: ignore[no-any-return]


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise FalqonError(f"--option {text}", "has no value", "Write --option name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:  # a bare word
        return name, value


def _mesh(words: list[str] | None) -> MeshPlan | None:
    """The processes that the command line names."""
    if words is None:
        return None
    sizes: dict[str, int] = {}
    for word in (part for text in words for part in text.split(",")):
        name, _, size = word.partition("=")
        if not (size.isascii() and size.isdigit() and len(size) < 10) or name in sizes:
            raise FalqonError(f"--mesh {word}", "names no processes", "Write --mesh fsdp=8,tp=2")
        sizes[name] = int(size)
    return MeshPlan.of(sizes)


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
