"""Failures that the zoo, the dialects and the fuzzers found, each by its name."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import falqon_fx
from falqon_fx.site.record import STEP
from tests.emulation import emulate
from tests.models import LoraLinear, Relu, Stack, compiled, fill_b, freeze_a, lora_b, tiny_mlp
from tests.parameters import each_value, slow
from tests.sites import randn
from tests.spellings import Passes


def test_a_result_that_is_written_in_place():
    """Falcon adds the attention output onto that of the MLP in place: the result may be no view."""

    class InPlace(LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            y += 1
            return y

    model, x = InPlace(24, 20), randn(2, 5, 24).requires_grad_()
    fill_b(model)
    plain = LoraLinear(24, 20)
    plain.load_state_dict(model.state_dict())
    y, expected = compiled(model)(x), compiled(plain)(x) + 1
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(model.lora_A.weight.grad, plain.lora_A.weight.grad)
    assert torch.equal(model.lora_B.weight.grad, plain.lora_B.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool])
def test_a_quantization_of_the_users_own_is_no_cast(dtype):
    """A site reads x from before its casts, but these change the value."""

    class Quantized(LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype).to(torch.float32))

    model, x, passes = Quantized(24, 20), 3 * randn(5, 24), Passes()
    fill_b(model)
    plain = LoraLinear(24, 20)
    plain.load_state_dict(model.state_dict())
    result = passes.run(model, x)
    assert len(passes.sites) == 1
    assert torch.equal(result, Passes().run(plain, x.to(dtype).to(torch.float32)))


def test_drop_counts_a_loaded_adapter_once():
    """W' is made with the loaded B in it; the first update may not add that B again."""
    model, x = freeze_a(LoraLinear(24, 20)), randn(5, 24)
    fill_b(model, 0.1)
    loaded = model.lora_B.weight.detach().clone()
    call = compiled(model, update="rows", pending="drop", topk="all")
    for _ in range(2):
        call(x)
        (state,) = falqon_fx.adapters(model).values()
        assert torch.equal(state.applied, loaded)
        assert not model.lora_B.weight.any()
        assert int(state.counters[STEP]) == 0
    with torch.no_grad():
        model.lora_B.weight.fill_(0.5)
    call(x)
    assert torch.equal(state.applied, loaded + 0.5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_first_call_inside_a_checkpoint(reentrant):
    """What making a state computes may not be saved for backward: recomputing has it already."""
    model, x = Relu(), randn(5, 32).requires_grad_()
    fill_b(model)
    checkpoint(compiled(model), x, use_reentrant=reentrant).square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    model.zero_grad()
    compiled(model)(x).square().mean().backward()
    again = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("trained", ["lora_A", "lora_B"])
def test_an_adapter_that_trains_a_or_b_alone(trained):
    """MiCA freezes B, LoRA-FA A: the other gets the gradient that it has in an adapter that trains
    both.
    """
    model, x = LoraLinear(24, 20), randn(5, 24)
    fill_b(model)
    both = copy.deepcopy(model)
    frozen = {"lora_A": model.lora_B, "lora_B": model.lora_A}[trained].requires_grad_(False)
    for each in (model, both):
        compiled(each)(x).square().sum().backward()
    assert frozen.weight.grad is None
    found, expected = (getattr(each, trained).weight.grad for each in (model, both))
    assert torch.equal(found, expected)
    assert found.abs().max() > 0


def test_an_adapter_that_trains_a_alone_is_left_alone_with_update_rows():
    """In a merged weight, which holds A fixed, nothing would train."""
    model, passes = LoraLinear(24, 20), Passes(update="rows")
    fill_b(model)
    model.lora_B.requires_grad_(False)
    passes.run(model, randn(5, 24))
    assert not passes.sites
    (item,) = passes.rejected
    assert "lora_B is frozen" in item.reason
    model.lora_A.requires_grad_(False)  # a frozen adapter in inference
    passes = Passes(update="rows")
    passes.run(model, randn(5, 24))
    assert len(passes.sites) == 1


@pytest.mark.parametrize("update", ["adapter", "rows"])
def test_a_layer_with_one_row(update):
    """Qwen2-MoE has such a gate: fewer rows than update="rows" writes by default."""
    model = LoraLinear(24, 1)
    compiled(freeze_a(model), update=update)(randn(5, 24))
    (state,) = falqon_fx.adapters(model).values()
    assert state.weight.shape == ((1 if update == "adapter" else 5), 24)


class TiedBlocks(nn.Module):
    """Zamba2: a block in two places with one base weight and an adapter in each place; and a head
    tied to the embedding, with an adapter of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 24).requires_grad_(False)
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": LoraLinear(24, 24)}) for _ in range(2))
        self.layers[1]["proj"].base_layer.weight = self.layers[0]["proj"].base_layer.weight
        self.head = LoraLinear(24, 32)
        self.head.base_layer.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.relu(layer["proj"](x))
        return self.head(x)


TIED = {"layers.0.proj", "layers.1.proj", "head"}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sites_on_a_tied_base_weight_have_the_paths_of_their_adapters(checkpointed):
    model, passes = TiedBlocks(), Passes()
    ids = torch.randint(0, 32, (2, 5))
    if checkpointed:
        for i, layer in enumerate(model.layers):
            model.layers[i] = Checkpointed(layer["proj"])
    passes.run(model, ids)
    assert {site.path.replace(".layer", ".proj") for site in passes.sites} == TIED
    found = falqon_fx.adapters(model)
    assert {path.replace(".layer", ".proj") for path in found} == TIED


class Checkpointed(nn.ModuleDict):
    """A block whose projection is recomputed in backward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__({"layer": layer})

    def __getitem__(self, name: str) -> Any:
        return lambda x: checkpoint(self._modules["layer"], x, use_reentrant=False)


def test_a_layer_with_two_names_has_the_first():
    """As `named_modules` and PEFT name it."""
    model, x = nn.Sequential(LoraLinear(24, 24), nn.ReLU(), LoraLinear(24, 24)), randn(5, 24)
    model[2] = model[0]
    compiled(model)(x)
    assert list(falqon_fx.adapters(model)) == ["0"]


class Dropping(nn.Module):
    """Dropouts whose probability is an attribute: with dynamic=True Dynamo makes it an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.p = LoraLinear(24, 20), 0.25

    def forward(self, x: Tensor) -> Tensor:
        base, scaling = self.layer.base_layer, self.layer.scaling
        dropped = F.dropout(x, self.p, self.training)
        y = base(x) + self.layer.lora_B(self.layer.lora_A(dropped)) * scaling
        return F.dropout(y, self.p, self.training)


def test_the_probability_of_a_dropout_is_an_input():
    """torch.compile(dynamic=True) of Qwen2: its attention's dropout raised a TypeError."""
    model, passes, x = Dropping(), Passes(), randn(5, 24)
    fill_b(model.layer, 0.1)
    call = torch.compile(model, backend=passes, dynamic=True)
    call(x)
    model.p = 0.5
    call(x)
    assert [site.dropout for site in passes.sites] == [0.25, 0.5]
    model.p = 1.0
    assert not call(x).any()


@pytest.fixture
def dynamo_log():
    """What torch tells its users while it compiles."""
    texts: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("torch._dynamo.convert_frame")
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield texts
    logger.removeHandler(handler)


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_a_layer_that_dynamo_gives_up_on_is_trained_as_in_eager(prepared, dynamo_log):
    """Beyond recompile_limit a call runs PEFT's own layers, on the base weight or on what `prepare`
    made of it. The library says so before, torch when it happens. Both ways train A and B, and
    nothing counts twice or gets lost.
    """
    model = tiny_mlp()
    fill_b(model)
    plain = copy.deepcopy(model)
    if prepared:
        falqon_fx.prepare(model, progress=False)
        plain = falqon_fx.restore(copy.deepcopy(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    merged, bytes_of = [], set()
    with torch._dynamo.config.patch(recompile_limit=1):
        call = torch.compile(model, backend="falqon", options={"inner": "eager"}, dynamic=False)
        with pytest.warns(UserWarning, match="graph 1 of the code around .*and the last one"):
            call(randn(5, 32))
        for n in (5, 5, 7, 5):
            x = randn(n, 32)
            y = call(x)
            plain.load_state_dict(model.state_dict(), strict=False)
            states = falqon_fx.adapters(model)
            bytes_of.add(tuple(state.weight.data_ptr() for state in states.values()))
            twin = emulate(copy.deepcopy(plain), states)
            merged.append(torch.equal(y, twin(x)))
            assert torch.equal(y, twin(x) if merged[-1] else plain(x))
            y.square().mean().backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
    assert merged == [True, True, False, True]
    assert len(bytes_of) == 1
    assert any("hit config.recompile_limit" in text for text in dynamo_log)


def test_of_the_recompile_limit_nothing_is_said_before_the_last_graph():
    model = tiny_mlp()
    call = torch.compile(model, backend="falqon", options={"inner": "eager"}, dynamic=False)
    said = []
    with torch._dynamo.config.patch(recompile_limit=3):
        for n in (5, 6, 7):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call(randn(n, 32))
            said.append([w for w in caught if "graph 3 of the code" in str(w.message)])
    assert [len(texts) for texts in said] == [0, 0, 1]


@each_value(reentrant=[False, True], inner=["eager", "aot_eager"])
def test_a_checkpoint_drops_the_same_values_when_it_recomputes(inner, reentrant):
    """GPT-2 with gradient checkpointing and inner="eager": other gradients, and no error."""

    class Drops(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = self.call(lambda x, block=block: block(F.dropout(x, 0.5)), x)
            return x

    plain, x = Drops(), randn(5, 32).requires_grad_()
    fill_b(plain)
    saving = copy.deepcopy(plain)
    saving.call = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    results = []
    for model in (plain, saving):
        torch.manual_seed(3)
        y = compiled(model, inner=inner)(x)
        y.square().mean().backward()
        results.append([y.detach(), *(b.grad for b in lora_b(model))])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", slow("inductor")])
def test_selective_checkpoints(inner):
    """``context_fn`` chooses what is saved: with inner="eager" a SyntaxError, since a graph's code
    can't hold a function. The numbers are those without a checkpoint.
    """
    saved: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        saved.append(str(op))
        must = op is torch.ops.falqon.merged_linear.default
        return CheckpointPolicy.MUST_SAVE if must else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    plain, x = Stack(), randn(2, 5, 32).requires_grad_()
    fill_b(plain)
    saving = copy.deepcopy(plain)
    saving.call = lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    results = []
    for model in (plain, saving):
        torch._dynamo.reset()
        x.grad = None
        y = compiled(model, inner=inner)(x)
        y.square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results.append([y.detach(), x.grad, *grads])
    assert len(results[0]) == 2 + 8
    assert all(map(torch.equal, *results))
    assert "falqon.merged_linear.default" in saved


def test_operands_that_a_checkpoint_gets_keep_their_names():
    """The body of a checkpoint that has many results of its own, and gets as many from outside: its
    code assigned getitem_3 to getitem_4 and that to getitem_5.
    """
    model, x = Stack(), randn(2, 5, 32)
    fill_b(model)
    model.call = lambda block, x: checkpoint(block, x, use_reentrant=False)
    passes = Passes()
    passes.run(model, x)
    for result in passes.results:
        for module in result.gm.modules():
            graph = getattr(module, "graph", None)
            for node in graph.find_nodes(op="placeholder") if graph is not None else ():
                assert "getitem" not in node.name or node.name == node.target


def test_a_result_whose_rows_are_written_in_place():
    """PEFT's mixed batches add each sample's adapter to its rows of the base layer's result."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 80).requires_grad_(False)
            self.a, self.b = nn.Linear(64, 4, bias=False), nn.Linear(4, 80, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.base(x)
            y[[0, 2]] += self.b(self.a(x[[0, 2]]))
            return y

    model, passes, x = Rows(), Passes(), randn(5, 64).requires_grad_()
    y = passes.run(model, x)
    assert [site.path for site in passes.sites] == ["base"]
    expected = model.base(x)
    expected[[0, 2]] += model.b(model.a(x[[0, 2]]))
    for result in (y, expected):
        x.grad = model.a.weight.grad = model.b.weight.grad = None
        result.sum().backward()
        result.grads = [x.grad, model.a.weight.grad, model.b.weight.grad]
    assert torch.equal(y.grads[1], expected.grads[1])
    assert torch.equal(y.grads[2], expected.grads[2])
    assert y.grads[0].abs().max() > 0
