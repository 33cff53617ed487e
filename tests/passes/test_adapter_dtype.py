"""adapter_dtype="auto": the adapter in FP8 on a GPU that can, in bfloat16 elsewhere."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from falqon_fx import FalqonConfig
from falqon_fx.passes import adapter_dtype
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.passes.work import Work


class Layer(nn.Module):
    """Made without random numbers, which a fake device has none of."""

    def __init__(self, out: int, rank: int) -> None:
        super().__init__()
        shapes = (out, 640), (rank, 640), (out, rank)
        self.base, self.a, self.b = (nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base) + F.linear(F.linear(x, self.a), self.b)


class Layers(nn.Module):
    """Two siblings, of rank 4 and of ``rank``."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.q, self.k = Layer(480, 4), Layer(320, rank)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


def planned(
    device: str = "cuda", rank: int = 4, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Work:
    """As far as it is known how each site is computed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(), torch.device(device), torch.no_grad():
            given, x = torch.fx.symbolic_trace(Layers(rank)), torch.empty(5, 640)
            work = Work(given, [x], FalqonConfig(**options))
            for name in takewhile(lambda name: name != "keep_transposes", PASSES):
                PASSES[name](work)
    finally:
        torch.set_default_dtype(before)
    return work


def kinds(work: Work) -> tuple[str, ...]:
    """Of q and k."""
    of = {site.report.path: site.spec.adapter for site in work.plan.sites}
    return of["q"], of["k"]


IN_FP8, IN_BFLOAT16 = ("fp8", "fp8"), ("bfloat16", "bfloat16")


@pytest.mark.usefixtures("_h100")
def test_a_gpu_has_it_in_fp8_and_a_cpu_in_bfloat16():
    assert kinds(planned("cuda")) == IN_FP8
    assert kinds(planned("cpu")) == IN_BFLOAT16
    assert kinds(planned("cuda", adapter_dtype="bfloat16")) == IN_BFLOAT16
    assert kinds(planned("cpu", adapter_dtype="fp8")) == IN_FP8


@pytest.mark.usefixtures("_h100")
def test_a_rank_that_does_not_fit_is_in_bfloat16_alone():
    work = planned(rank=129)
    assert kinds(work) == ("fp8", "bfloat16")
    (note,) = work.notes
    assert note.site == "k"
    assert 'its adapter is in bfloat16: adapter_dtype="fp8" takes ranks up to 128' in note.text


@pytest.mark.usefixtures("_h100")
def test_results_in_float32_have_it_in_bfloat16():
    work = planned(dtype=torch.float32)
    assert kinds(work) == IN_BFLOAT16
    assert ["torch.float32" in note.text for note in work.notes] == [True, True]
    assert kinds(planned(dtype=torch.float32, adapter_dtype="fp8")) == IN_FP8


@pytest.mark.usefixtures("_h100")
@pytest.mark.parametrize("base", ["int8", "nvfp4"])
def test_other_forms_of_the_base_have_it_in_bfloat16(base):
    assert kinds(planned(base_dtype=base)) == IN_BFLOAT16


@pytest.mark.usefixtures("_h100")
def test_several_processes_have_it_in_bfloat16(monkeypatch):
    """What they clamp gives no site bfloat16 later: each would have counted something else."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert kinds(planned()) == IN_BFLOAT16


@pytest.mark.usefixtures("_h100")
def test_a_gpu_without_fp8_has_it_in_bfloat16(monkeypatch):
    monkeypatch.setattr(adapter_dtype, "why_not_on", lambda device: "wants FP8 tensor cores")
    assert kinds(planned()) == IN_BFLOAT16


@pytest.mark.usefixtures("_h100")
def test_a_site_that_was_clamped_gets_bfloat16(monkeypatch):
    monkeypatch.setattr(
        "falqon_fx.passes.saturation.Saturation.__call__",
        lambda self, scope, lora_b: int(lora_b.value.shape[0] == 320),  # k's
    )
    work = planned()
    assert kinds(work) == ("fp8", "bfloat16")
    (note,) = work.notes
    assert "has clamped some of it" in note.text
