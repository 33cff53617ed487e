"""The generated code, run with launches that are noted down in place of being made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from falqon_fx.ops import products
from lens.fake_gpu import Kernel, storage_of

aten = torch.ops.aten
# Ops of ours whose body is Python that launches kernels.
BODIES: dict[str, Callable[..., Any]] = {
    "cast_fp8": products.cast_fp8,
    "merged_product": products.merged_product,
    "adapter_product": products.adapter_product,
    "grad_x_product": products.grad_x_product,
    "grad_out_a": products.grad_out_a,
    "adapter_grads": products.adapter_grads,
}
# Launches of what is not one. FlashAttention's backward: dO · O, the products, dq to bf16.
_SEVERAL = {"_scaled_dot_product_flash_attention_backward": 3}
_ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "_reshape_alias")
_NOTHING = ("lift_fresh", "set_")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, bytes by the shapes of its arguments, and the op of ours whose body
    made it, or "".
    """

    kernel: str
    reads: int
    writes: int
    inside: str = ""


@dataclass(eq=False)
class Launches(TorchDispatchMode):
    """Notes the launches of the code that runs in its block, in order.

    ``python_ops`` are the calls of ops of ours whose body is Python. Those bodies run as well, with
    the choice between kernels that comes first of those that the option ``kernel`` allows.
    """

    made: list[Launch] = field(default_factory=list)
    python_ops: list[str] = field(default_factory=list)
    results: dict[str, list[Any]] = field(default_factory=dict)  # of each op, in order

    def __post_init__(self) -> None:
        super().__init__()
        self._inside = ""
        self._fresh: dict[int, Tensor] = {}  # allocated, not written yet; kept alive, as ids are

    def inductor(self, kernel: Kernel, given: Sequence[Any]) -> None:
        """A kernel that Inductor wrote, or one of ours that it was handed in the graph."""
        named = dict(zip(kernel.arguments, given))
        tensors = {name: v for name, v in named.items() if isinstance(v, Tensor)}
        if not any(name.startswith(("in_", "out_")) for name in tensors):
            self.triton(kernel.name, given)
            return
        reads = [v for name, v in tensors.items() if name.startswith("in_")]
        writes = [v for name, v in tensors.items() if name.startswith(("out_", "in_out_"))]
        self._note(kernel.name, reads, writes)

    def triton(self, name: str, given: Sequence[Any]) -> None:
        """A kernel of ours: what it is given before anything was written there is a result."""
        tensors = list(_tensors(given))
        writes = [t for t in tensors if storage_of(t) in self._fresh]
        self._note(name, [t for t in tensors if storage_of(t) not in self._fresh], writes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "falqon":
            result = self._body(name, args, kwargs)
            self.results.setdefault(str(func), []).append(result)
            return result
        result = func(*args, **kwargs)
        if not self._inside:
            self.results.setdefault(str(func), []).append(result)
        results = list(_tensors(result))
        if name in _ALLOCATE or name.startswith("empty"):
            self._fresh |= {storage_of(t): t for t in results}
        elif func.namespace != "prim" and not func.is_view and name not in _NOTHING:
            self._op(name, func, args, kwargs, results)
        return result

    def _op(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], results: list[Tensor]
    ) -> None:
        reads = list(_tensors((args, {k: v for k, v in kwargs.items() if k != "out"})))
        if name == "addmm" and _copies(args[0], results[0]):
            self._note("copy of addmm", [args[0]], results)
            reads[0] = results[0]
        for _ in range(_SEVERAL.get(name, 1)):
            self._note(name, reads, results)
            reads, results = [], []  # bytes are counted once

    def _body(self, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """What an op of ours launches; a name that is not known raises."""
        self.python_ops.append(name)
        self._inside = name
        try:
            with self:
                return BODIES[name](*args, **kwargs)
        finally:
            self._inside = ""

    def _note(self, kernel: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        for tensor in writes:
            self._fresh.pop(storage_of(tensor), None)
        self.made.append(Launch(kernel, _bytes(reads), _bytes(writes), self._inside))


def _copies(c: Tensor, result: Tensor) -> bool:
    """Whether addmm copies C, a matrix of its own, to where its result goes."""
    return c.dim() == 2 and c.shape == result.shape and storage_of(c) != storage_of(result)


def _tensors(values: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        base = getattr(leaf, "base", leaf)  # of a tensor descriptor
        if isinstance(base, Tensor):
            yield base


def _bytes(tensors: Sequence[Tensor]) -> int:
    """Each once, however often an argument names it; a broadcast dimension has no bytes."""
    sizes: dict[tuple[Any, ...], int] = {}
    for t in tensors:
        key = (storage_of(t), t.storage_offset(), tuple(t.shape), t.stride())
        elements = 1
        for length, stride in zip(t.shape, t.stride()):
            elements *= length if stride or length < 2 else 1
        sizes[key] = elements * t.element_size()
    return sum(sizes.values())
