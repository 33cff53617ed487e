"""What the cast of x loses in the channels S of a calibration, brought to where x goes.

    e = (x - dq(q(x)))_S [n, c]      O += e · W_Sᵀ

In FP8 e is a share of x_S, whatever else a token holds. INT8 has one step for all of a token, which
its largest channels make wide. So there q is zero in S, and e is x_S, as in LLM.int8() (arXiv
2208.07339), whose channels are found token by token. All that reads q then gets e:

    O_A += e · dq(Â_S)ᵀ      dL/dA_S += Dᵀ · e

A_c has zeros in S, since W_S has no cast error.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.ops.arguments import Merged
from falqon_fx.site.numerics import INT8, round_to_fp8
from falqon_fx.site.spec import SiteSpec, parse_spec


def cast_error(
    x: Tensor, scale: Tensor, channels: Tensor, spec: SiteSpec, apart: Tensor | None = None
) -> Tensor:
    """(x - dq(q(x)))_S [n, c], float32, for x [..., in] as it is cast with ``scale``, and with
    zeros in the channels ``apart``, bool [in].
    """
    picked = x.reshape(-1, x.shape[-1]).index_select(1, channels).to(torch.float32)
    read = round_to_fp8(picked * scale.reciprocal(), spec.operand) * scale
    if apart is not None:
        read = read.masked_fill(apart.index_select(0, channels), 0.0)
    return picked - read


def cast_errors(
    given: Merged, scale: Tensor, dtype: torch.dtype, apart: Tensor | None = None
) -> dict[int, Tensor]:
    """The e of each adapter whose last columns of b bring it to O, in ``dtype``."""
    spec = parse_spec(given.spec_text)
    return {
        j: cast_error(given.x, scale, channels, spec, apart).to(dtype)
        for j, channels in given.corrected.items()
    }


def bringers(given: Merged) -> dict[int, int]:
    """The adapter that brings e to O, for each of its site in INT8; none of sites that get none."""
    if parse_spec(given.spec_text).operand != INT8:
        return {}
    of_site = {given.owner[j]: j for j in reversed(given.corrected)}
    return {j: of_site[i] for j, i in enumerate(given.owner) if i in of_site}


def receivers(given: Merged) -> dict[int, int]:
    """The same where the adapters read q: not where they read something else (dropout)."""
    return {} if given.adapter_x else bringers(given)


def channels_apart(given: Merged) -> Tensor | None:
    """The channels of x, bool [in], that q has zeros in: those that every site gets in e. None
    where a site gets none.
    """
    channels = [given.corrected[j] for j in {*bringers(given).values()}]
    if not channels or len(channels) < len(given.weight):
        return None
    index = torch.arange(given.x.shape[-1], dtype=torch.int32, device=given.x.device)
    each = [(index[:, None] == picked).any(1) for picked in channels]
    return functools.reduce(operator.and_, each)


def with_errors(out_a: Tensor, given: Merged, errors: Mapping[int, Tensor]) -> Tensor:
    """O_A [n, Σ r_j] with e · dq(Â_S)ᵀ."""
    found = receivers(given)
    if not found:
        return out_a
    parts = [*out_a.split(given.ranks, dim=1)]
    for j, bringer in found.items():
        picked = given.a[j].index_select(1, given.corrected[bringer])
        of_a = picked.to(torch.float32) * given.a_scale[j]
        parts[j] = parts[j] + errors[bringer] @ of_a.to(out_a.dtype).t()
    return torch.cat(parts, dim=1)


def kept_errors(given: Merged) -> list[int]:
    """The adapters whose e dL/dA needs, in turn."""
    return sorted({*receivers(given).values()}) if given.keep_x else []


@dataclass(frozen=True)
class KeptErrors:
    """What dL/dA needs of e: ``of`` says for each adapter where its e and S stand."""

    of: dict[int, int]
    errors: list[Tensor]
    channels: list[Tensor]

    def added(self, grad_a: Tensor, adapter: int, d: Tensor) -> Tensor:
        """dL/dA [r, in] with Dᵀ · e in the channels S, for D [n, r]."""
        place = self.of.get(adapter)
        if place is None:
            return grad_a
        channels, product = self.channels[place].long(), d.t() @ self.errors[place]
        columns = grad_a.index_select(1, channels).to(torch.float32) + product
        return grad_a.index_copy(1, channels, columns.to(grad_a.dtype))
