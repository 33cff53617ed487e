"""Decide whether Wᵀ is kept beside W, for dL/dx on tensor cores that want it row by row.

Else each backward transposes W's bytes anew, which takes as long whatever the tokens are. W is
constant: one Wᵀ, of siblings side by side, is made when the graph first runs, and enters it as one
more operand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from falqon_fx._compat import is_fsdp, value_of
from falqon_fx.kernels import hardware
from falqon_fx.kernels.spec import aligned
from falqon_fx.passes.plan import Plan, SitePlan
from falqon_fx.passes.slots import BaseSlot, CopySlot, Turned, TurnedSlot, find
from falqon_fx.passes.terms import Experts
from falqon_fx.report.data import Transposes
from falqon_fx.site.names import model_of_call, tensors_of

Group = tuple[SitePlan, ...]
S = TypeVar("S", bound=CopySlot)

# To read and write an element of W takes an H100 2 / 2.8e12 s, its products forward and backward
# 4 / 1.2e15 s a token: a transpose takes as long as the products of so many tokens.
AS_TOKENS = 200
MOST_TOKENS = 16384  # of which it is about a hundredth
SHARE = 0.5  # of a card's memory; the rest is for activations


def keep_transposes(plan: Plan) -> Plan:
    """``plan`` with the groups whose Wᵀ is kept, and why, or why not."""
    groups = [group for group in plan.groups if _has_transpose(group)]
    if not groups:
        return plan
    slots = _slots(groups)
    size = sum(slot.nbytes for slot in slots)
    tokens, kind = groups[0][0].report.tokens_hint, groups[0][0].report.architecture
    as_it_lies = hardware.reads_columns(hardware.family(kind))
    needless = f"sm_{kind} multiplies W as it lies" if as_it_lies else ""
    asked = "it", "transposes"
    why_not = why_no_copies(plan, groups, size, *asked, needless=needless) if slots else _TWICE
    if why_not:
        return replace(plan, turned=Turned((), Transposes(False, size, why_not)))
    why = (
        'transpose="store" asks for it'
        if plan.config.transpose == "store"
        else f"dL/dx wants it row by row on sm_{kind}, and to transpose W in each step takes as "
        f"long as its products of about {AS_TOKENS} tokens, where a step has {tokens}"
    )
    chosen = set(map(id, groups))
    found = tuple(_reported(g, slots) if id(g) in chosen else g for g in plan.groups)
    said = Transposes(True, size, why)
    return replace(plan, groups=found, turned=Turned(slots, said))


_TWICE = "each W has several adapters in FP8 here, of which none can have columns behind it"


def _slots(groups: Sequence[Group]) -> tuple[TurnedSlot, ...]:
    """What is kept of these groups, once of those with the same bases. Columns behind Wᵀ are of one
    group alone: a graph has no order for two that write the same.
    """
    return once_each(TurnedSlot(bases_of(group), room_of(group)) for group in groups)


def once_each(found: Iterable[S]) -> tuple[S, ...]:
    """Each of equal slots once, but none of those with room that are equal."""
    slots: list[S] = []
    shared: list[S] = []
    for slot in found:
        if not any(slot.is_of(known.bases, known.room) for known in slots):
            slots.append(slot)
        elif slot.room:
            shared.append(slot)
    return tuple(s for s in slots if not any(s.is_of(two.bases, two.room) for two in shared))


def room_of(group: Sequence[SitePlan]) -> int:
    """How many columns the adapters of a group have behind its Wᵀ: those in FP8 that read x."""
    if any(adapter.x is not None for site in group for adapter in site.match.added):
        return 0
    in_fp8 = [slot for site in group for slot in site.adapters if slot.base is not None]
    return sum(aligned(slot.rank) for slot in in_fp8)


def slot_of(group: Sequence[SitePlan], slots: Iterable[CopySlot]) -> CopySlot | None:
    """What is kept of a group, of what is kept."""
    return find(slots, [site.base for site in group], room_of(group))


def on_gpu(value: Tensor) -> bool:
    """Whether a tensor is one of a GPU."""
    return value.device.type == "cuda"


def _has_transpose(group: Group) -> bool:
    """Whether FP8 products make dL/dx of it."""
    first, x = group[0], value_of(group[0].match.x)
    return (
        torch.is_grad_enabled()
        and on_gpu(x)
        and x.requires_grad
        and first.spec.base == "fp8"
        and first.report.architecture > 0
        and not isinstance(first.match.base, Experts)
        and all(isinstance(site.base, BaseSlot) for site in group)
    )


def bases_of(group: Sequence[SitePlan]) -> tuple[BaseSlot, ...]:
    """The bases of a group's sites."""
    return tuple(site.base for site in group if isinstance(site.base, BaseSlot))


def why_no_copies(
    plan: Plan,
    groups: Sequence[Sequence[SitePlan]],
    size: int,
    asked: str,
    copies: str,
    *,
    kinds: int = 1,
    needless: str = "",
) -> str:
    """Why copies of W of these groups, of ``size`` bytes, aren't kept, or ""; from what all
    processes of a training know alike. ``asked``: what transpose="transient" asks for; ``needless``
    is why nobody would read them; ``kinds`` of copies take memory.
    """
    choice = plan.config.transpose
    if choice in ("transient", "kernel"):
        return f'transpose="{choice}" asks for {asked}'
    if is_gathered(groups):
        return "FSDP shards W, beside which it would be whole"
    if choice == "store":
        return ""
    if needless:
        return needless
    tokens = max(group[0].report.tokens_hint for group in groups)
    if tokens > MOST_TOKENS:
        share = AS_TOKENS / tokens
        return f"a step of {tokens} tokens would be {share:.1%} faster in these products"
    device = value_of(groups[0][0].match.x).device
    need, room = _training_bytes(size, kinds), hardware.memory(device)
    if need <= SHARE * room:
        return ""
    return (
        f"the model with its gradients, AdamW's moments and all {copies} is {need / 1e9:.3g} GB, "
        f"more than {SHARE:.0%} of the card's {room / 1e9:.3g}"
    )


def is_gathered(groups: Iterable[Sequence[SitePlan]]) -> bool:
    """Whether FSDP shards any of their W."""
    for base in (base for group in groups for base in bases_of(group)):
        given = base.prepared or ((base.weight.node,) if base.weight else ())
        if any(node is not None and is_fsdp(node) for node in given):
            return True
    return False


def _training_bytes(size: int, kinds: int = 1) -> int:
    """What the model whose call runs takes: its parameters and buffers; of those that train a
    gradient, and two moments in float32; of frozen matrices an FP8 form, where they are none yet,
    and ``kinds`` copies. ``size``, that of the copies, where there is no such model.
    """
    need = matrices = 0
    for tensor, _ in tensors_of(model_of_call()).values():
        need += tensor.nbytes
        if tensor.requires_grad:
            need += tensor.nbytes + 8 * tensor.numel()
        elif tensor.dim() > 1:
            matrices += tensor.numel()
            need += tensor.numel() if tensor.itemsize > 1 else 0
    return need + max(kinds * matrices, size)


def _reported(group: Group, slots: Sequence[TurnedSlot]) -> Group:
    """The group with its transposes in what its sites keep in memory."""
    slot = slot_of(group, slots)
    if slot is None:
        return group
    room = bool(slot.room)
    each = (TurnedSlot(bases_of((s,)), room_of((s,)) if room else 0).nbytes for s in group)
    return with_memory(group, slot, each)


def with_memory(group: Group, slot: CopySlot, each: Iterable[int]) -> Group:
    """The group with the bytes that ``each`` of its sites has of a copy in what it keeps."""
    sites = []
    for site, own in zip(group, each, strict=True):
        assert site.report.memory is not None
        memory = replace(site.report.memory, **{slot.name: own})
        sites.append(replace(site, report=replace(site.report, memory=memory)))
    return tuple(sites)
