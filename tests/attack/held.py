"""What a process holds once all that is garbage is gone, and how often it has compiled.

torch keeps some of each compilation for ever: guards hang on what they look at, metrics stay in a
list, generated code in `linecache`. `tests.attack.torch_run` says how much that is.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import callback

Look = dict[str, int]
# Of what is compared with what it was: nothing may be added.
FLAT = ("ours", "graphs", "modules", "tensors", "threads", "files")
# What torch adds to with each compilation, in proportion to the guards that it keeps.
GROWING = ("objects", "blocks", "memory")
_OURS = "falqon_fx"
_GRAPHS = (fx.Graph, fx.Node, fx.GraphModule)


class Compilations:
    """Counts them. `torch._dynamo.reset` forgets whom it tells of them: `listen` anew behind it."""

    def __init__(self) -> None:
        self.count = 0

    def listen(self) -> None:
        if self._add not in callback.callback_handler.start_callbacks:
            callback.on_compile_start(self._add)

    def _add(self, _: Any) -> None:
        self.count += 1


compilations = Compilations()


def kinds() -> Counter[str]:
    """How many objects there are of each type that has a name for what outlives its use."""
    found: Counter[str] = Counter()
    for item in gc.get_objects():
        kind = type(item)  # isinstance asks objects, some of which answer with an error
        found["objects"] += 1
        found["ours"] += str(kind.__module__).startswith(_OURS)
        found["graphs"] += issubclass(kind, _GRAPHS)
        found["modules"] += issubclass(kind, nn.Module)
        found["tensors"] += issubclass(kind, Tensor)
        found["guards"] += kind is weakref.finalize
    return found


def held() -> Look:
    """Objects by kind, Python's blocks, the process's memory in bytes, threads and open files."""
    for _ in range(3):  # finalizers free what others wait for
        gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # free memory goes back to the system
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        **kinds(),
        "blocks": sys.getallocatedblocks(),
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "compilations": compilations.count,
    }


def always_compiled() -> Any:
    """Beyond the limits Dynamo compiles no more, and PEFT's own layers run."""
    return torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=100_000)
