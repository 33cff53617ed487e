"""Which launches only carry activations from one place to another.

An *activation* is a tensor over all tokens that is at least as wide as the narrowest site's output,
and no weight. Weights are the inputs that stay in place, and what is made of these alone. A launch
is *plain* where all ops that it computes (Inductor's "Original ATen") are ops of falqon's, copies,
casts, sums or multiples; all kernels that the graph was handed are ours, and plain. Then it is

product  by its name, in `PRODUCTS`
pass     plain, and all activations that it reads were stored by products of the same graph (O or
         dL/dx), or it reads nothing and writes an activation (zeros to add to); also ``addmm`` or
         ``addmm_`` with such a C, which it reads and writes once more
cast     plain, and it reads one activation that no product of the graph stored: the attention's
         output, its dL/dv, or what comes from another graph

and nothing of it otherwise. So a cast or a sum that is fused into what reads O anyway, as the norm
and the activation function do, is no pass; a sum with the residual is none either.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lens.fake_gpu import storage_of

Kind = Literal["product", "pass", "cast", ""]
# The adapters' gradients are sums over tokens: `add_up` adds their parts.
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "_scaled_mm", "gemm", "grad_out_a"}
PRODUCTS |= {"forward_tails", "backward_tails", "partial_a", "partial_b"}
_SUMS = {"add", "mul", "cat", "clone", "copy", "fill", "zero", "zeros", "full"}
_CASTS = {"_to_copy", "convert_element_type"}
_VIEWS = {"view", "_unsafe_view", "reshape", "transpose", "t", "permute", "expand", "slice"}
_VIEWS |= {"select", "unsqueeze", "squeeze"}
PLAIN = _SUMS | _CASTS | _VIEWS


@dataclass(frozen=True)
class Tokens:
    """How an activation is known: sequences, their length, and the narrowest site's output."""

    batch: int
    length: int
    features: int

    def in_(self, tensor: Tensor) -> bool:
        """Whether the tensor is one, by its shape."""
        shape, tokens = {*tensor.shape}, self.batch * self.length
        large = tensor.numel() >= tokens * self.features
        return large and (tokens in shape or {self.batch, self.length} <= shape)


@dataclass
class Passes:
    """Sorts the launches of one graph, in order. ``weights`` are the inputs that stay in place."""

    tokens: Tokens
    weights: Iterable[Tensor]
    # By their storages; the tensors stay alive, as those have numbers that are given again.
    _weights: dict[int, Tensor] = field(init=False)
    _stored: dict[int, Tensor] = field(init=False, default_factory=dict)  # by products

    def __post_init__(self) -> None:
        self._weights = {storage_of(weight): weight for weight in self.weights}

    def sort(
        self, kernel: str, ops: Iterable[str], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> Kind:
        """The kind of the next launch; ``ops`` of a kernel of ours may be empty."""
        kind = self._kind(kernel, ops, reads, writes)
        of_weights = bool(reads) and all(storage_of(t) in self._weights for t in reads)
        for tensor in writes:
            place = storage_of(tensor)
            self._weights.pop(place, None)
            self._stored.pop(place, None)
            if of_weights and kind != "product":
                self._weights[place] = tensor
            elif kernel in PRODUCTS and self._activation(tensor):
                self._stored[place] = tensor
        return kind

    def _kind(
        self, kernel: str, ops: Iterable[str], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> Kind:
        if kernel in PRODUCTS:
            added = reads[:1] if kernel in ("addmm", "addmm_") else []
            return "pass" if any(storage_of(t) in self._stored for t in added) else "product"
        if kernel.startswith("_scaled_dot_product"):
            return ""
        if not all(_plain(op) for op in ops):
            return ""
        places = {storage_of(t) for t in reads if self._activation(t)}
        if places and places <= self._stored.keys():
            return "pass"
        if not reads and any(map(self._activation, writes)):
            return "pass"
        return "cast" if len(places) == 1 and not places & self._stored.keys() else ""

    def _activation(self, tensor: Tensor) -> bool:
        return self.tokens.in_(tensor) and storage_of(tensor) not in self._weights


def _plain(op: str) -> bool:
    namespace, _, name = op.partition(".")
    # Attention is a launch of its own: where Inductor names it, it makes the strides that it wants.
    layout = name.startswith("_scaled_dot_product")
    return layout or namespace == "falqon" or name.rstrip("_") in PLAIN
