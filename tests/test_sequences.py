"""Random sequences of what a training loop does, against a plain model of the contract.

    HYPOTHESIS_PROFILE=fuzz pytest tests/test_sequences.py     # 500 sequences of each kind

`TestTraining`: PEFT's model, compiled by Dynamo, through whatever is done to it: every result
equals the emulation on the same base bit for bit, and the base is the cast of W and changes with W
alone.

`TestRows`: update="rows". A forward pass writes at most once per change of B, the k rows that
changed most; the rest stays pending; a new graph finds the old state; W or A changed means a fresh
one. `Expected` follows that with loops over rows and torch's own casts.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx import FalqonConfig, MergedAdapter, rewrite
from falqon_fx.model.fp8_linear import Fp8Linear
from tests.emulation import E4M3, Layer, Lora, cast, emulate, linear
from tests.expected_rows import IN, OUT, RANK, Expected, Known
from tests.models import WIDTH, LoraLinear, Net, Traceable
from tests.sites import randn


class Training(RuleBasedStateMachine):
    """PEFT's model with two adapters, trained and changed by hand."""

    @initialize(
        dropout=st.sampled_from([0.0, 0.25]),
        granularity=st.sampled_from(["row", "tensor"]),
        scale=st.sampled_from(["pow2", "amax"]),
    )
    def start(self, dropout, granularity, scale):
        torch.manual_seed(0)
        lora = {"target_modules": ["up", "down"], "lora_dropout": dropout}
        self.model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, lora_alpha=8, **lora))
        self.model.add_adapter("other", peft.LoraConfig(r=3, lora_alpha=3, **lora))
        self.config = FalqonConfig(granularity=granularity, scale=scale, inner="eager")
        with torch.no_grad():
            for i, (name, p) in enumerate(self.model.named_parameters()):
                if "lora_B" in name:
                    p.copy_(randn(*p.shape, seed=i) / 16)
        self.seed, self.saved = 100, None
        # Beyond the limit Dynamo compiles no more, and PEFT's own layers run.
        self.limit = torch._dynamo.config.patch(recompile_limit=64)
        self.limit.__enter__()
        self.bases = {path: self.cast_of(path) for path in ("up", "plain", "down")}
        self.recompile()

    def teardown(self) -> None:
        if hasattr(self, "limit"):
            self.limit.__exit__(None, None, None)

    @property
    def net(self) -> Any:
        return self.model.base_model.model

    def base_layer(self, path: str) -> Any:
        module = self.net.get_submodule(path)
        return getattr(module, "base_layer", module)

    def cast_of(self, path: str) -> list[Tensor]:
        """Codes and scale of a base that is made from W as it is now."""
        per_row, pow2 = self.config.granularity == "row", self.config.scale == "pow2"
        return [*cast(self.base_layer(path).weight.detach(), E4M3, per_row, pow2)]

    @property
    def prepared(self) -> bool:
        return isinstance(self.net.plain, Fp8Linear)

    def x(self) -> Tensor:
        self.seed += 1
        return randn(4, WIDTH, seed=self.seed)

    def run(self, model: Any, x: Tensor) -> Tensor:
        """Which moves nothing; each run draws the same dropout."""
        before = {n: t.clone() for n, t in self.model.state_dict().items()}
        torch.manual_seed(self.seed)
        y = model(x)
        for name, tensor in self.model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        return y

    def twin(self) -> nn.Module:
        """The emulation of the model as it is, on the base that is expected."""
        twin = copy.deepcopy(self.model)
        twin.zero_grad()
        prefix = "base_model.model."
        states = {prefix + path: Known(*self.bases[path]) for path in ("up", "down")}
        emulate(twin, states, self.config)
        code, scale = self.bases["plain"]
        layer = Layer(code, scale, None)
        plain: Any = twin.base_model.model.plain
        plain.forward = lambda x: linear(x, [layer], self.config)[0]
        return twin

    @rule()
    def recompile(self):
        torch._dynamo.reset()
        self.call = torch.compile(
            self.model, backend="falqon", options=dict[str, Any](config=self.config)
        )
        trained = [p for name, p in self.model.named_parameters() if "lora_" in name]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)

    @rule(checkpointed=st.booleans())
    def accumulate(self, checkpointed):
        """Forward and backward; the gradients add up until the next step."""
        x, twin = self.x(), self.twin()
        own, others = x.clone().requires_grad_(), x.clone().requires_grad_()
        before = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        call = self.call
        if checkpointed:
            call = functools.partial(checkpoint, self.call, use_reentrant=False)
        y = self.run(call, own)
        z = self.run(twin, others)
        for result in (y, z):
            result.square().mean().backward()
        assert torch.equal(y, z)
        assert torch.equal(own.grad, others.grad)
        for (name, p), (_, q) in zip(
            self.model.named_parameters(), twin.named_parameters(), strict=True
        ):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or torch.equal(p.grad, q.grad), name
            if name in before:
                p.grad = before[name] if p.grad is None else p.grad + before[name]

    @rule(mode=st.sampled_from(["eval", "no_grad", "inference"]))
    def evaluate(self, mode):
        self.model.train(mode == "no_grad")
        x, twin = self.x(), self.twin()
        with torch.inference_mode() if mode == "inference" else torch.no_grad():
            y = self.run(self.call, x)
        with torch.no_grad():
            assert torch.equal(y, self.run(twin, x))
        self.model.train()

    @rule()
    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    @rule(names=st.sampled_from([["default"], ["other"], ["default", "other"]]))
    def set_adapter(self, names):
        """PEFT freezes the others."""
        self.model.base_model.set_adapter(names)

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        """Without its adapters the model is the reference of DPO."""
        base_model = self.model.base_model
        (base_model.enable_adapter_layers if enabled else base_model.disable_adapter_layers)()

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def scale(self, factor):
        for layer in (self.net.up, self.net.down):
            layer.scale_layer(factor)

    @rule(trains=st.booleans())
    def freeze_a(self, trains):
        """LoRA-FA."""
        for layer in (self.net.up, self.net.down):
            layer.lora_A["default"].weight.requires_grad_(trains)

    @rule(path=st.sampled_from(["up", "down"]), through_data=st.booleans())
    def edit(self, path, through_data):
        """A parameter written by something else than the optimizer."""
        lora_b = self.net.get_submodule(path).lora_B["default"].weight
        with torch.no_grad():
            (lora_b.data if through_data else lora_b)[3] += randn(4, seed=self.seed) / 8

    @precondition(lambda self: not self.prepared)
    @rule(path=st.sampled_from(["up", "plain", "down"]))
    def change(self, path):
        """Another W, another base."""
        with torch.no_grad():
            self.base_layer(path).weight.mul_(1.25)
        self.bases[path] = self.cast_of(path)

    @rule()
    def save(self):
        self.saved = {n: t.clone() for n, t in self.model.state_dict().items()}
        self.of_saved = {path: list(base) for path, base in self.bases.items()}

    @rule(adapters_alone=st.booleans())
    def load(self, adapters_alone):
        if self.saved is None:
            return
        part = {n: t for n, t in self.saved.items() if "lora_" in n or not adapters_alone}
        if part.keys() - self.model.state_dict().keys():
            return  # saved before `prepare` or `restore`
        self.model.load_state_dict(part, strict=False)
        if not adapters_alone:
            self.bases = {path: list(base) for path, base in self.of_saved.items()}

    @precondition(lambda self: not self.prepared)
    @rule()
    def prepare(self):
        falqon_fx.prepare(self.model, self.config, progress=False)
        assert self.prepared
        self.recompile()

    @precondition(lambda self: self.prepared)
    @rule()
    def restore(self):
        """W is dq(W) from then on, whose cast has its own scale."""
        falqon_fx.restore(self.model)
        for path, (codes, scale) in self.bases.items():
            assert torch.equal(self.base_layer(path).weight, codes * scale)
            self.bases[path] = self.cast_of(path)
        self.recompile()

    @rule()
    def copy(self):
        self.model = copy.deepcopy(self.model)
        self.recompile()

    @invariant()
    def the_base_is_the_cast_of_w(self):
        if not hasattr(self, "bases"):
            return
        found: Any = falqon_fx.adapters(self.model)
        for path, state in found.items():
            codes, scale = self.bases[path.rpartition(".")[2]]
            assert torch.equal(state.weight.float(), codes)
            assert torch.equal(state.scale, scale)
        if self.prepared:
            base = self.net.plain.base()
            assert torch.equal(base.weight.float(), self.bases["plain"][0])
            assert torch.equal(base.scale, self.bases["plain"][1])


class Rows(RuleBasedStateMachine):
    """One layer with update="rows", A frozen, trained by hand."""

    @initialize(
        pending=st.sampled_from(["hold", "apply", "drop"]),
        topk=st.sampled_from([1, 4, "all"]),
        new=st.booleans(),
    )
    def start(self, pending, topk, new):
        self.config = FalqonConfig(
            update="rows", pending=pending, topk=topk, rounding="nearest", frozen="leave"
        )
        self.model = LoraLinear(IN, OUT, RANK, bias=True)
        self.model.lora_A.requires_grad_(False)
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
        state, lora = self.state(), (self.model.lora_A.weight, self.model.lora_B.weight)
        bias = self.model.base_layer.bias
        return linear(x, [Layer.written(state, bias, [Lora.written(*lora, state)])])[0]

    def state(self) -> MergedAdapter:
        (state,) = falqon_fx.adapters(self.model).values()
        assert isinstance(state, MergedAdapter)
        return state

    @rule()
    def recompile(self):
        """A second graph, as for another shape or mode."""
        traced = fx.symbolic_trace(Traceable(self.model))
        self.call = rewrite(traced, [randn(4, IN)], self.config)
        with torch.no_grad():  # "hold" counts all of B there
            self.evaluation = rewrite(traced, [randn(4, IN)], self.config)

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
            y = self.evaluation(x)
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
        adapter_only |= self.config.pending == "drop"  # which refuses the rest
        names = ("lora_B",) if adapter_only else ("",)
        part = {n: t for n, t in self.saved.items() if n.startswith(names)}
        self.model.load_state_dict(part, strict=False)
        self.expected.fresh |= not adapter_only

    @precondition(lambda self: self.config.pending != "drop")  # which refuses it
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


_default = settings.get_profile(settings.get_current_profile_name()).max_examples
TestTraining, TestRows = Training.TestCase, Rows.TestCase
TestTraining.settings = settings(max_examples=max(8, _default // 10), stateful_step_count=20)
TestRows.settings = settings(max_examples=max(10, _default // 10), stateful_step_count=25)
