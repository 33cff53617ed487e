"""Whether all processes of a distributed run ask for the same."""

from __future__ import annotations

import os
from itertools import zip_longest

from torch import distributed as dist

from falqon_fx import _compat
from falqon_fx.errors import FalqonError

_KEY = "falqon_fx.prepare"  # the store counts the calls of each rank: the nth meet


def has_others() -> bool:
    """Whether the default process group has other processes than this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_same_on_all_ranks(text: str) -> None:
    """Wait until each rank of the default process group has come here, as long as its store does
    (with torchrun as long as a collective), and compare what they say.

    The store needs no device. Ranks that differ would shard weights of other
    shapes, or compute with other numbers.

    Raises:
        FalqonError: on every rank, where one says something else; where one doesn't come.
    """
    if not has_others() or dist.get_backend() == "fake":
        return
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = _compat.default_store()
    # torchrun keeps its store when it starts the ranks anew.
    key = f"{_KEY}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    turn = store.add(f"{key}.calls.{rank}", 1)
    said, verdict = f"{key}.{turn}.said", f"{key}.{turn}.verdict"
    store.set(f"{said}.{rank}", text)
    try:
        if rank == 0:
            texts = [str(store.get(f"{said}.{other}"), "utf-8") for other in range(ranks)]
            store.set(verdict, _difference(texts))
        different = str(store.get(verdict), "utf-8")
    except RuntimeError as error:  # a store's own, or its subclass DistStoreError
        raise FalqonError(
            f"rank {rank}",
            f"it waited for the other ranks in vain ({str(error).splitlines()[0]})",
            "Call falqon_fx.prepare(model, config) on every rank",
        ) from error
    if different:
        raise FalqonError(
            f"rank {rank}", different, "Call falqon_fx.prepare with the same config on every rank"
        )


def _difference(texts: list[str]) -> str:
    """The first line in which a rank differs from rank 0, or ""."""
    for rank, text in enumerate(texts):
        for ours, theirs in zip_longest(texts[0].splitlines(), text.splitlines()):
            if ours != theirs:
                return f"rank 0 prepares with {ours}, rank {rank} with {theirs}"
    return ""
