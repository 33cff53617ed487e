"""transpose="store": the copy Wᵀ, interpreted: of a constant W, and with update="rows" against W
after whatever may have written it.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from falqon_fx import FalqonConfig, prepare
from falqon_fx.kernels.transpose.kept import kept, refresh, transposed
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.ops import gpu
from falqon_fx.rows import cuda as rows_cuda
from falqon_fx.rows.batch import Batched
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.rows.update import flush_
from falqon_fx.site import transposed as stored
from falqon_fx.site.base import cast_base
from falqon_fx.site.record import STEP
from falqon_fx.site.spec import SiteSpec
from tests.lowered import NOTHING
from tests.models import tiny_mlp
from tests.sites import Site, make_site, needs_row_scales, randn

# numpy, which the interpreter computes with, announces what hashing does on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _no_copies():
    stored.forget()
    yield
    stored.forget()


def w_of(site: Site) -> torch.Tensor:
    return site.state.weight[: len(site.lora_b)]


def update(*sites: Site, transpose: str = "store") -> None:
    states = [site.state for site in sites]
    columns: list[list[Any]] = [
        *([s.tensors[i] for s in states] for i in range(5)),
        [site.lora_b for site in sites],
        [site.lora_a for site in sites],
        [site.base for site in sites],
        [s.scaling for s in states],
    ]
    rows_cuda.proxy_update_(columns, str(replace(states[0].spec, transpose=transpose)))


def is_up_to_date(site: Site) -> bool:
    found = stored.find(w_of(site))
    assert found is not None
    return torch.equal(found.turned, w_of(site).view(torch.uint8).t())


def two_sites() -> tuple[Site, Site]:
    return make_site(40, 64, 8, topk=3), make_site(21, 300, 4, topk=2, seed=1)


def test_a_copy_is_made_once_and_follows_the_updates():
    made = two_sites()
    for site in made:
        (copy,) = kept([w_of(site)])
        assert torch.equal(
            copy.view(torch.uint8)[:, : len(w_of(site))], w_of(site).view(torch.uint8).t()
        )
        assert not copy.view(torch.uint8)[:, len(w_of(site)) :].any()
        assert kept([w_of(site)])[0].data_ptr() == copy.data_ptr()
    for step in range(3):
        before = [site.state.code.clone() for site in made]
        for site in made:
            site.step(seed=step)
        update(*made)
        for site, old in zip(made, before, strict=True):
            assert not torch.equal(site.state.code, old)
            assert is_up_to_date(site)
    update(*made)  # nothing changed
    assert all(is_up_to_date(site) for site in made)


def test_only_written_rows_are_copied():
    """So that an update costs no transpose: what was put beside them stays."""
    site, other = two_sites()
    for each in (site, other):
        kept([w_of(each)])
    update(site, other)  # the first makes the copies anew, whose age it can't tell
    mark = torch.full_like(stored.find(w_of(site)).turned, 0x7E)
    stored.find(w_of(site)).turned.copy_(mark)
    writes = site.state.writes.clone()
    site.step()
    update(site, other)
    rows = site.state.writes != writes
    assert rows.sum() == 3
    turned = stored.find(w_of(site)).turned
    assert torch.equal(turned[:, rows], w_of(site).view(torch.uint8).t()[:, rows])
    assert torch.equal(turned[:, ~rows], mark[:, ~rows])


def flush(site: Site) -> None:
    state = site.state
    of_site = (*state.tensors, site.lora_b, site.lora_b, site.base, state.scaling)
    flush_(Batched(0, *of_site), state.spec)


def another_adapter(site: Site) -> None:
    """As a checkpoint of another run writes it: the same counts of writes, another A."""
    out, features = w_of(site).shape
    other = make_site(out, features, site.lora_a.shape[0], seed=7)
    other.state.writes.copy_(site.state.writes)
    for target, source in zip(site.state.tensors, other.state.tensors, strict=True):
        target.view(torch.uint8).copy_(source.view(torch.uint8))
    site.base, site.lora_a, site.lora_b = other.base, other.lora_a, other.lora_b


def an_earlier_step(site: Site) -> None:
    site.state.code[:5] = 1
    site.state.counters[STEP] -= 1


@pytest.mark.parametrize("change", [flush, another_adapter, an_earlier_step])
def test_the_next_update_sees_what_wrote_w(change):
    site, _ = two_sites()
    kept([w_of(site)])
    for step in range(2):
        site.step(seed=step)
        update(site)
    assert is_up_to_date(site)
    site.step(seed=5)
    change(site)
    assert not is_up_to_date(site)
    refresh([site.state.weight], [site.state.writes], [site.state.counters])
    assert is_up_to_date(site)


@pytest.mark.parametrize("how", ["adapter", "rows"])
def test_loading_a_prepared_model_drops_the_copies(how):
    """It writes the bytes of W where they lie."""
    pytest.importorskip("peft")
    model = tiny_mlp()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    prepare(model, FalqonConfig(update=how), progress=False)
    layer = next(m for m in model.modules() if isinstance(m, MergedBaseLinear | Fp8Linear))
    if isinstance(layer, Fp8Linear):
        weight = layer.base().weight
    else:
        weight = layer.merged().weight[: layer.out_features]
    kept([weight])
    assert stored.find(weight) is not None
    model.load_state_dict(model.state_dict())
    assert stored.find(weight) is None


def test_a_copy_goes_with_its_weight():
    site, other = two_sites()
    (copy,) = kept([w_of(site)])
    assert stored.find(w_of(other)) is None
    memory = weakref.ref(copy.untyped_storage())
    del site, copy
    gc.collect()
    assert memory() is None


def test_without_the_option_nothing_is_kept_or_refreshed():
    site, _ = two_sites()
    kept([w_of(site)])
    site.step()
    update(site, transpose="auto")
    assert not is_up_to_date(site)


def grad_x(
    weight: Any, scale: Any, lora_a: Any, transpose: str, kernel: str, turned: Any = ()
) -> torch.Tensor:
    """dL/dx of two layers that share x, as on a GPU."""
    spec_text = str(SiteSpec("row", "pow2", "e5m2", kernel=kernel, transpose=transpose))
    grads = [randn(20, len(w), seed=i).bfloat16() for i, w in enumerate(weight)]
    d = [randn(20, sum(len(a) for a in lora_a)).bfloat16()]
    casts = torch.ops.falqon.proxy_update(
        lora_a,
        [torch.zeros(1, len(a)) for a in lora_a],
        [1.0] * len(lora_a),
        *NOTHING,
        False,
        spec_text,
    )
    columns = (grads, weight, scale, d, casts[0::3], casts[1::3])
    return gpu.merged_linear_grad_x(*columns, turned, torch.bfloat16, spec_text)


SCALED_MM = pytest.param("scaled_mm", marks=needs_row_scales)
KERNELS = pytest.mark.parametrize("kernel", ["triton", SCALED_MM])


@KERNELS
def test_grad_x_of_a_constant_base_is_that_of_a_transient_transpose(kernel):
    """The copies are made by the first step, and hold."""
    spec = SiteSpec("row", "pow2", "e5m2")
    bases = [cast_base(randn(out, 64, seed=out), spec) for out in (48, 32)]
    given = ([b.weight for b in bases], [b.scale for b in bases], [randn(16, 64)])
    first = grad_x(*given, "store", kernel)
    assert torch.equal(first, grad_x(*given, "transient", kernel))
    copies = [stored.find(base.weight) for base in bases]
    assert all(copy is not None for copy in copies)
    assert torch.equal(first, grad_x(*given, "store", kernel))
    assert [stored.find(base.weight) for base in bases] == copies
    operands = transposed([base.weight for base in bases])  # as a graph has them
    assert torch.equal(first, grad_x(*given, "auto", kernel, operands))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [SCALED_MM, "triton"])
def test_grad_x_follows_the_updates_of_rows(kernel):
    made = [make_site(48, 64, 16), make_site(32, 64, 8, seed=1)]
    for step in range(2):
        for site in made:
            site.step(seed=step)
        update(*made)
        scale = [site.state.scale[: len(site.lora_b)] for site in made]
        given = ([w_of(site) for site in made], scale, [site.lora_a for site in made])
        assert torch.equal(grad_x(*given, "store", kernel), grad_x(*given, "transient", kernel))
    assert all(is_up_to_date(site) for site in made)
