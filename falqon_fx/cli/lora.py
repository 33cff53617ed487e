"""The adapter that a command line names: a new one, or that of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.hf import lora_config

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED = "trained"
_OTHER = "Name an adapter that was trained on this model"


def new_config(rank: int | None, alpha: int | None, targets: list[str] | None, **given: Any) -> Any:
    """PEFT's config of a new adapter; what isn't given is as in `falqon_fx.prequantize`."""
    if rank is not None:
        given["r"] = rank
    if alpha is not None:
        given["lora_alpha"] = alpha
    names = [name for each in targets or () for name in each.split(",") if name]
    if names:  # a name alone would be a regular expression to PEFT
        given["target_modules"] = "all-linear" if names == ["all-linear"] else names
    return lora_config(None, **given)


def config_of(folder: Path) -> Any:
    """The config of a PEFT adapter's folder.

    Raises:
        FalqonError: there is none that PEFT can read.
    """
    peft = storage.require("peft", "peft")
    with errors_explained(str(folder), "its config can't be read", "Name a PEFT adapter's folder"):
        return peft.PeftConfig.from_pretrained(str(folder))


def check_folder(folder: Path) -> None:
    """Raise a `FalqonError` where a folder holds no whole PEFT adapter. It loads no model."""
    config_of(folder)
    if not any((folder / name).is_file() for name in _WEIGHTS):
        problem = f"it has neither {' nor '.join(_WEIGHTS)}"
        raise FalqonError(str(folder), problem, "Name the folder that save_pretrained wrote")


def with_adapter(model: Path, folder: Path) -> Any:
    """The model of a folder under the adapter of another.

    Raises:
        FalqonError: they don't fit.
    """
    peft = storage.require("peft", "peft")
    transformers = storage.require("transformers", "peft")
    with errors_explained(
        str(model), "it can't be loaded", "Name a causal language model's folder"
    ):
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    with errors_explained(str(folder), f"it doesn't fit {model}", _OTHER):
        adapted = peft.PeftModel.from_pretrained(base, str(folder))
    _check_names(adapted, folder, "default")
    return adapted


def put_in_place(model: Any, folder: Path) -> None:
    """Put the adapter of a folder in the place of a loaded model's own.

    Raises:
        FalqonError: it doesn't fit.
    """
    with errors_explained(str(folder), "it doesn't fit the model", _OTHER):
        model.load_adapter(str(folder), _TRAINED)
        model.set_adapter(_TRAINED)
        model.delete_adapter("default")
    _check_names(model, folder, _TRAINED)


def _check_names(model: Any, folder: Path, adapter: str) -> None:
    """PEFT only warns of tensors that it finds no place for, and of places that it fills with
    nothing.
    """
    peft = storage.require("peft", "peft")
    places = peft.get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    found = peft.utils.load_peft_weights(str(folder), device="cpu")
    strays = sorted({n for n in found if ".lora_" in n} ^ {n for n in places if ".lora_" in n})
    if strays:
        problem = f"{len(strays)} LoRA tensors are in it or in the model alone, first {strays[0]}"
        raise FalqonError(str(folder), problem, _OTHER)


@contextmanager
def errors_explained(name: str, problem: str, remedy: str) -> Iterator[None]:
    """Explain what fails in transformers and PEFT, which take any value of a config."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FalqonError(name, f"{problem} ({reason})", remedy) from error
