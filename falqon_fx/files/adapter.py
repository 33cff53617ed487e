"""`save_adapter`: PEFT's ``save_pretrained`` of a model that processes share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files import ranks
from falqon_fx.model.lora_layers import unwrap
from falqon_fx.model.prepared_linear import PreparedLinear
from falqon_fx.site.paths import WRAPPED, without_wrappers
from falqon_fx.site.sharded import gathered, is_sharded

_BASE = ".base_layer."  # in the names of what PEFT has put an adapter around


def save_adapter(model: nn.Module, directory: str | Path, **arguments: Any) -> None:
    """Write what ``model.save_pretrained(directory)`` of PEFT does, of a sharded model, too.

    PEFT itself takes whole tensors alone. Where processes hold parts (FSDP2, tensor parallelism)
    all of them make this call; the adapters, frozen ones too, and what else PEFT may want are
    gathered one by one, without the layers' base weights, and the first process writes.

    Args:
        model: PEFT's, or what ``torch.compile`` made of it.
        directory: that all processes name; files of an earlier adapter are replaced.
        arguments: of PEFT's ``save_pretrained``.

    Raises:
        FalqonError: the model is not PEFT's, or a checkpoint_wrapper hides adapters from it; what
            the first process ran into, on every process.
    """
    inner: Any = unwrap(model)
    if not hasattr(inner, "peft_config") or not hasattr(inner, "save_pretrained"):
        raise FalqonError(
            type(inner).__name__,
            "it is no PeftModel, which alone has adapters that PEFT loads",
            "Keep the training with falqon_fx.save_checkpoint(model, folder)",
        )
    for path, _ in inner.named_modules():
        if WRAPPED in path.split(".") and "lora_A" in path.split("."):
            raise FalqonError(
                without_wrappers(path),
                "it is inside torch's checkpoint_wrapper, and PEFT would leave it out of its files",
                "Use model.gradient_checkpointing_enable() instead, or falqon_fx.save_checkpoint",
            )
    sharded = is_sharded(inner)
    if not sharded:
        inner.save_pretrained(directory, **arguments)
        return
    state = inner.state_dict()
    names = [*_wanted(inner, state)]
    steps: list[Callable[[], Tensor]] = [functools.partial(gathered, state[n]) for n in names]

    def write(parts: Iterator[Tensor]) -> None:
        whole = dict(zip(names, parts, strict=True))
        inner.save_pretrained(directory, state_dict=whole, **arguments)

    ranks.lead(sharded, steps, write)


def _wanted(model: nn.Module, state: dict[str, Tensor]) -> Iterator[str]:
    """The names of what may belong to an adapter: all but frozen weights of the layers."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    bases = [f"{path}." for path, m in model.named_modules() if isinstance(m, PreparedLinear)]
    for name in state:
        of_layer = _BASE in name or name.startswith(tuple(bases))
        if name in trained or not of_layer:
            yield name
