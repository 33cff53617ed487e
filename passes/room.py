"""Decide whether W is kept with room for adapters in FP8 behind it, for O by the library.

Its product wants [W | b] in one piece. Else each forward puts them together, which reads and writes
W anew as a transpose does. A copy it is, as Wᵀ is one: the memory that W itself lies in is a
parameter's, which checkpoints, FSDP and `Module.to` lay out anew, and other graphs were compiled
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from falqon_fx._compat import value_of
from falqon_fx.kernels.spec import MAX_PIECES, aligned
from falqon_fx.passes import transposes
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.slots import BaseSlot, CopySlot, Joined, JoinedSlot, find
from falqon_fx.passes.transposes import AS_TOKENS, once_each
from falqon_fx.report.data import WithRoom

Group = tuple[SitePlan, ...]
LIBRARIES = ("scaled_mm", "inductor")
NOT_READ = "no product of the library has been found faster than falqon's, which read b by itself"


def keep_room(plan: Plan) -> Plan:
    """``plan`` with the groups whose W is kept so, and why, or why not."""
    groups = [group for group in plan.groups if _wants_room(group)]
    slots = once_each(JoinedSlot(adapted(group), room_of(group)) for group in groups)
    if not slots:
        return plan
    size = sum(slot.nbytes for slot in slots)
    turned = sum(slot.nbytes for slot in plan.turned.slots)
    given, kinds = (plan, groups, size + turned), 1 + bool(turned)
    why_not = transposes.why_no_copies(*given, "no copy of W", "copies of W", kinds=kinds)
    if why_not:
        return replace(plan, joined=Joined((), WithRoom(False, size, why_not)))
    return _with(plan, slots)


def keep_where_read(plan: Plan, by_library: Callable[[Group], bool]) -> Plan:
    """``plan`` with the copies alone that are read, of groups whose O is ``by_library``, and with
    them in what its sites keep in memory.
    """
    known = plan.joined.slots
    read = {id(slot_of(group, known)) for group in plan.groups if by_library(group)}
    slots = tuple(slot for slot in known if id(slot) in read)
    if known and not slots:
        size = sum(slot.nbytes for slot in known)
        return replace(plan, joined=Joined((), WithRoom(False, size, NOT_READ)))
    plan = plan if len(slots) == len(known) else _with(plan, slots)
    return replace(plan, groups=tuple(_reported(group, slots) for group in plan.groups))


def _reported(group: Group, slots: Sequence[JoinedSlot]) -> Group:
    """The group with its copy in what its sites keep in memory: each its own rows."""
    slot = slot_of(group, slots)
    if slot is None:
        return group
    own = (adapted((site,)) for site in group)
    return transposes.with_memory(
        group, slot, (JoinedSlot(bases, slot.room).nbytes if bases else 0 for bases in own)
    )


def _with(plan: Plan, slots: tuple[JoinedSlot, ...]) -> Plan:
    why = (
        "the library's product wants it in one piece with the adapter, and to put these together "
        f"takes as long as its products of about {AS_TOKENS} tokens"
    )
    return replace(
        plan, joined=Joined(slots, WithRoom(True, sum(slot.nbytes for slot in slots), why))
    )


def adapted(group: Sequence[SitePlan]) -> tuple[BaseSlot, ...]:
    """The bases of a group's sites with adapters."""
    return tuple(s.base for s in group if s.adapters and isinstance(s.base, BaseSlot))


def room_of(group: Sequence[SitePlan]) -> int:
    """The columns of all adapters of a group."""
    return sum(aligned(slot.width) for site in group for slot in site.adapters)


def slot_of(group: Sequence[SitePlan], slots: Iterable[CopySlot]) -> CopySlot | None:
    """What is kept of a group, of what is kept."""
    return find(slots, adapted(group), room_of(group))


def _wants_room(group: Sequence[SitePlan]) -> bool:
    """Whether the library may multiply it in one product. In a checkpoint's body, which runs again
    in backward, the room may be another graph's by then.
    """
    first, bases = group[0], adapted(group)
    return (
        transposes.on_gpu(value_of(first.match.x))
        and first.spec.adapter == "fp8"
        and first.spec.kernel in ("auto", "max-autotune", *LIBRARIES)
        and first.report.architecture > 0
        and first.match.scope.parent is None
        and all(slot.base is not None for site in group for slot in site.adapters)
        and 0 < len(bases) <= MAX_PIECES
        and len({*map(id, bases)}) == len(bases)
    )
