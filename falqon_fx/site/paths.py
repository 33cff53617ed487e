"""The path of a site, from the names of its parameters."""

from __future__ import annotations

from collections.abc import Sequence

IN_FP8 = "_fp8"  # the end of the name of a prepared stack, behind that of its parameter
WRAPPED = "_checkpoint_wrapped_module"  # torch's checkpoint_wrapper calls its one child so


def without_wrappers(path: str) -> str:
    """The path of a module as state dicts have it, which leave torch's checkpoint wrappers out."""
    return ".".join(part for part in path.split(".") if part != WRAPPED)


def common_path(names: list[str]) -> str:
    """The deepest module that holds all of a site's parameters."""
    common: list[str] = []
    for column in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return ".".join(common) or names[0]


def deepest_path(names: Sequence[Sequence[str]]) -> str:
    """The deepest module that holds all of a site's parameters, each with all of its names: a tied
    one has several.
    """
    modules = [{path: None for name in own for path in _modules(name)} for own in names]
    shared = [path for path in modules[-1] if all(path in paths for paths in modules)]
    return max(shared, key=lambda path: path.count("."), default="") or names[0][0]


def stack_path(name: str, prepared: bool) -> str:
    """The path of stacked weights as a site, from the name of their parameter, or of one of those
    that a ``prepared`` stack consists of: as PEFT names what it targets.
    """
    if prepared:
        name = name.rpartition(".")[0].removesuffix(IN_FP8)
    return ".".join(part for part in name.split(".") if part not in ("base_layer", WRAPPED))


def _modules(name: str) -> list[str]:
    """The paths of the modules around a parameter."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
