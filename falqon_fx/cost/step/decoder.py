"""The sizes of a decoder: of a model with a name, or of a config.json."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from falqon_fx.errors import FalqonError


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer: ``top`` of them for each token, ``inner`` columns each, beside
    ``shared`` columns that all tokens take. ``dense`` layers have none.
    """

    experts: int
    top: int
    inner: int
    shared: int = 0
    dense: int = 0


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes, as its config.json has them, and where they come from. ``qk_norm``: if
    q and k have norms of their own; ``mixture``: the experts in the place of a dense MLP.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    source: str
    qk_norm: bool = False
    mixture: Mixture | None = None

    @property
    def kinds(self) -> tuple[Decoder, ...]:
        """The decoders of the layers that are alike: dense ones, and those with experts."""
        if self.mixture is None:
            return (self,)
        dense = self.mixture.dense
        sparse = replace(self.mixture, dense=0)
        of_each = replace(self, mixture=sparse, layers=self.layers - dense)
        return (*[replace(self, mixture=None, layers=dense)] * bool(dense), of_each)

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
        """The linear layers of a decoder layer, those that read one x together; beside experts
        those of the shared one.
        """
        attention = (
            Group("q, k, v", self.hidden, (self.query, self.key, self.key)),
            Group("o", self.query, (self.hidden,)),
        )
        inner = self.inner if self.mixture is None else self.mixture.shared
        if not inner:
            return attention
        up = Group("gate, up", self.hidden, (inner, inner))
        return (*attention, up, Group("down", inner, (self.hidden,)))

    @property
    def stacks(self) -> tuple[tuple[int, int], ...]:
        """in and out of a layer's stacked experts."""
        if self.mixture is None:
            return ()
        return (self.hidden, 2 * self.mixture.inner), (self.mixture.inner, self.hidden)

    @property
    def sites(self) -> int:
        """A layer's linear layers, and its stacks."""
        return sum(len(group.outs) for group in self.groups) + len(self.stacks)

    @property
    def linear_weights(self) -> int:
        """Elements of the weights of a layer's linear layers."""
        return sum(group.features * sum(group.outs) for group in self.groups)

    @property
    def stacked_weights(self) -> int:
        """Elements of its experts' weights."""
        experts = 0 if self.mixture is None else self.mixture.experts
        return experts * sum(features * out for features, out in self.stacks)

    def adapter(self, rank: int) -> tuple[int, int]:
        """Elements of a layer's A, and of its B."""
        of_a = sum(rank * group.features * len(group.outs) for group in self.groups)
        of_b = sum(rank * sum(group.outs) for group in self.groups)
        experts = 0 if self.mixture is None else self.mixture.experts
        for features, out in self.stacks:
            of_a += experts * rank * features
            of_b += experts * rank * out
        return of_a, of_b


@dataclass(frozen=True)
class Group:
    """Siblings: linear layers that read one x."""

    name: str
    features: int
    outs: tuple[int, ...]


def _named(
    name: str,
    source: str,
    sizes: tuple[int, int, int, int, int, int, int],
    qk_norm: bool = False,
    mixture: Mixture | None = None,
) -> Decoder:
    return Decoder(name, *sizes, f"{source}, config.json", qk_norm, mixture)


_QWEN3_MOE = (2048, 6144, 48, 32, 4, 128, 151936)


MODELS = {
    decoder.name: decoder
    for decoder in (
        _named("llama-7b", "huggyllama/llama-7b", (4096, 11008, 32, 32, 32, 128, 32000)),
        _named("llama-3-8b", "meta-llama/Meta-Llama-3-8B", (4096, 14336, 32, 32, 8, 128, 128256)),
        _named("qwen3-8b", "Qwen/Qwen3-8B", (4096, 12288, 36, 32, 8, 128, 151936), True),
        _named("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", _QWEN3_MOE, True, Mixture(128, 8, 768)),
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

    if not isinstance(sizes, dict):
        raise FalqonError(str(file), "it holds no sizes", "Give the config.json of a decoder")

    def size(name: str, otherwise: Any = None) -> int:
        value = sizes.get(name)
        value = otherwise if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problem = f"{name} is {value!r}, and not a size"
            raise FalqonError(str(file), problem, "Give the config.json of a decoder like LLaMA")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    layers = size("num_hidden_layers")
    mixture = _mixture(file, sizes, size, layers)
    # Where all layers have experts, a config need not say how wide a dense MLP would be.
    inner = size("intermediate_size", None if mixture is None else mixture.inner)
    return Decoder(
        name=str(file),
        hidden=hidden,
        inner=inner,
        layers=layers,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head=size("head_dim", max(1, hidden // heads)),
        vocabulary=size("vocab_size"),
        source=str(file),
        qk_norm=str(sizes.get("model_type", "")).startswith("qwen3"),
        mixture=mixture,
    )


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size")


def _mixture(file: Path, sizes: Any, size: Callable[..., int], layers: int) -> Mixture | None:
    """The experts of a config, by the names that transformers' families give them."""
    name = next((name for name in _EXPERTS if sizes.get(name) is not None), None)
    if name is None:
        unknown = sorted(name for name in sizes if "expert" in name and sizes[name])
        if unknown:
            raise _unlike(file, f"its experts are named otherwise ({', '.join(unknown)})")
        return None
    if sizes.get("kv_lora_rank"):
        raise _unlike(file, "its attention has keys and values of low rank (kv_lora_rank)")
    if not {*(sizes.get("layer_types") or ())} <= {"full_attention", "sliding_attention"}:
        raise _unlike(file, "not all of its layers have attention (layer_types)")
    inner = size("moe_intermediate_size", sizes.get("intermediate_size"))
    of_shared = next((name for name in _SHARED if sizes.get(name)), None)
    shared = size(of_shared) if of_shared else inner * (sizes.get("n_shared_experts") or 0)
    dense = _dense(sizes, layers)
    if dense >= layers:
        raise _unlike(file, "none of its layers has experts")
    top = size("num_experts_per_tok", sizes.get("moe_topk"))
    return Mixture(size(name), top, inner, shared, dense)


def _dense(sizes: Any, layers: int) -> int:
    """How many layers have no experts."""
    kinds = sizes.get("mlp_layer_types")
    if isinstance(kinds, list):
        return sum(kind == "dense" for kind in kinds)
    first, step = sizes.get("first_k_dense_replace") or 0, sizes.get("decoder_sparse_step") or 1
    only = sizes.get("mlp_only_layers") or ()
    each = ((i + 1) % step == 0 and i >= first and i not in only for i in range(layers))
    return layers - sum(each)


def _unlike(file: Path, problem: str) -> FalqonError:
    remedy = "Give the config.json of a decoder like LLaMA, or of a mixture like Qwen3-MoE"
    return FalqonError(str(file), f"{problem}, of which the arithmetic knows nothing", remedy)
