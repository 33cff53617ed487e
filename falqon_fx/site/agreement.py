"""Processes that compute one model together say the same, or all of them stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch.distributed as dist

from falqon_fx._compat import is_dtensor
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError

T = TypeVar("T")


def of_each(value: T, group: Any = None) -> list[T]:
    """A value of each process."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def agree(group: Any, said: Mapping[str, str], problem: BaseException | None = None) -> None:
    """Compare what the processes of a group have said; the problem that one has is all of theirs.

    Raises:
        FalqonError: on every process of the group, with what differs where.
    """
    everyone = of_each((dict(said), plain(problem)), group)
    if problem is not None:
        raise problem
    first, _ = everyone[0]
    for rank, (theirs, failed) in zip(dist.get_process_group_ranks(group), everyone, strict=True):
        if failed is not None:
            raise from_rank(rank, failed)
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise FalqonError(
                    "",
                    f"the processes differ in {name}: {first.get(name)} on the first of the mesh, "
                    f"{theirs.get(name)} on rank {rank}",
                    "Let all of them make the same calls, with the same config and versions",
                )


def plain(error: BaseException | None) -> tuple[str, str, str] | None:
    """An error as what can be sent."""
    if isinstance(error, FalqonError):
        return error.site, error.problem, error.remedy
    if error is None:
        return None
    return "", f"{type(error).__name__}: {error}", "Look at what that process says"


def from_rank(rank: int, said: tuple[str, str, str]) -> FalqonError:
    """The error that another process has sent."""
    site, problem, remedy = said
    return FalqonError(site, f"{problem} (on rank {rank})", remedy)


def groups_of(values: Iterable[Any]) -> list[Any]:
    """The process groups of the meshes of one dimension that DTensors lie on, in a fixed order."""
    groups: dict[str, Any] = {}
    for value in values:
        if is_dtensor(value) and value.device_mesh.ndim == 1:
            group = value.device_mesh.get_group()
            groups[group.group_name] = group
    return [groups[name] for name in sorted(groups)]


def check_options(path: str, config: FalqonConfig) -> None:
    """Refuse options that need all of a base weight in one place, and what tensor parallelism has
    not been built for.

    Raises:
        FalqonError: names the option.
    """
    if config.base_dtype != "fp8":
        raise FalqonError(
            path,
            f'base_dtype="{config.base_dtype}" is not built for base weights that are cut over '
            "processes",
            'Set base_dtype="fp8"',
        )
    if config.init == "svd" or config.update == "rows":
        option = 'init="svd"' if config.init == "svd" else 'update="rows"'
        raise FalqonError(
            path,
            f"{option} needs whole base weights, and these are cut over processes",
            'Use init="keep" and update="adapter", the defaults',
        )


_agreed: set[tuple[str, tuple[tuple[str, str], ...]]] = set()  # groups, and what they said


def agree_once(group: Any, said: Mapping[str, str]) -> None:
    """`agree`, once for a group and what is said."""
    key = (group.group_name, tuple(said.items()))
    if key not in _agreed:
        agree(group, said)
        _agreed.add(key)


reset = _agreed.clear
