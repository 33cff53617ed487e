"""`watch`: what each write-back of update="rows" did, and how far a freed weight has drifted; what
the casts of the default take is in `tests/test_cast_audit.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.rows import audit
from falqon_fx.rows.drift import signed_sums
from falqon_fx.rows.prepared import layer_of
from falqon_fx.rows.watching import summary, tensorboard, trainer_callback
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import encode_fp8, round_to_fp8
from tests.models import Stack, lora_b, tiny_mlp, train
from tests.parameters import each_pair
from tests.sites import randn
from tests.strategies import SEEDS
from tests.tolerances import gamma

OPTIONS = {"update": "rows", "inner": "eager"}


def model_and_input(**lora: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return freeze_a(Stack(**lora)), torch.randn(6, 32)


def freeze_a(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def prepared_mlp(**options: Any) -> tuple[nn.Module, Any, dict[str, torch.Tensor]]:
    """A prepared model with two sites, compiled; and the base weights that it had."""
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = freeze_a(tiny_mlp())
    base = {
        f"base_model.model.{i}": model.base_model.model[i].base_layer.weight.detach().double()
        for i in (0, 2)
    }
    config = falqon_fx.FalqonConfig(**{**OPTIONS, **options})
    falqon_fx.prepare(model, config, progress=False)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    return model, compiled, base


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(lora_b(model), lr=0.5)


def snapshot(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """dq(W'), applied and writes of each site, in float64."""
    return {
        path: (s.dequantize().double(), s.applied.double().clone(), s.writes.clone())
        for path, s in falqon_fx.adapters(model).items()
    }


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("topk", [3, "all"])
def test_the_audit_is_what_the_live_tensors_say(granularity, topk):
    """Everything is recomputed in float64 from the state before and after one write."""
    model, x = model_and_input()
    options = {**OPTIONS, "granularity": granularity, "topk": topk}
    compiled = torch.compile(model, backend="falqon", options=options)
    steps = optimizer(model)
    train(compiled, steps, x, 2)
    compiled(x)  # writes what the last step left
    before = snapshot(model)
    (compiled(x) - x / 2).square().mean().backward()
    steps.step()
    with falqon_fx.watch(compiled) as seen:
        compiled(x)
    after = snapshot(model)
    assert {item.site for item in seen.history} == before.keys()
    assert len(seen.history) == len(before)
    for item in seen.history:
        state = falqon_fx.adapters(model)[item.site]
        old, new, out = before[item.site], after[item.site], item.out
        written = (new[2] - old[2]).nonzero().flatten().tolist()
        assert list(item.rows) == written
        assert len(written) == (out if topk == "all" else 3)
        lora_a = old[0][out:]
        asked = (state.scaling * (new[1] - old[1]) @ lora_a)[written]
        kept = (new[0] - old[0])[:out][written]
        # float32 sums of a few hundred terms in the audit, float64 here.
        close = {"rel_tol": 1e-5, "abs_tol": 1e-6}
        assert math.isclose(item.asked, asked.norm(), **close)
        assert math.isclose(item.kept, kept.norm(), **close)
        assert math.isclose(item.lost, (kept - asked).norm(), **close)
        assert math.isclose(item.pending, state.pending().abs().double().sum(), **close)
        code = state.code[:out][written] & 0x7F
        assert math.isclose(item.saturated, (code == 0x7E).double().mean(), **close)
        wanted = (old[0][:out][written] + asked) != 0
        assert math.isclose(item.underflowed, ((code == 0) & wanted).double().mean(), **close)
        if granularity == "row":
            assert item.clamped == 0


def test_a_row_beyond_its_range_counts_as_clamped():
    model, x = model_and_input()
    options = {**OPTIONS, "granularity": "tensor", "topk": "all", "rounding": "nearest"}
    compiled = torch.compile(model, backend="falqon", options=options)
    compiled(x)
    with torch.no_grad():
        for b in lora_b(model):
            b.fill_(10.0)
    with falqon_fx.watch(model) as seen:
        compiled(x)
    assert all(item.clamped > 0 and item.saturated > 0 for item in seen.history)
    assert all(item.lost > 0.1 * item.asked for item in seen.history)


def test_each_step_is_seen_once_and_only_inside(tmp_path):
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    steps = optimizer(model)
    train(compiled, steps, x, 1)
    calls: list[list[falqon_fx.Audit]] = []
    file = tmp_path / "audit.jsonl"
    with falqon_fx.watch(compiled, jsonl=file, callbacks=[lambda s: calls.append([*s])]) as seen:
        train(compiled, steps, x, 3)  # writes steps 1, 2 and 3; the last B is not written yet
        compiled(x)
        compiled(x)  # nothing changed: nothing is written
    train(compiled, steps, x, 2)
    assert [len(step) for step in calls] == [4, 4, 4, 4]
    assert [step[0].step for step in calls] == [1, 2, 3, 4]
    assert seen.history == [item for step in calls for item in step]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [falqon_fx.Audit(**{**line, "rows": tuple(line["rows"])}) for line in lines] == (
        seen.history
    )
    assert not audit.observers


def test_the_history_keeps_the_last_steps_and_the_file_all(tmp_path):
    """Each step writes ten rows at each of four sites: 44 audits and row numbers."""
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    calls: list[list[falqon_fx.Audit]] = []
    file = tmp_path / "audit.jsonl"
    given = {"jsonl": file, "callbacks": [lambda s: calls.append([*s])]}
    with falqon_fx.watch(compiled, keep=3 * 44 + 43, **given) as seen:
        train(compiled, optimizer(model), x, 8)
    assert len(calls) == 7
    assert seen.history == [item for step in calls[-3:] for item in step]
    assert len(file.read_text().splitlines()) == 7 * 4


def test_the_last_step_is_always_kept():
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    with falqon_fx.watch(compiled, keep=0) as seen:
        train(compiled, optimizer(model), x, 4)
    assert {item.step for item in seen.history} == {3}
    assert len(seen.history) == 4


def test_a_resumed_run_continues_the_file(tmp_path):
    """Where a kill cut its last line off, too."""
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    steps, file = optimizer(model), tmp_path / "audit.jsonl"
    with falqon_fx.watch(compiled, jsonl=file) as first:
        train(compiled, steps, x, 2)
    whole = file.read_text()
    file.write_text(whole + '{"site": "blo')
    with falqon_fx.watch(compiled, jsonl=file) as second:
        train(compiled, steps, x, 2)
    lines = file.read_text().splitlines()
    assert lines.pop(len(first.history)) == '{"site": "blo'
    found = [falqon_fx.Audit(**{**v, "rows": tuple(v["rows"])}) for v in map(json.loads, lines)]
    assert found == [*first.history, *second.history]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_disk_ends_the_file_and_not_the_training():
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    full = pytest.warns(UserWarning, match="can't write /dev/full any more .No space left")
    with full as caught, falqon_fx.watch(compiled, jsonl="/dev/full") as seen:
        train(compiled, optimizer(model), x, 4)
    assert len(caught) == 1
    assert len(seen.history) == 12


def test_a_file_that_cannot_be_opened_is_an_error_with_a_remedy(tmp_path):
    watch = falqon_fx.watch(tiny_mlp(), jsonl=tmp_path / "none" / "audit.jsonl")
    with pytest.raises(FalqonError, match=r"audit.jsonl: it can't be written .No such") as caught:
        watch.__enter__()
    assert "jsonl=" in caught.value.remedy


def test_watching_changes_no_result():
    losses = []
    for watched in (False, True):
        model, x = model_and_input()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="falqon", options=OPTIONS)
        if watched:
            with falqon_fx.watch(model):
                losses.append(train(compiled, optimizer(model), x, 4))
        else:
            losses.append(train(compiled, optimizer(model), x, 4))
    assert losses[0] == losses[1]


def test_another_models_sites_are_not_counted():
    (one, x), (other, _) = model_and_input(), model_and_input()
    both = [torch.compile(m, backend="falqon", options=OPTIONS) for m in (one, other)]
    for compiled in both:
        compiled(x)
    with torch.no_grad():
        for b in (*lora_b(one), *lora_b(other)):
            b.add_(0.1)
    with falqon_fx.watch(one) as seen:
        for compiled in both:
            compiled(x)
    assert len(seen.history) == 4


def test_it_ends_when_the_training_fails():
    model, _ = model_and_input()

    def fail() -> None:
        with falqon_fx.watch(model):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not audit.observers


def test_prepared_models_are_watched_too():
    model, compiled, _ = prepared_mlp()
    with falqon_fx.watch(compiled) as seen:
        train(compiled, optimizer(model), torch.randn(6, 32), 2)
    assert {item.site for item in seen.history} == {"base_model.model.0", "base_model.model.2"}


# -- drift -----------------------------------------------------------------------------------------


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


def test_the_trainers_logs_get_the_summary():
    pytest.importorskip("transformers")
    model, x = model_and_input()
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    with falqon_fx.watch(model) as seen:
        callback = trainer_callback(seen)
        logs: dict[str, float] = {"loss": 1.0}
        callback.on_log(None, None, None, logs=logs)
        assert logs == {"loss": 1.0}  # nothing was written yet
        train(compiled, optimizer(model), x, 2)
        callback.on_log(None, None, None, logs=logs)
    assert logs["falqon/asked"] > 0
    assert logs["falqon/rows"] == 40


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
    given = (rows, worth, value - old, old, value, code, one, score, remains)
    table = audit.WriteBackBatch(applied, torch.tensor([7, 8]), *given).table()
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
