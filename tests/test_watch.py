from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import audit
from falqon_fx.numerics import encode_fp8, round_to_fp8
from falqon_fx.watching import summary, tensorboard, trainer_callback
from tests.models import Stack, lora_b, train

OPTIONS = {"inner": "eager"}


def model_and_input(**lora: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Stack(**lora), torch.randn(6, 32)


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
    assert not audit.audience


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
    assert not audit.audience


def test_prepared_models_are_watched_too():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0", "2"]))
    falqon_fx.prepare(model, progress=False)
    compiled = torch.compile(model, backend="falqon", options=OPTIONS)
    x = torch.randn(6, 32)
    with falqon_fx.watch(compiled) as seen:
        train(compiled, optimizer(model), x, 2)
    assert {item.site for item in seen.history} == {"base_model.model.0", "base_model.model.2"}


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
    torch.manual_seed(0)
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
    table = audit.Written(applied, torch.tensor([7, 8]), *given).table()
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
