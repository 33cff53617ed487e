"""What collectives move, counted where the process group is called."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """The bytes that all-gathers give, and that reduce-scatters and all-reduces take."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.scattered = self.summed = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "allgather" in str(func):
            self.gathered += args[0].nbytes
        if "reduce_scatter" in str(func):
            self.scattered += args[1].nbytes
        if "allreduce" in str(func) or "all_reduce" in str(func):
            given = args[0] if isinstance(args[0], list) else [args[0]]
            self.summed += sum(tensor.nbytes for tensor in given)
        return func(*args, **(kwargs or {}))
