"""What public checkpoints call the tensors of a transformers model, by the renamings with which
transformers loads them, and what it leaves out of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_OLD_BUFFER = r"rotary_emb\.inv_freq$"  # of every layer, in checkpoints of transformers before 4.32


class PublicNames:
    """The names of a model's own tensors, without PEFT's wrappers, by those of its checkpoints."""

    def __init__(self, model: Any) -> None:
        self._own = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items()}
        self._prefix = getattr(model, "base_model_prefix", "")
        self._renamings, self._converters = _conversions(model)

    def own(self, name: str) -> str:
        """What the model calls a tensor of a checkpoint; ``name`` itself where it has no such
        tensor, or holds it as a part of another.
        """
        if name in self._own and not self._renamings:
            return name
        for conversions in ((self._renamings, self._converters), ([], [])):
            found, part_of = self._renamed(name, *conversions)
            if part_of is None and found in self._own:
                return found
        return name

    def renamed(self, name: str) -> str:
        """The name of a tensor of a checkpoint, of which no other is made."""
        found: str = self._renamed(name, self._renamings, [])[0]
        return found

    def _renamed(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, Any]:
        try:
            from transformers.core_model_loading import rename_source_key
        except ImportError:  # transformers 4 renames nothing
            return name, None
        found: tuple[str, Any] = rename_source_key(
            name, renamings, converters, self._prefix, self._own
        )
        return found

    def by_own(self, names: Iterable[str]) -> dict[str, str]:
        """The names of a checkpoint's tensors, by those of the model."""
        return {self.own(name): name for name in names}


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """How transformers renames tensors as it loads them, and which it makes parts of others."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return [], []
    found = get_model_conversion_mapping(model)
    converters = [each for each in found if isinstance(each, WeightConverter)]
    return [each for each in found if not isinstance(each, WeightConverter)], converters


def without_left_out(model: nn.Module, index: Mapping[str, str]) -> dict[str, str]:
    """The tensors of a checkpoint, but for those that transformers leaves out of a model, as layers
    that predict further tokens (DeepSeek's and GLM's MTP) mostly are.

    Its patterns are of sizes that were published: "model.layers.46" is such a layer of a model with
    46 layers, and a layer of one with 92.
    """
    told = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    patterns = [re.compile(text) for text in (*told, _OLD_BUFFER)]
    own = [name.replace(".base_layer.", ".") for name in model.state_dict()]  # of PEFT's wrappers
    patterns = [p for p in patterns if not any(p.search(name) for name in own)]
    return {n: file for n, file in index.items() if not any(p.search(n) for p in patterns)}
