"""The commands ``export`` and ``prequantize`` of the ``falqon-fx`` program."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from falqon_fx.config import BaseDtype, FalqonConfig, Granularity
from falqon_fx.errors import FalqonError
from falqon_fx.files import atomic, checkpoint, storage
from falqon_fx.files.export import save_fp8
from falqon_fx.files.export_files import check_shard_size
from falqon_fx.files.export_report import ExportReport
from falqon_fx.files.loading import MANIFEST, load
from falqon_fx.files.nvfp4_import import quantization_of
from falqon_fx.files.prequantize import DEFAULT, PrequantizeReport, prequantize
from falqon_fx.files.seals import is_export, tokenizer_files
from falqon_fx.model.prepare import adapters, prepare
from falqon_fx_cli import lora
from falqon_fx_cli.exit_codes import DONE
from falqon_fx_cli.output import print_json


@dataclass(frozen=True)
class Prequantize:
    """What was given on the command line (`falqon_fx_cli.commands.prequantize`)."""

    model: Path
    out: Path
    rank: int | None
    alpha: int | None
    target_modules: list[str] | None
    init: Literal["svd", "keep"] | None
    granularity: Literal["tensor", "row"] | None
    scale: Literal["amax", "pow2"] | None
    base_dtype: BaseDtype | None
    workers: int
    quiet: bool
    as_json: bool

    def run(self) -> int:
        """``falqon-fx prequantize MODEL OUT``."""
        options: dict[str, Any] = {
            "init": self.init,
            "granularity": self.granularity,
            "scale": self.scale,
            "base_dtype": self.base_dtype,
        }
        given = {name: value for name, value in options.items() if value is not None}
        report = prequantize(
            self.model,
            self.out,
            lora.new_config(self.rank, self.alpha, self.target_modules),
            FalqonConfig(**{"init": DEFAULT.init, **given}),
            workers=self.workers,
            progress=not (self.quiet or self.as_json),
        )
        _print(report, self.as_json)
        return DONE


@dataclass(frozen=True)
class Export:
    """What was given on the command line (`falqon_fx_cli.commands.export`)."""

    model: Path
    out: Path
    adapter: Path | None
    checkpoint: Path | None
    base: Path | None
    form: Literal["compressed-tensors", "fp8"]
    base_dtype: BaseDtype | None
    max_shard_size: str
    quiet: bool
    as_json: bool

    def run(self) -> int:
        """``falqon-fx export MODEL OUT``."""
        self._check()
        report = save_fp8(
            self._trained_model(),
            self.out,
            form=self.form,
            base=self.base or (None if self._is_cast() else self.model),
            tokenizer=self._tokenizer(),
            max_shard_size=self.max_shard_size,
            progress=self._progress,
        )
        if self.adapter is None and self.checkpoint is None:
            said = "this is the model without training: no --adapter or --checkpoint was named"
            report = replace(report, notes=(*report.notes, said))
        _print(report, self.as_json)
        return DONE

    def _check(self) -> None:
        """Raise for what can be seen before anything is loaded."""
        atomic.refuse_existing(self.out)
        check_shard_size(self.max_shard_size)
        for name in ("peft", "transformers"):
            storage.require(name, "export")
        for folder in (self.model, self.base):
            if folder is not None and not (folder / "config.json").is_file():
                raise FalqonError(str(folder), "it has no config.json", "Name a model's folder")
        if self.adapter is not None:
            lora.check_folder(self.adapter)
        elif not self._is_prequantized():
            raise FalqonError("--adapter", "is missing", "Name the PEFT adapter that was trained")
        if self.base_dtype is not None and self._is_cast():
            problem = f"the weights of {self.model} are cast already"
            raise FalqonError("--base-dtype", problem, "Leave it out")
        if self.checkpoint is not None:
            checkpoint.read_extra(self.checkpoint)
            if self.adapter is not None and self._is_prequantized():
                problem = "the checkpoint of a prequantized model brings its own adapter"
                raise FalqonError("--adapter", problem, "Leave out --adapter or --checkpoint")

    @property
    def _progress(self) -> bool:
        return not (self.quiet or self.as_json)

    def _is_prequantized(self) -> bool:
        """Whether the model's folder is one of ``prequantize``, without its original weights."""
        return (self.model / MANIFEST).is_file() and not is_export(self.model)

    def _is_cast(self) -> bool:
        """Whether its weights are no dense ones: of ``prequantize``, or as others publish them."""
        return self._is_prequantized() or bool(quantization_of(self.model))

    def _tokenizer(self) -> Path | None:
        """The folder with the tokenizer: a trainer puts one with more tokens beside its adapter."""
        folders = [folder for folder in (self.adapter, self.model) if folder is not None]
        return next((folder for folder in folders if tokenizer_files(folder)), None)

    def _trained_model(self) -> Any:
        if self._is_prequantized():
            model: Any = load(self.model)
            if self.adapter is not None:
                lora.put_in_place(model, self.adapter)
        else:
            assert self.adapter is not None  # `_check` saw it
            if self._is_cast():
                config = lora.config_of(self.adapter)
                config.init_lora_weights = True  # what it starts from is in the folder
                model = load(self.model, config)
                lora.put_in_place(model, self.adapter)
            else:
                model = lora.with_adapter(self.model, self.adapter)
        if self.checkpoint is not None:
            checkpoint.load_checkpoint(model, self.checkpoint, rng=False)
        if not adapters(model):  # no FP8 weights came with it
            granularity: Granularity = "tensor" if self.form == "fp8" else "row"
            kind: BaseDtype = self.base_dtype or "fp8"
            options = FalqonConfig(granularity=granularity, base_dtype=kind)
            prepare(model, options, progress=self._progress)
        return model


def _print(report: ExportReport | PrequantizeReport, as_json: bool) -> None:
    if as_json:
        print_json(asdict(report))
    else:
        print(report)
