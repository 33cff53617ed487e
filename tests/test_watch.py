"""`watch`: what each write-back of update="rows" did, and how far a freed weight has drifted; what
the casts of the default take is in `tests/test_cast_audit.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.rows import audit
from tests.models import lora_b, tiny_mlp, train
from tests.watched import OPTIONS, model_and_input, optimizer, prepared_mlp


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
