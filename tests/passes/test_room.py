"""Whether W is kept with room for adapters in FP8; `tests/passes/test_transposes.py` has what such
copies have in common with transposes, and that a step's numbers are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.backend import rewrite
from falqon_fx.kernels import hardware
from falqon_fx.kernels.products import in_k
from falqon_fx.passes import autotune, room, transposes
from falqon_fx.report.data import WithRoom
from falqon_fx.site.numerics import E4M3
from tests.cuda import INTERPRETED
from tests.models import LoraLinear, fill_b
from tests.parameters import slow
from tests.passes.rewritten import JOINED, captured, change, passes, seen, values
from tests.sites import needs_row_scales, randn

pytestmark = [*INTERPRETED, pytest.mark.usefixtures("h100")]
WIDTH = 64
X = randn(5, WIDTH).bfloat16()
GIVEN = {"card": "H100", "kernel": "scaled_mm", "adapter_dtype": "fp8"}


class Layers(nn.Module):
    """Two siblings, of which one has no adapter, a third, and a site behind them."""

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.inside = inside
        self.q, self.k = LoraLinear(WIDTH, WIDTH), LoraLinear(WIDTH, 48, 20)
        self.v = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.o = LoraLinear(WIDTH, WIDTH)
        fill_b(self, 0.1)

    def _siblings(self, x: Tensor) -> Tensor:
        return self.q(x) * self.v(x) + self.k(x).sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self._siblings, x, use_reentrant=False) if self.inside else self._siblings(x)
        return self.o(y.tanh())


SHAPES = [(WIDTH + 48, WIDTH + 16 + 32), (WIDTH, WIDTH + 16)]  # ranks 8, 20 and 8
SIZE = sum(rows * columns for rows, columns in SHAPES)


def model_of(**given: Any) -> nn.Module:
    torch.manual_seed(0)
    return Layers(**given).bfloat16()


def decided(model: nn.Module | None = None, x: Tensor = X, **given: Any) -> Any:
    """What the passes make of a model."""
    gm = captured(model or model_of(), x)
    return passes(gm, values(gm, x), **{**GIVEN, **given})


def test_it_is_kept():
    """Of sites with adapters alone, and the same in the graph, the plan and the report."""
    done = decided()
    done.verify()
    slots = [[base.path for base in slot.bases] for slot in done.plan.joined.slots]
    assert slots == [["q", "k"], ["o"]]
    entered = [joined.node.meta["val"] for joined in done.operands.joined]
    assert [(tuple(v.shape), v.dtype) for v in entered] == [(shape, E4M3) for shape in SHAPES]
    said = done.plan.joined.report
    assert (said.kept, said.size) == (True, SIZE)
    assert str(said).startswith("W kept with room for adapters: 0.0")
    kept = {site.report.path: site.report.memory.joined for site in done.plan.sites}
    assert (kept.pop("v"), sum(kept.values())) == (0, SIZE)


NOT_KEPT: dict[str, tuple[dict[str, Any], str | None]] = {
    "transient": ({"transpose": "transient"}, 'transpose="transient" asks for no copy of W'),
    "kernel": ({"transpose": "kernel"}, 'transpose="kernel" asks for no copy of W'),
    "untimed": ({"kernel": "auto"}, room.NOT_READ),
    "triton": ({"kernel": "triton"}, None),
    "bfloat16": ({"adapter_dtype": "bfloat16"}, None),
}


@pytest.mark.parametrize("name", ["transient", slow("kernel"), "untimed", "triton", "bfloat16"])
def test_it_is_not_kept(name):
    given, why = NOT_KEPT[name]
    done = decided(**given)
    done.verify()
    assert (done.plan.joined.slots, done.operands.joined) == ((), ())
    said = done.plan.joined.report
    assert said == (None if why is None else WithRoom(False, SIZE, why))


def test_it_is_not_kept_beside_what_fsdp_shards(h100):
    h100.setattr(transposes, "is_fsdp", lambda node: node.op == "placeholder")
    assert decided().plan.joined.report.why == "FSDP shards W, beside which it would be whole"


def test_many_tokens_gain_little():
    said = decided(x=torch.empty(transposes.MOST_TOKENS + 1, WIDTH).bfloat16()).plan.joined.report
    assert not said.kept
    assert "of 16385 tokens would be 1.2% faster" in said.why


def test_memory_decides_with_what_training_takes(h100):
    """Without a model whose call runs, the copies alone: those that are transposed come first."""
    turned = sum(slot.nbytes for slot in decided().plan.turned.slots)
    found = []
    for need in (2 * (SIZE + turned), 2 * (SIZE + turned) - 1):
        h100.setattr(hardware, "memory", lambda device, need=need: need)
        done = decided()
        assert done.plan.turned.report.kept
        found.append(done.plan.joined.report)
    assert [said.kept for said in found] == [True, False]
    assert "all copies of W is" in found[1].why


def test_a_checkpoint_which_runs_again_has_none():
    done = decided(model_of(inside=True))
    done.verify()
    assert [[b.path for b in slot.bases] for slot in done.plan.joined.slots] == [["o"]]


def test_what_the_library_does_not_make_is_not_kept(h100):
    """By what was chosen for each group: no copy where the winner reads b as it lies."""
    h100.setattr(autotune, "_has_choices", lambda group, spec: True)

    def reported(group: Any, operands: Any, spec: Any) -> Any:
        own = "triton:own" if group[0].report.path == "o" else "scaled_mm+kept"
        asked.append((group[0].report.path, operands.joined))
        return tuple(replace(s, report=replace(s.report, kernel=own)) for s in group)

    asked: list[Any] = []
    h100.setattr(autotune, "_reported", reported)
    done = decided(kernel="auto")
    done.verify()
    assert [[b.path for b in slot.bases] for slot in done.plan.joined.slots] == [["q", "k"]]
    assert done.plan.joined.report.size == SHAPES[0][0] * SHAPES[0][1]
    # What won without a copy is what is chosen of what reads none.
    assert asked == [("q", True), ("o", True), ("o", False)]


def test_another_copy_is_seen():
    done = decided()
    node = done.siblings()
    assert node.args[JOINED] == [done.operands.joined[0].node]
    change(node, JOINED, [])
    with seen("0 operands for 1"):
        done.verify()


@needs_row_scales
def test_a_call_gets_w_with_room_which_each_forward_writes():
    """[W | b], with zeros where b of one would meet t of another; and W as of each call."""
    model, calls = model_of(), list[list[Tensor]]()

    def recording(gm: Any, inputs: Any) -> Any:
        result = rewrite(gm, inputs, FalqonConfig(**{**GIVEN, "granularity": "tensor"}))
        names = [node.name for node in result.gm.graph.find_nodes(op="placeholder")]
        wanted = ("falqon_joined_0", "falqon_base_0_weight", "falqon_base_2_weight")

        def run(*args: Any) -> Any:
            given = result.bind(args)
            calls.append([given[names.index(name)].view(torch.uint8) for name in wanted])
            return result.gm(*given)

        return run

    torch._dynamo.reset()
    run = torch.compile(model, backend=recording)

    def called() -> list[Tensor]:
        """The copy for q and k, and their W."""
        run(X)
        return calls[-1]

    whole, q, k = called()
    assert torch.equal(whole[:, :WIDTH], torch.cat([q, k]))
    of_q, of_k = whole[:WIDTH, WIDTH:], whole[WIDTH:, WIDTH:]
    assert of_q[:, :8].any()
    assert of_k[:, 16:36].any()
    for zeros in (of_q[:, 8:], of_k[:, :16], of_k[:, 36:]):
        assert not zeros.any()
    before = whole.clone()
    with torch.no_grad():
        model.q.lora_B.weight.neg_()
    again, *_ = called()
    assert again.data_ptr() == whole.data_ptr()
    signs = of_q[:, :8] ^ before[:WIDTH, WIDTH : WIDTH + 8]
    assert ((signs == 128) | (before[:WIDTH, WIDTH : WIDTH + 8] & 127 == 0)).all()
    assert torch.equal(again[WIDTH:], before[WIDTH:])
    with torch.no_grad():
        model.k.base_layer.weight.neg_()
    other, _, k = called()
    assert other.data_ptr() != whole.data_ptr()
    assert torch.equal(other[WIDTH:, :WIDTH], k)


@needs_row_scales
@pytest.mark.slow
def test_training_is_that_without_a_copy():
    """Bit for bit, over 30 steps of AdamW, with a call of the model alone between each two."""

    def trained(transpose: str) -> list[Tensor]:
        torch._dynamo.reset()
        model = model_of()
        options = {**GIVEN, "granularity": "tensor", "inner": "eager", "transpose": transpose}
        run = torch.compile(model, backend="falqon", options=options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        seen = []
        for step in range(30):
            x = randn(5, WIDTH, seed=step).bfloat16()
            y = run(x).float().square().mean()
            with torch.no_grad():
                seen.append(run(X))
            y.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [*seen, *(p.detach() for p in model.parameters())]

    found, wanted = trained("auto"), trained("transient")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_explain_says_it():
    report = falqon_fx.explain(model_of(), X, config=FalqonConfig(**GIVEN))
    assert "W kept with room for adapters" in " ".join(str(report).split())
    again = falqon_fx.RewriteReport.from_json(report.to_json())
    assert again.graphs[0].with_room == report.graphs[0].with_room


def test_rows_are_filled_up_to_16_columns():
    weight = [randn(3, 20, seed=s).to(E4M3) for s in (1, 2)]
    whole = in_k.with_room_for(weight, 16).view(torch.uint8)
    assert whole.shape == (6, 48)
    assert torch.equal(whole[:, :20], torch.cat([w.view(torch.uint8) for w in weight]))
    assert not whole[:, 20:].any()
