"""Which adapters become columns of the FP8 product, by ``adapter_dtype``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import distributed

from falqon_fx._compat import value_of
from falqon_fx.config import FalqonConfig
from falqon_fx.kernels.hardware import fp8_architecture, multiplies_fp8
from falqon_fx.kernels.spec import MAX_RANK, MAX_TAIL, aligned
from falqon_fx.passes.match.dataflow import Match
from falqon_fx.passes.terms import Experts
from falqon_fx.site.spec import SiteSpec


def spec_of_graph(matches: Sequence[Match], config: FalqonConfig) -> SiteSpec:
    """The spec of a graph's sites. ``"auto"`` is ``"fp8"`` on a GPU that has what that wants, but
    for several processes: what they clamp gives no site bfloat16 (`falqon_fx.passes.saturation`).
    """
    spec = SiteSpec.from_config(config)
    if config.adapter_dtype != "auto" or config.update == "rows" or config.base_dtype != "fp8":
        return spec
    devices = {value_of(found.x).device for found in matches}
    several = distributed.is_available() and distributed.is_initialized()
    fits = {device.type for device in devices} == {"cuda"} and not any(map(why_not_on, devices))
    return replace(spec, adapter="fp8") if fits and not several else spec


def why_not(found: Match) -> str:
    """Why the adapters of a site can't be columns there; "" where they can, or on a CPU."""
    device = value_of(found.x).device
    return "" if device.type in ("cpu", "meta") else why_not_on(device) or _why_not_of_rank(found)


def why_not_by_default(found: Match) -> str:
    """Why ``"auto"`` leaves the adapters of a site in bfloat16 where others are in FP8."""
    if isinstance(found.base, Experts):
        return "has no columns for stacked experts"
    if value_of(found.anchor).dtype != torch.bfloat16:
        return f"is for results in bfloat16 by default, and this is {value_of(found.anchor).dtype}"
    return _why_not_of_rank(found)


def why_not_on(device: torch.device) -> str:
    """Why a device can't add adapters as columns in FP8; "" where it can."""
    if device.type != "cuda":
        return f"computes on CPUs and on NVIDIA's GPUs alone, and this is on {device}"
    if torch.version.hip is not None or (
        torch.cuda.is_available() and not fp8_architecture(device)
    ):
        return f"wants FP8 tensor cores as of sm_89, which {device} has not"
    if torch.cuda.is_available() and not multiplies_fp8(fp8_architecture(device)):
        return f"wants a Triton that knows the FP8 tensor cores of {device}"
    return ""


def _why_not_of_rank(found: Match) -> str:
    ranks = [a.lora_a.value.shape[0] for a in found.adapters]
    if max(ranks, default=0) > MAX_TAIL or sum(map(aligned, ranks)) > MAX_RANK:
        return f"takes ranks up to {MAX_TAIL}, and up to {MAX_RANK} in all of a layer"
    return ""
