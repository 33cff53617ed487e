"""Random sequences of what a training loop does, against a plain model of the contract.

    HYPOTHESIS_PROFILE=fuzz pytest tests/test_sequences.py     # 500 sequences

The contract (design: "The contract of a site", 2 to 4 and 6): a forward pass writes at most once
per change of B, the k rows that changed most; the rest stays pending; a new graph finds the old
state; W or A changed means a fresh one. `Expected` follows it with loops over rows and torch's own
casts.
"""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx import FalqonConfig, MergedAdapter, rewrite
from falqon_fx.update import STEP
from tests.emulation import E4M3, EmulatedSite, cast
from tests.models import LoraLinear
from tests.sites import randn

OUT, IN, RANK = 12, 16, 3


class Expected:
    """What the state of one site should be, row by row."""

    def __init__(self, layer: LoraLinear, config: FalqonConfig) -> None:
        self.layer, self.config = layer, config
        self.b = layer.lora_B.weight
        self.fresh = True

    def forward(self) -> None:
        """A forward pass has begun."""
        drop = self.config.pending == "drop"
        bits = self.bits()
        if self.fresh:
            self.applied = self.b.detach().clone()
            self.writes, self.steps, self.fresh = [0] * OUT, 0, False
            self.rows = self.merged()
        elif bits != self.seen:
            self.steps += 1
            target = self.applied + self.b.detach() if drop else self.b.detach().clone()
            score = (target - self.applied).abs().sum(1).tolist()
            order = sorted(range(OUT), key=lambda i: (-score[i], i))
            for i in order[: self.config.rows(OUT)]:
                if score[i] > 0:
                    self.write(i, target[i])
        self.seen = [0] * (OUT * RANK) if drop else bits  # "drop" zeroes B

    def bits(self) -> list[int]:
        return self.b.detach().view(torch.int32).flatten().tolist()

    def merged(self) -> list[tuple[Tensor, Tensor]]:
        """(codes, scale) of each row of [W + s·B·Â; A]."""
        a_codes, a_scale = cast(self.layer.lora_A.weight.detach(), E4M3, True, True)
        self.a = a_codes * a_scale
        w = self.layer.base_layer.weight.detach()
        merged = w + (self.applied * self.layer.scaling) @ self.a
        codes, scale = cast(merged, E4M3, True, True)
        return [*zip(codes, scale), *zip(a_codes, a_scale)]

    def write(self, i: int, target: Tensor) -> None:
        codes, scale = self.rows[i]
        step = (target - self.applied[i]) * self.layer.scaling
        value = codes * scale + torch.bmm(step[None, None], self.a[None])[0, 0]
        row, row_scale = cast(value[None], E4M3, True, True)
        self.rows[i] = (row[0], row_scale[0])
        self.applied[i] = target
        self.writes[i] += 1

    def check(self, state: MergedAdapter) -> None:
        assert torch.equal(state.applied, self.applied)
        assert state.writes.tolist() == self.writes
        assert int(state.counters[STEP]) == self.steps
        for i, (codes, scale) in enumerate(self.rows):
            assert torch.equal(state.weight[i].float(), codes), f"row {i}"
            assert torch.equal(state.scale[i], scale)
        rest = self.b.detach()
        rest = rest if self.config.pending == "drop" else rest - self.applied
        assert torch.equal(state.pending(), rest)


class Loop(RuleBasedStateMachine):
    """One layer, trained by hand."""

    @initialize(
        pending=st.sampled_from(["hold", "apply", "drop"]),
        topk=st.sampled_from([1, 4, "all"]),
        new=st.booleans(),
    )
    def start(self, pending, topk, new):
        self.config = FalqonConfig(pending=pending, topk=topk, rounding="nearest")
        self.model = LoraLinear(IN, OUT, RANK, bias=True)
        with torch.no_grad():
            for i, p in enumerate(self.model.parameters()):
                p.copy_(randn(*p.shape, seed=i) / 4)
            if new:
                self.model.lora_B.weight.zero_()
        self.seed = 100
        self.optimizer = torch.optim.SGD([self.model.lora_B.weight], lr=0.5, momentum=0.5)
        self.expected = Expected(self.model, self.config)
        self.saved = None
        self.recompile()

    def x(self) -> Tensor:
        self.seed += 1
        return randn(4, IN, seed=self.seed)

    def emulated(self, x: Tensor) -> Tensor:
        """What a forward pass should give after its update."""
        b = self.model.lora_B.weight
        return EmulatedSite(b, self.model.base_layer, self.state())(x)

    def state(self) -> MergedAdapter:
        (state,) = falqon_fx.adapters(self.model).values()
        return state

    @rule()
    def recompile(self):
        """A second graph, as for another shape or mode."""
        traced = fx.symbolic_trace(Plain(self.model))
        self.call = rewrite(traced, [randn(4, IN)], self.config)

    @rule()
    def accumulate(self):
        """Forward and backward; the gradients add up until the next step."""
        b, x = self.model.lora_B.weight, self.x().requires_grad_()
        before = None if b.grad is None else b.grad.clone()
        self.expected.forward()
        y = self.call(x)
        y.square().mean().backward()
        mine, own = b.grad, x.grad
        b.grad, twin = None, x.detach().requires_grad_()
        z = self.emulated(twin)
        z.square().mean().backward()
        assert torch.equal(y, z)
        assert torch.equal(own, twin.grad)
        total = b.grad if before is None else before + b.grad
        b.grad = mine
        assert torch.equal(mine, total)

    @rule(reentrant=st.booleans())
    def checkpointed(self, reentrant):
        """Forward twice, the second time in backward: at most one write."""
        x = self.x().requires_grad_()
        self.expected.forward()
        checkpoint(self.call, x, use_reentrant=reentrant).sum().backward()

    @rule(mode=st.sampled_from(["eval", "no_grad", "inference"]))
    def evaluate(self, mode):
        self.model.train(mode == "no_grad")
        x = self.x()
        self.expected.forward()
        with torch.inference_mode() if mode == "inference" else torch.no_grad():
            y = self.call(x)
        with torch.no_grad():
            assert torch.equal(y, self.emulated(x))
        self.model.train()

    @precondition(lambda self: self.model.lora_B.weight.grad is not None)
    @rule(decay=st.sampled_from([0.0, 0.1]))
    def step(self, decay):
        self.optimizer.param_groups[0]["weight_decay"] = decay
        self.optimizer.step()
        self.optimizer.zero_grad()

    @rule(row=st.integers(0, OUT - 1), through_data=st.booleans())
    def edit(self, row, through_data):
        """A row of B written by something else than the optimizer."""
        b = self.model.lora_B.weight
        new = randn(RANK, seed=self.seed) / 8
        with torch.no_grad():
            (b.data if through_data else b)[row] += new

    @rule()
    def save(self):
        self.saved = {n: t.clone() for n, t in self.model.state_dict().items()}

    @precondition(lambda self: self.saved is not None)
    @rule(adapter_only=st.booleans())
    def load(self, adapter_only):
        """W and A are written too where all is loaded: the site starts afresh."""
        names = ("lora_B",) if adapter_only else ("",)
        part = {n: t for n, t in self.saved.items() if n.startswith(names)}
        self.model.load_state_dict(part, strict=False)
        self.expected.fresh |= not adapter_only

    @rule(which=st.sampled_from(["base_layer", "lora_A"]))
    def change(self, which):
        with torch.no_grad():
            getattr(self.model, which).weight.mul_(1.25)
        self.expected.fresh = True

    @precondition(lambda self: not self.expected.fresh)
    @rule()
    def flush(self):
        """All of B goes into W' at once, which counts as a step."""
        expected, b = self.expected, self.model.lora_B.weight.detach().clone()
        self.state().flush()
        target = expected.applied + b if self.config.pending == "drop" else b
        for i in range(OUT):
            if (target[i] - expected.applied[i]).abs().sum() > 0:
                expected.write(i, target[i].clone())
        expected.steps += 1
        expected.seen = expected.bits()  # with "drop", flush has zeroed B

    @invariant()
    def state_is_as_expected(self):
        # A change of W, A or B shows with the next forward pass.
        if hasattr(self, "expected") and not self.expected.fresh:
            self.expected.check(self.state())


class Plain(nn.Module):
    """`LoraLinear` as `symbolic_trace` can take it: no question about a value's dtype."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return layer.base_layer(x) + layer.lora_B(layer.lora_A(x)) * layer.scaling


_default = settings.get_profile(settings.get_current_profile_name()).max_examples
TestLoop = Loop.TestCase
TestLoop.settings = settings(max_examples=max(40, _default // 10), stateful_step_count=25)
