"""Nothing but what C++ takes gets to the compiled code."""

import contextlib
import logging
from typing import Any

import pytest
import torch

from falqon_fx.kernels.cpu import integers
from falqon_fx.kernels.cpu import native as cpu
from falqon_fx.rows import audit
from falqon_fx.rows.fingerprint import fingerprints
from falqon_fx.site.numerics import E4M3, decode_fp8, round_to_scaled_fp8
from tests.kernels.cpu_update import assert_same_state, flags, tensors_of, update_by_aten
from tests.sites import make_site, randn, same, site_of, update

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


@contextlib.contextmanager
def defaults(dtype=torch.float32, device="cpu"):
    """Of tensors that are made without saying which."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


DEFAULTS = pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")],
)


@DEFAULTS
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "aten"])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("freed", [False, True], ids=["base", "freed"])
def test_defaults_of_torch_change_no_state(dtype, device, compiled, watched, freed):
    """Buffers of a 16-bit default dtype were written past their end, those of another default
    device had no memory at all. An op runs without the default device; what makes states does not.
    """
    parts = (randn(24, 40), randn(4, 40, seed=1), randn(24, 4, seed=2))
    run = update if compiled else update_by_aten

    def live(*setting):
        base, lora_a, lora_b = (part.clone() for part in parts)
        told: list[Any] = []
        listens = audit.observers.subscribed(told.append) if watched else contextlib.nullcontext()
        with defaults(*setting), listens:
            site = site_of(base, lora_a, lora_b, topk=5, freed=freed)
            site.lora_b.add_(parts[2], alpha=1.0 / 3)
            run(site)
            site.lora_b.mul_(3)
            site.state.b_ref = lambda: site.lora_b  # type: ignore[assignment]
            site.state.flush()
            found = [site.state.dequantize(), site.state.base()]
            return site, site.state.drift(), found + [written.table() for written in told]

    site, drift, found = live(torch.float32, "cpu")
    other, other_drift, other_found = live(dtype, device)
    assert_same_state([site], [other])
    assert site.state.writes.sum() == 29
    assert drift == other_drift
    assert (drift is None) != freed
    assert len(found) == (4 if watched else 2)
    assert all(map(torch.equal, found, other_found))


@DEFAULTS
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "aten"])
def test_defaults_of_torch_change_no_cast(monkeypatch, dtype, device, compiled):
    code, x = torch.arange(256).to(torch.uint8).view(4, 64), randn(4, 64)
    scales, power, matrices = (torch.tensor(0.3), 0.5), torch.tensor(0.125), [randn(5, 7)]
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda: None)

    def results():
        casts = [decode_fp8(code, s, torch.float32).nan_to_num() for s in scales]
        return [*casts, *(round_to_scaled_fp8(x, s, E4M3) for s in (power, 1.0))]

    with defaults(dtype, device):
        found = [*results(), fingerprints(matrices)]
    for one, other in zip(found, [*results(), fingerprints(matrices)], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


PARTS = ("weight", "scale", "applied", "lora_b", "counters", "writes", "base")


@pytest.mark.parametrize(
    ("part", "how"),
    # Any strides are right for a base weight, and the one column of scales has no others.
    [(part, how) for part in PARTS for how in ("dtype", "shape", "device")]
    + [(part, "strides") for part in PARTS if part not in ("base", "scale")],
)
def test_what_cpp_does_not_take_raises(part, how):
    """In the second site of a batch, where nothing but the first says what all are like."""
    sites = [[*tensors_of(make_site(seed=i))] for i in range(2)]
    spec, place = make_site().state.spec, PARTS.index(part)
    tensor = sites[1][place]
    sites[1][place] = {
        "dtype": lambda: tensor.to(torch.float16 if tensor.is_floating_point() else torch.int16),
        "shape": lambda: tensor[:-1].contiguous(),
        "device": lambda: tensor.to("meta"),
        "strides": lambda: torch.stack([tensor, tensor], -1)[..., 0],
    }[how]()
    before = [t.clone() for t in sites[0]]
    with pytest.raises(ValueError, match=r"is not (torch|of|contiguous)"):
        cpu.write_rows([tuple(site) for site in sites], [1.0, 1.0], 3, **flags(spec), watched=False)
    assert same(before, sites[0])


def test_a_base_weight_of_some_sites_alone_raises():
    sites, spec = (
        [tensors_of(make_site()), tensors_of(make_site(freed=True))],
        make_site().state.spec,
    )
    with pytest.raises(ValueError, match="for some sites of a batch only"):
        cpu.write_rows(sites, [1.0, 1.0], 3, **flags(spec), watched=False)


@pytest.mark.parametrize(
    "second",
    [randn(3, 5).to(torch.bfloat16), randn(3, 4), torch.empty(3, 5, device="meta")],
    ids=["dtype", "shape", "device"],
)
def test_fingerprints_of_unlike_matrices_raise(second):
    with pytest.raises(ValueError, match=r"is not (torch|of)"):
        cpu.fingerprints([randn(3, 5), second])


@pytest.mark.parametrize(
    "pair",
    [
        (torch.zeros(4), torch.zeros(5)),
        (torch.zeros(4, 4).t(), torch.zeros(4, 4)),
        (torch.zeros(4), torch.zeros(4, device="meta")),
    ],
    ids=["bytes", "strides", "device"],
)
def test_copies_that_do_not_fit_raise(pair):
    with pytest.raises(ValueError, match=r"a copy of|contiguous|on the CPU"):
        cpu.copy([pair])


X, SUMS, ONE = randn(3, 8), torch.ones(3, 8, dtype=torch.int32), torch.tensor(2.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: integers.cast_rows(X.half(), False),
        lambda: integers.cast_rows(X.t(), False),
        lambda: integers.cast_rows(X.to("meta"), False),
        lambda: integers.rescale(SUMS.long(), ONE, ONE, torch.float32),
        lambda: integers.rescale(SUMS.t(), ONE, ONE, torch.float32),
        lambda: integers.rescale(SUMS, ONE, ONE, torch.float16),
        lambda: integers.rescale(SUMS, ONE.double(), ONE, torch.float32),
        lambda: integers.rescale(SUMS, torch.ones(2, 1), ONE, torch.float32),
        lambda: integers.rescale(SUMS, ONE, torch.ones(3, 8), torch.float32),
        lambda: integers.scale_columns(X, torch.ones(1, 7), X.clone()),
        lambda: integers.scale_columns(X, ONE.bfloat16(), X.clone()),
        lambda: integers.scale_columns(X, ONE, torch.empty(2, 8)),
        lambda: integers.scale_columns(X, ONE, torch.empty(3, 8).half()),
    ],
)
def test_integers_are_left_to_aten_where_cpp_does_not_take_what_is_given(call):
    assert not call()


def test_without_a_compiler_aten_does_it_and_the_log_says_why(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-g++")
    cpu.library.cache_clear()
    try:
        site = make_site()
        with caplog.at_level(logging.WARNING):
            site.step()
            update(site)
            site.step()
            update(site)
    finally:
        cpu.library.cache_clear()
    assert site.state.writes.all()
    (record,) = caplog.records
    assert "no-such-g++" in record.getMessage()
    assert "install a C++ compiler" in record.getMessage()
