"""Whether the terms that a calibration has put beside an FP8 weight are such, wherever they come
from: what multiplies and what picks channels trusts them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from falqon_fx.errors import FalqonError
from falqon_fx.site.numerics import INT8, dtype_name
from falqon_fx.site.sharded import local

_PAIRS = (("error_a", "error_b"), ("channels", "columns"))
_REMEDY = "Load another file, or calibrate anew with falqon_fx.prepare(model, calibration=batches)"


def as_made(path: str, terms: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Terms in bfloat16, as a calibration makes them, where something has cast all parameters to a
    wider dtype, as PEFT's `prepare_model_for_kbit_training` does.

    Raises:
        FalqonError: a value of them is none of bfloat16.
    """
    made = {}
    for name, term in terms.items():
        wide = term.is_floating_point() and term.dtype != torch.bfloat16
        made[name] = term.detach().to(torch.bfloat16) if wide else term.detach()
        if wide and not term.is_meta and bool((local(made[name]) != local(term)).any()):
            raise FalqonError(
                path,
                f"{where} has {dtype_name(term.dtype)} as its {name} that bfloat16 doesn't hold: "
                "something has averaged or overwritten what a calibration made",
                "Average the trained parameters alone (those with requires_grad)",
            )
    return made


def check_terms(
    path: str,
    terms: Mapping[str, Tensor],
    size: tuple[int, int],
    where: str,
    code: torch.dtype | None,
) -> None:
    """Refuse terms that don't belong to a weight [out, in] of ``size``, whose bytes are ``code``.

    Raises:
        FalqonError: one without its other half, a shape or dtype that is another, values that are
            no numbers, channels that x doesn't have, or one twice; in INT8 an A_c that is not zero
            in these channels (see `falqon_fx.ops.cast_errors`).
    """
    for pair in _PAIRS:
        given = [name for name in pair if name in terms]
        if len(given) == 1:
            (lacks,) = (name for name in pair if name not in given)
            raise FalqonError(path, f"{where} has its {given[0]} and lacks its {lacks}", _REMEDY)
    for name, shape in _shapes(terms, size).items():
        term, dtype = terms[name], torch.int32 if name == "channels" else torch.bfloat16
        if (tuple(term.shape), term.dtype) != (shape, dtype):
            raise FalqonError(
                path,
                f"{where} has {dtype_name(term.dtype)} {list(term.shape)} as its {name}, which is "
                f"to be {dtype_name(dtype)} {list(shape)}",
                _REMEDY,
            )
        if term.is_meta:
            continue
        values = local(term)
        if name == "channels":
            if values.numel() and not (0 <= int(values.min()) <= int(values.max()) < size[1]):
                problem = f"{where} has channels of x that its {size[1]} inputs don't have"
                raise FalqonError(path, problem, _REMEDY)
            if len(values.unique()) < len(values):
                raise FalqonError(path, f"{where} has a channel of x twice", _REMEDY)
        elif not bool(values.isfinite().all()):
            raise FalqonError(path, f"its {name} in {where} holds NaN or Inf", _REMEDY)
    both = terms.get("error_a"), terms.get("channels")
    if code == INT8 and all(term is not None and not term.is_meta for term in both):
        error_a, channels = (local(term) for term in both if term is not None)
        if bool(error_a.index_select(1, channels).any()):
            problem = f"{where} has an error_a for channels that INT8 leaves out of the cast of x"
            raise FalqonError(path, f"{problem}: it is of a version that left none out", _REMEDY)


def _shapes(terms: Mapping[str, Tensor], size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """What the shapes are to be, with the rank and the channels of the first of each pair."""
    out, features = size
    shapes: dict[str, tuple[int, ...]] = {}
    if "error_a" in terms:
        rank = terms["error_a"].shape[0] if terms["error_a"].dim() else 0
        shapes |= {"error_a": (rank, features), "error_b": (out, rank)}
    if "channels" in terms:
        count = terms["channels"].numel()
        shapes |= {"channels": (count,), "columns": (out, count)}
    return shapes
