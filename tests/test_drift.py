"""How far the FP8 weight of update="rows" has drifted, and who is told."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import falqon_fx
from falqon_fx.model.watching import summary, tensorboard, wandb
from falqon_fx.rows import audit
from falqon_fx.rows.drift import signed_sums
from falqon_fx.rows.prepared import layer_of
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import encode_fp8, round_to_fp8
from tests.models import train
from tests.parameters import each_pair
from tests.sites import randn
from tests.strategies import SEEDS
from tests.tolerances import gamma
from tests.watched import OPTIONS, model_and_input, optimizer, prepared_mlp


def error_of(state: falqon_fx.MergedAdapter, base: torch.Tensor) -> torch.Tensor:
    """dq(W) - s·applied·Â - base, exact in float64."""
    merged = state.weight.double() * state.scale.double()
    out = len(state.applied)
    return merged[:out] - state.scaling * state.applied.double() @ merged[out:] - base


@each_pair(
    pending=["hold", "drop", "apply"],
    granularity=["row", "tensor"],
    rounding=["nearest", "stochastic"],
)
def test_the_drift_is_what_the_base_weight_says(granularity, rounding, pending):
    """The estimate of ‖error‖² is Σ_k z_k² with z_k = ⟨e_k, σ_k⟩: of mean ‖e_k‖² and variance at
    most 2 ‖e_k‖⁴ over the signs. So 6 deviations of the sum are 6·√(2 Σ ‖e_k‖⁴), which is relative
    to ‖error‖² what the root of it, the drift, may be off twice.
    """
    options = {"topk": "all", "granularity": granularity, "rounding": rounding}
    model, compiled, bases = prepared_mlp(pending=pending, **options)
    first = {path: error_of(s, bases[path]) for path, s in falqon_fx.adapters(model).items()}
    x, steps = torch.randn(6, 32), optimizer(model)
    with warnings.catch_warnings(), falqon_fx.watch(model) as seen:
        warnings.simplefilter("ignore")
        train(compiled, steps, x, 40)
    last = {item.site: item for item in seen.history}
    for path, state in falqon_fx.adapters(model).items():
        error = error_of(state, bases[path])
        energy = error.square().sum(1)
        relative = 6 * (2 * energy.square().sum()).sqrt() / energy.sum()
        exact = error.norm() / first[path].norm()
        drift = state.drift()
        assert last[path].drift == pytest.approx(drift, rel=1e-4)  # float32 sums, row by row
        assert exact * (1 - relative).clamp(min=0).sqrt() <= drift <= exact * (1 + relative).sqrt()
        assert len(seen.history) == 2 * 39


def test_drift_grows_without_the_base_weight_alone():
    """Stochastic writes of all rows, thirty times: errors add up like their root; with the base
    weight at hand a row has the error of one stochastic write, √2 of that of a cast to nearest.
    """
    model, compiled, _ = prepared_mlp(topk="all")
    x = torch.randn(6, 32)
    with pytest.warns(UserWarning, match="more than 2 times"), falqon_fx.watch(model) as seen:
        train(compiled, optimizer(model), x, 31)
    drifts = [item.drift for item in seen.history if item.site == "base_model.model.2"]
    assert drifts[0] < 2 < drifts[-1]
    last = [item.drift or 0.0 for item in seen.history[-2:]]
    assert summary(seen.history[-2:])["drift"] == max(last)

    whole, x = model_and_input()
    compiled = torch.compile(whole, backend="falqon", options={**OPTIONS, "topk": "all"})
    with warnings.catch_warnings(), falqon_fx.watch(whole) as seen:
        warnings.simplefilter("error")
        train(compiled, optimizer(whole), x, 31)
    assert {item.drift for item in seen.history} == {None}
    assert "drift" not in summary(seen.history[-4:])
    for path, state in falqon_fx.adapters(whole).items():
        base = whole.get_submodule(path).base_layer.weight.double()
        cast = cast_base(base.float(), state.spec).dequantize().double() - base
        assert error_of(state, base).norm() < 1.6 * cast.norm()


def test_a_warning_names_each_site_once():
    model, compiled, _ = prepared_mlp(topk="all")
    x, steps = torch.randn(6, 32), optimizer(model)
    with warnings.catch_warnings(record=True) as caught, falqon_fx.watch(model):
        warnings.simplefilter("always")
        train(compiled, steps, x, 60)
    told = [str(w.message) for w in caught if "its first cast was" in str(w.message)]
    assert sum(text.count("base_model.model.0") for text in told) == 1
    assert sum(text.count("base_model.model.2") for text in told) == 1
    assert all('set update="adapter"' in text for text in told)


@pytest.mark.slow
def test_the_warning_comes_without_a_watch_too():
    """At call 128, the first of those that look."""
    model, compiled, _ = prepared_mlp(topk="all")
    x, steps = torch.randn(6, 32), optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(compiled, steps, x, 127)
    with pytest.warns(UserWarning, match=r"base_model\.model\.0, base_model\.model\.2 is by now"):
        train(compiled, steps, x, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(compiled, steps, x, 128)


def test_drift_goes_through_copies_and_state_dicts():
    model, compiled, _ = prepared_mlp(topk="all")
    train(compiled, optimizer(model), torch.randn(6, 32), 20)
    drifts = {path: state.drift() for path, state in falqon_fx.adapters(model).items()}
    assert all(value > 1.5 for value in drifts.values())
    twin = copy.deepcopy(model)
    other, _, _ = prepared_mlp(topk="all")
    other.load_state_dict(model.state_dict())
    for m in (twin, other, twin.to(torch.bfloat16)):
        assert {path: state.drift() for path, state in falqon_fx.adapters(m).items()} == drifts
    assert layer_of(twin.base_model.model[0].base_layer.code) is twin.base_model.model[0].base_layer


STRUCTURES = st.sampled_from(
    [
        lambda out, width, seed: randn(out, width, seed=seed),
        lambda out, width, seed: randn(out, 1, seed=seed) @ randn(1, width, seed=seed + 1),
        lambda out, width, seed: torch.ones(out, width) * randn(out, 1, seed=seed),
        lambda out, width, seed: torch.linspace(-1, 1, width).expand(out, -1).contiguous(),
    ]
)


@given(out=st.integers(64, 400), width=st.integers(1, 300), seed=SEEDS, structure=STRUCTURES)
def test_random_signs_keep_the_energy_of_any_error(out, width, seed, structure):
    """Σ_k ⟨e_k, σ_k⟩² against Σ ‖e_k‖², within the 6 deviations of `test_the_drift_is_what...`: for
    errors of one direction in all rows too, which one sign vector for all rows would not do.
    """
    error = structure(out, width, seed)
    sums = signed_sums(error, torch.arange(out)).double()
    energy = error.double().square().sum(1)
    allowed = 6 * (2 * energy.square().sum()).sqrt()
    assert (sums.square().sum() - energy.sum()).abs() <= allowed + gamma(
        width
    ) * energy.sum() * width


def test_the_signs_of_a_row_do_not_depend_on_the_other_rows():
    values = randn(50, 70)
    some = torch.tensor([3, 41, 17])
    whole = signed_sums(values, torch.arange(50))
    assert torch.equal(signed_sums(values[some], some), whole[some])
    signs = signed_sums(torch.eye(70).repeat(5, 1), torch.arange(5).repeat_interleave(70))
    assert torch.equal(signs.abs(), torch.ones(350))


class Writer:
    """The part of tensorboard's SummaryWriter that is used."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


class Run:
    """The part of a Weights & Biases run that is used."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_callbacks_get_sums_over_the_sites(capsys):
    items = [
        falqon_fx.Audit("a", 3, 3.0, 2.0, 1.0, 1, 5.0, 0.0, 0.0, 8, (1, 2)),
        falqon_fx.Audit("b", 3, 4.0, 0.0, 0.0, 2, 6.0, 0.0, 0.0, 8, (0,)),
    ]
    wanted = {"asked": 5.0, "kept": 2.0, "lost": 1.0, "clamped": 3, "pending": 11.0, "rows": 3}
    assert summary(items) == wanted
    drifted = [dataclasses.replace(items[0], drift=1.25), items[1]]
    assert summary(drifted) == {**wanted, "drift": 1.25}
    writer = Writer()
    tensorboard(writer)(items)
    assert writer.scalars == [(f"falqon/{name}", value, 3) for name, value in wanted.items()]
    run = Run()
    wandb(run)(items)
    assert run.logged == [{"falqon/step": 3} | {f"falqon/{n}": v for n, v in wanted.items()}]


def test_the_live_view_names_the_sites(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    with falqon_fx.watch(model, live=True):
        train(compiled, optimizer(model), x, 2)
    shown = capsys.readouterr().err
    assert "blocks.1.down" in shown
    assert "step 1: 40 rows" in shown


def test_rows_not_written_and_zeros_are_not_counted():
    """Two sites of three rows of eight; the middle one of each is not written."""
    value = 500 * torch.randn(2, 3, 8)
    value[..., :2], value[..., 2:4] = 0.0, 1e-4  # zeros; elements that E4M3 makes zero
    value[:, 0, 4] = 500.0
    code = encode_fp8(round_to_fp8(value, torch.float8_e4m3fn), torch.float8_e4m3fn)
    rows, worth = torch.arange(3).expand(2, 3), torch.tensor([[True, False, True]] * 2)
    score, remains = torch.rand(2, 5), torch.rand(2, 3)
    old = value / 3
    applied = [torch.zeros(5, 1) for _ in range(2)]
    one = torch.ones(2, 1, 1)
    chosen = (rows, worth, old, value - old, value, score, remains)
    table = audit.WriteBackBatch(*chosen, applied, torch.tensor([7, 8]), code, one).table()
    for g in range(2):
        got = dict(zip(audit.COLUMNS, table[g].tolist()))
        new, asked = code[g, ::2].view(torch.float8_e4m3fn).double(), (value - old)[g, ::2].double()
        kept = new - old[g, ::2].double()
        left = score[g].sum() - score[g, [0, 2]].sum() + remains[g, [0, 2]].sum()
        wanted = {
            "step": 7 + g,
            "asked": asked.norm(),
            "kept": kept.norm(),
            "lost": (kept - asked).norm(),
            "clamped": (value[g, ::2].abs() > 448).sum(),
            "saturated": (new.abs() == 448).double().mean(),
            "underflowed": 4 / 16,
            "pending": left,
        }
        assert got == pytest.approx({name: float(v) for name, v in wanted.items()}, rel=1e-5)
        assert table[g, len(audit.COLUMNS) :].tolist() == [0, 1, 2, 1, 0, 1]
