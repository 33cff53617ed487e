"""The generated code, run with launches that are noted down in place of being made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lens.fake_gpu import storage_of
from lens.kernel import Kernel
from lens.passes import Kind, Passes

# Launches of what is not one. FlashAttention's backward: dO · O, the products, dq to bf16.
_SEVERAL = {"_scaled_dot_product_flash_attention_backward": 3}
_NOTHING = ("new_empty", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_")


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, bytes by the shapes of its arguments, and whether it is a product or
    only carries activations (`lens.passes`).
    """

    kernel: str
    reads: int
    writes: int
    kind: Kind


@dataclass(eq=False)
class Launches(TorchDispatchMode):
    """Notes the launches of the code that runs in its block, in order.

    ``python_ops`` are the calls of ops of ours whose body is Python: each counts as one launch,
    whatever its body would launch. Where several launches fill a buffer before it is read, its
    bytes are counted with the first.
    """

    passes: Passes
    made: list[Launch] = field(default_factory=list)
    python_ops: list[str] = field(default_factory=list)
    results: dict[str, list[Any]] = field(default_factory=dict)  # of each op, in order

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._unread: dict[int, Tensor] = {}  # written; kept alive, as numbers are given again
        self._static = {storage_of(weight): weight for weight in self.passes.weights}

    def triton(self, kernel: Kernel, given: Sequence[Any]) -> None:
        """A kernel that Inductor wrote, or one of ours that it was handed in the graph."""
        named = dict(zip(kernel.arguments, given))
        reads_of, writes_of = kernel.reads, kernel.writes
        if "tail_ptr" in named:  # columns alone of it are written, as many as y has
            columns = named["y_ptr"].shape[1]
            named["tail_ptr"] = named["tail_ptr"].narrow(1, 0, columns)
            reads_of = reads_of - {"tail_ptr"}
        for j, k in enumerate(named.get(f"k{j}") for j in range(len(named))):
            if k is not None:  # of x columns alone are read
                named[f"x{j}_ptr"] = named[f"x{j}_ptr"].narrow(1, 0, k)
        for name in writes_of & named.keys():  # of what is there before, maybe some columns
            whole = named[name]
            if isinstance(whole, Tensor) and storage_of(whole) in self._static:
                few = kernel.elements and kernel.elements < whole.numel()
                named[name] = whole.narrow(1, 0, kernel.elements // len(whole)) if few else whole
        reads, writes = (
            [*_tensors([value for name, value in named.items() if name in names])]
            for names in (reads_of, writes_of)
        )
        self._note(kernel.name, kernel.ops, reads, writes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        made = kwargs.get("out") if name == "_scaled_mm" else None  # no fake one writes into it
        result = func(*args, **kwargs) if made is None else made
        self.results.setdefault(str(func), []).append(result)
        if func.namespace == "falqon":
            self.python_ops.append(name)
        nothing = name in _NOTHING or name.startswith("empty")
        if not (nothing or func.namespace == "prim" or func.is_view):
            self._op(name, func, args, kwargs, list(_tensors(result)))
        return result

    def _op(
        self, name: str, func: Any, args: Any, kwargs: dict[str, Any], results: list[Tensor]
    ) -> None:
        reads = list(_tensors((args, {k: v for k, v in kwargs.items() if k != "out"})))
        if name == "addmm" and _copies(args[0], results[0]):
            self._note("copy of addmm", ["aten.copy"], [args[0]], results)
            reads[0] = results[0]
        for _ in range(_SEVERAL.get(name, 1)):
            self._note(name, [f"{func.namespace}.{name}"], reads, results)
            reads, results = [], []  # bytes are counted once

    def _note(
        self, kernel: str, ops: Iterable[str], reads: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        kind = self.passes.sort(kernel, ops, reads, writes)
        for tensor in reads:
            self._unread.pop(storage_of(tensor), None)
        written = [t for t in writes if storage_of(t) not in self._unread]
        self._unread |= {storage_of(t): t for t in writes}
        self.made.append(Launch(kernel, _bytes(reads), _bytes(written), kind))


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
