"""Whether the tensors of a site are what its description asks for, of the sizes that the model has:
what a file says becomes sizes of memory, and what multiplies trusts them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.rows.state import allocate
from falqon_fx.site.base import Base, check_base
from falqon_fx.site.forms import code_of, scale_shape
from falqon_fx.site.numerics import as_scale, dtype_name, scale_bits
from falqon_fx.site.spec import RowsSpec, SiteSpec, parse_spec

Site = Mapping[str, Any]
_REMEDY = "Make the model as for the run that was saved: same base, same adapter config"
_DAMAGED = "Load another checkpoint, or write this one again"


def spec_of(site: Site, path: str, out: int, where: str) -> SiteSpec:
    """The spec that describes a site: a `RowsSpec` with update="rows".

    Raises:
        FalqonError: an option that there isn't, or a value that it doesn't take.
    """
    given = site["spec"]
    try:
        spec = RowsSpec(**given) if "scaling" in site else SiteSpec(**given)
        known = parse_spec(str(spec))
        if isinstance(spec, RowsSpec):
            spec.rows(out)
    except (TypeError, ValueError, OverflowError) as error:
        raise FalqonError(path, f"its options in {where} are none ({error})", _DAMAGED) from error
    if known != spec or asdict(known) != {"base": "fp8", **given}:  # older files don't name it
        raise FalqonError(path, f"its options in {where} are none ({given})", _DAMAGED)
    return spec


def check_site(
    path: str,
    site: Site,
    tensors: Mapping[str, Tensor],
    size: tuple[int, int],
    where: str,
    ranks: Collection[int] = (),
) -> None:
    """Compare dtype and shape of every tensor of a site with those that a base weight [out, in] of
    ``size`` and one of the ``ranks`` have, where any are known.

    Raises:
        FalqonError: they don't fit.
    """
    out, features = size
    spec, dtype = spec_of(site, path, out, where), getattr(torch, site.get("dtype", "float32"))
    expected: dict[str, Tensor]
    if isinstance(spec, RowsSpec):
        rank = _rank(path, tensors, where, ranks)
        given = (out, features, rank, dtype, site["scaling"], spec, torch.device("meta"))
        expected = allocate(*given).stored
        if "dtype" not in site and (applied := tensors.get("applied")) is not None:
            floats = applied.dtype in (torch.float32, torch.bfloat16)
            expected["applied"] = expected["applied"].to(applied.dtype if floats else dtype)
    else:
        shape, code = code_of(out, features, spec)
        scale = torch.empty(scale_shape(out, spec), dtype=torch.float32, device="meta")
        expected = {
            "code": torch.empty(shape, dtype=code, device="meta"),
            "scale": scale_bits(scale),
            "digest": torch.empty(8, dtype=torch.uint8, device="meta"),
        }
    for name, like in expected.items():
        if name not in tensors:
            raise FalqonError(path, f"{where} lacks its {name}", _DAMAGED)
        found = tensors[name]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            problem = f"{where} has {described(found)} as its {name}, the model {described(like)}"
            raise FalqonError(path, problem, _REMEDY)


def _rank(path: str, tensors: Mapping[str, Tensor], where: str, ranks: Collection[int]) -> int:
    applied = tensors.get("applied")
    rank = applied.shape[1] if applied is not None and applied.dim() == 2 else 0
    if not rank or (ranks and rank not in ranks):
        problem = (
            f"its lora_A in {where} is of rank {rank}, in the model {sorted(ranks) or 'of any'}"
        )
        raise FalqonError(path, problem, _REMEDY)
    return rank


def check_values(path: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse FP8 bytes or scales of a site that are no numbers (reads every byte).

    Raises:
        FalqonError: NaN, or a scale that is NaN, Inf, zero or negative.
    """
    check_base(path, Base(tensors["code"], as_scale(tensors["scale"])), where)


def ranks_around(model: nn.Module, path: str) -> set[int]:
    """The ranks of the adapters around the base layer at ``path``; none where it has none."""
    above, _, last = path.rpartition(".")
    if last != "base_layer":
        return set()
    named = model.get_submodule(above).named_parameters()
    return {p.shape[0] for name, p in named if "lora_A" in name.split(".") and p.dim() == 2}


def described(tensor: Tensor) -> str:
    """Dtype and shape."""
    return f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
