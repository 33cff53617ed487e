"""What of a training run isn't the model's, back into its objects: an optimizer, a scheduler, the
random generators.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from inspect import isfunction
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ChainedScheduler, SequentialLR

from falqon_fx.errors import FalqonError
from falqon_fx.site.sharded import part_of

_MAKE = "Make it as for the run that was saved"
# Those whose fused steps read a parameter's count of elements from each state.
_FUSED: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),  # AdamW is one
    torch.optim.Adagrad: ("step", "sum"),
    torch.optim.SGD: (),
}
_OPTIONAL = ("max_exp_avg_sq", "momentum_buffer")  # which they read where there is one
_OF_SEVERAL, _INNER = (ChainedScheduler, SequentialLR), "_schedulers"


def check_optimizer(optimizer: torch.optim.Optimizer, saved: Any, where: str) -> None:
    """Raise a `FalqonError` where there is no saved state, or one of other groups, of another
    optimizer, or of other sizes than the parameters'.
    """
    if saved is None:
        raise FalqonError(where, "it holds no optimizer", "Leave out optimizer=")
    groups = _groups(saved, where)
    ours = [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in groups]
    if ours != theirs:
        raise FalqonError(
            "optimizer", f"its groups have {ours} parameters, those in {where} {theirs}", _MAKE
        )
    for group, other in zip(optimizer.param_groups, groups, strict=True):
        # A scheduler adds to them, a newer torch may. Another optimizer has options that we lack.
        lacking, unknown = group.keys() - other.keys(), other.keys() - group.keys() - {"initial_lr"}
        if lacking and unknown:
            raise FalqonError(
                "optimizer",
                f"it has the options {sorted(lacking)}, the one in {where} {sorted(unknown)}",
                _MAKE,
            )
        for name in (group.keys() & other.keys()) - {"params"}:
            if not _alike(group[name], other[name]):
                problem = f"its {name} is {group[name]!r}, that in {where} {other[name]!r}"
                raise FalqonError("optimizer", problem, _MAKE)
    numbers = chain.from_iterable(group["params"] for group in groups)
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        _check_slots(optimizer, number, parameter, saved["state"].get(number, {}), where)


def _groups(saved: Any, where: str) -> list[dict[str, Any]]:
    match saved:
        case {"state": dict(), "param_groups": list(groups)} if all(
            isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
        ):
            numbers = [n for group in groups for n in group["params"]]
            if all(type(n) is int for n in numbers) and len({*numbers}) == len(numbers):
                return groups
    raise FalqonError(where, "its optimizer is damaged", "Load another checkpoint")


def _alike(ours: Any, theirs: Any) -> bool:
    """Whether an option may take the place of another."""
    if isinstance(ours, bool | None):
        return isinstance(theirs, bool | None) or ours is None
    if isinstance(ours, Real | Tensor):  # NumPy's numbers are real ones
        one = not isinstance(theirs, Tensor) or theirs.numel() == 1
        return isinstance(theirs, Real | Tensor) and one
    if isinstance(ours, tuple | list):
        same = isinstance(theirs, tuple | list) and len(ours) == len(theirs)
        return same and all(_alike(*pair) for pair in zip(ours, theirs))
    if isinstance(ours, dict):
        both = ours.keys() & theirs.keys() if isinstance(theirs, dict) else ()
        return isinstance(theirs, dict) and all(_alike(ours[k], theirs[k]) for k in both)
    return isinstance(theirs, str) or not isinstance(ours, str)


def _check_slots(
    optimizer: torch.optim.Optimizer, number: int, parameter: Tensor, slots: Any, where: str
) -> None:
    needed = next((names for kind, names in _FUSED.items() if isinstance(optimizer, kind)), None)
    if needed is None:
        return  # its states may have any size, and its steps look
    if not isinstance(slots, dict) or (slots and not {*needed} <= slots.keys()):
        raise FalqonError(where, f"parameter {number} lacks some of {needed}", _MAKE)
    for name, slot in slots.items():
        if name not in (*needed, *_OPTIONAL):
            continue  # a subclass's own
        shape = torch.Size() if name == "step" else parameter.shape
        if isinstance(slot, Tensor) and (slot.shape != shape or not slot.is_floating_point()):
            problem = (
                f"{where} has {slot.dtype} {list(slot.shape)} as its {name}, not {list(shape)}"
            )
            raise FalqonError(f"optimizer, parameter {number}", problem, _MAKE)
        if not isinstance(slot, Tensor | None) or (slot is None and name in needed):
            raise FalqonError(f"optimizer, parameter {number}", f"its {name} is {slot!r}", _MAKE)


def cut_as(optimizer: torch.optim.Optimizer, saved: Any) -> Any:
    """A saved state with each tensor cut as the parameter that it belongs to is."""
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    pairs = [pair for one, two in groups for pair in zip(one["params"], two["params"])]
    state = {
        number: {
            name: part_of(slot, parameter)
            if isinstance(slot, Tensor) and slot.shape == parameter.shape
            else slot
            for name, slot in saved["state"][number].items()
        }
        for parameter, number in pairs
        if number in saved["state"]
    }
    return {**saved, "state": state}


def check_scheduler(scheduler: Any, saved: Any, where: str) -> None:
    """Raise a `FalqonError` where there is no saved state of a scheduler, or one of another."""
    if saved is None:
        raise FalqonError(where, "it holds no scheduler", "Leave out scheduler=")
    _check_scheduler(scheduler, saved, where)


def _check_scheduler(scheduler: Any, saved: Any, where: str) -> None:
    if not isinstance(saved, dict):
        raise FalqonError(where, "its scheduler is damaged", "Load another checkpoint")
    ours = without_functions(scheduler.state_dict())
    lacking, unknown = ours.keys() - saved.keys(), saved.keys() - ours.keys()
    # A newer torch may only add, or only take away. A state becomes attributes: one that is named
    # as a method, a function or the optimizer would take its place.
    if (lacking and unknown) or any(hasattr(scheduler, str(name)) for name in unknown):
        raise FalqonError(
            "scheduler",
            f"it has {sorted(lacking)}, the one in {where} {sorted(map(str, unknown))}",
            _MAKE,
        )
    inner = getattr(scheduler, _INNER) if isinstance(scheduler, _OF_SEVERAL) else None
    for name in (ours.keys() & saved.keys()) - ({_INNER} if inner is not None else set()):
        if not _alike(ours[name], saved[name]):
            problem = f"its {name} is {ours[name]!r}, that in {where} {saved[name]!r}"
            raise FalqonError("scheduler", problem, _MAKE)
    if inner is None:
        return
    parts = saved.get(_INNER)
    if not isinstance(parts, list) or len(inner) != len(parts):
        count = f"of {len(parts)}" if isinstance(parts, list) else "of none"
        problem = f"it is made of {len(inner)}, the one in {where} {count}"
        raise FalqonError("scheduler", problem, _MAKE)
    for one, two in zip(inner, parts, strict=True):
        _check_scheduler(one, two, where)


def without_functions(state: Any) -> Any:
    """The state of a scheduler, or of one inside another, as torch itself would save it."""
    if type(state) is list:
        return [without_functions(item) for item in state]
    if type(state) is not dict:  # MultiStepLR has a Counter
        return state
    return {k: without_functions(v) for k, v in state.items() if not isfunction(v)}


def check_rng(state: Any, where: str) -> None:
    """Raise a `FalqonError` where a state of the random generators is none."""
    try:
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(state["python"])
        for of_card in state["cuda"]:
            if of_card.dtype != torch.uint8:
                raise TypeError(f"a state of {of_card.dtype}")
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            for of_card, ours in zip(state["cuda"], torch.cuda.get_rng_state_all(), strict=True):
                if of_card.shape != ours.shape:
                    raise ValueError(f"a card's has {of_card.numel()} bytes, not {ours.numel()}")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        problem = f"its state of the random generators is damaged ({e})"
        raise FalqonError(where, problem, "Give rng=False, or load another checkpoint") from e


def rng_of(state: Any, rank: int) -> Any:
    """That of a process; None where fewer have saved, or one alone that was not sharded."""
    others = state.get("others", []) if isinstance(state, dict) else []
    if rank == 0 or not isinstance(others, list):
        return state
    return others[rank - 1] if rank <= len(others) else None


def set_rng(state: Mapping[str, Any]) -> None:
    """Go on with the random numbers of a saved run."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])


def load_all(targets: Iterable[tuple[str, Any, Any]], where: str) -> None:
    """Give each target, named, its saved state.

    Raises:
        FalqonError: one doesn't take it. All are as before then.
    """
    done: list[tuple[Any, Any]] = []
    for name, target, saved in targets:
        done.append((target, _kept(target)))
        try:
            target.load_state_dict(saved)
        except Exception as error:  # whatever the code of others raises at what it didn't write
            for before, state in done:
                before.load_state_dict(state)
            problem = f"it doesn't take the state in {where} ({type(error).__name__}: {error})"
            raise FalqonError(name, problem, _MAKE) from error


def _kept(target: Any) -> Any:
    """The state of a target; that of an optimizer keeps its tensors, which are not written."""
    state = target.state_dict()
    return state if isinstance(target, torch.optim.Optimizer) else copy.deepcopy(state)
