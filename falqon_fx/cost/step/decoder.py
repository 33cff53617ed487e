"""The sizes of a decoder: of a model with a name, or of a config.json."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes, as its config.json has them, and where they come from."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    source: str

    @property
    def query(self) -> int:
        """Columns of q, and of the attention's output."""
        return self.heads * self.head

    @property
    def key(self) -> int:
        """Columns of k, and of v."""
        return self.kv_heads * self.head

    @property
    def groups(self) -> tuple[Group, ...]:
        """The linear layers of a decoder layer, those that read one x together."""
        return (
            Group("q, k, v", self.hidden, (self.query, self.key, self.key)),
            Group("o", self.query, (self.hidden,)),
            Group("gate, up", self.hidden, (self.inner, self.inner)),
            Group("down", self.inner, (self.hidden,)),
        )

    @property
    def sites(self) -> int:
        """A layer's linear layers."""
        return sum(len(group.outs) for group in self.groups)

    @property
    def weights(self) -> int:
        """Elements of a layer's weights."""
        return sum(group.features * sum(group.outs) for group in self.groups)

    def adapter(self, rank: int) -> tuple[int, int]:
        """Elements of a layer's A, and of its B."""
        of_a = sum(rank * group.features * len(group.outs) for group in self.groups)
        return of_a, sum(rank * sum(group.outs) for group in self.groups)


@dataclass(frozen=True)
class Group:
    """Siblings: linear layers that read one x."""

    name: str
    features: int
    outs: tuple[int, ...]


def _named(name: str, source: str, sizes: tuple[int, int, int, int, int, int, int]) -> Decoder:
    return Decoder(name, *sizes, f"{source}, config.json")


MODELS = {
    decoder.name: decoder
    for decoder in (
        _named("llama-7b", "huggyllama/llama-7b", (4096, 11008, 32, 32, 32, 128, 32000)),
        _named("llama-3-8b", "meta-llama/Meta-Llama-3-8B", (4096, 14336, 32, 32, 8, 128, 128256)),
        _named("qwen3-8b", "Qwen/Qwen3-8B", (4096, 12288, 36, 32, 8, 128, 151936)),
    )
}


def decoder_of(model: str) -> Decoder:
    """The decoder that ``model`` names: one of `MODELS`, a config.json, or a folder with one.

    Raises:
        FalqonError: it is neither, or no decoder's config.
    """
    if model in MODELS:
        return MODELS[model]
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        near = difflib.get_close_matches(model.casefold(), MODELS, n=1, cutoff=0.0)[0]
        remedy = f"The nearest name is {near!r} of {', '.join(MODELS)}; or give a config.json"
        raise FalqonError(f"model {model!r}", "is unknown, and there is no such file", remedy)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        remedy = "Give the config.json of a decoder"
        raise FalqonError(str(file), f"it can't be read ({error})", remedy) from error
    return _from_config(file, config)


def _from_config(file: Path, config: Any) -> Decoder:
    sizes = config if isinstance(config, dict) else {}
    sizes = sizes.get("text_config", sizes)

    def size(name: str, otherwise: int | None = None) -> int:
        value = sizes.get(name, otherwise) if isinstance(sizes, dict) else None
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problem = f"{name} is {value!r}, and not a size"
            raise FalqonError(str(file), problem, "Give the config.json of a decoder like LLaMA")
        return value

    if isinstance(sizes, dict) and any("expert" in name for name in sizes):
        problem = "it is a mixture of experts, of which the arithmetic knows nothing"
        raise FalqonError(str(file), problem, "Give the config.json of a decoder like LLaMA")
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    return Decoder(
        name=str(file),
        hidden=hidden,
        inner=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head=size("head_dim", max(1, hidden // heads)),
        vocabulary=size("vocab_size"),
        source=str(file),
    )
