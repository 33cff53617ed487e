"""Source to callable kernels, with a copy in a cache folder for people, tracebacks and debuggers.

The text that runs is always the rendered one: a file that differs from it (cut off, edited, written
by a bad disk) is written anew, and no file is ever executed.
"""

from __future__ import annotations

import linecache
from functools import cache
from types import ModuleType

from falqon_fx.kernels.cache import cache_folder, store
from falqon_fx.kernels.interpreter import NAMESPACE, decorating
from falqon_fx.kernels.render import render
from falqon_fx.kernels.spec import KernelSpec


@cache
def load(spec: KernelSpec, interpret: bool = False) -> ModuleType:
    """The module rendered from ``spec``, its kernels compiled on demand or interpreted."""
    source = render(spec)
    path = str(store(source, spec.name, cache_folder()))
    # Triton reads the source of a kernel through linecache: an entry without a time is never
    # checked against the disk, so that Triton sees this text whatever becomes of the file.
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    module = ModuleType(f"{__package__}.generated.{spec.name}")
    module.__file__ = path
    if interpret:
        module.__dict__.update(NAMESPACE)
    with decorating(interpret):
        exec(compile(source, path, "exec"), module.__dict__)
    return module
