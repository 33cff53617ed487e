"""`compile_blocks`: one graph for all blocks, the numbers of the whole model, generation beside it.

With inner="eager": what makes a graph another one doesn't depend on the inner compiler.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.integrations.transformers import FalqonCallback
from falqon_fx.model.blocks import _as_in_any_block
from tests.models import Stack, fill_b

CONFIG = FalqonConfig(inner="eager")
LAYERS = 9  # more than Dynamo's limit of 8 graphs


def llama(layers: int = LAYERS, **lora: Any) -> nn.Module:
    """With use_cache as it is by default, on."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    fill_b(model)
    return model.train()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def test_one_graph_is_that_of_all_blocks(graphs):
    model = llama()
    report = falqon_fx.compile_blocks(model, CONFIG)
    assert len(report.blocks) == LAYERS
    assert report.layers == ()
    step(model, tokens(2, 8))
    assert [len(graph.sites) for graph in graphs] == [7]
    assert len(falqon_fx.adapters(model)) == 7 * LAYERS


def test_blocks_give_the_numbers_of_the_whole():
    whole, model, ids = llama(layers=2), llama(layers=2), tokens(2, 8)
    for either in (whole, model):
        # Else transformers gives attention a mask where it is traced, and none where it is not,
        # and torch may add up their gradients in another order.
        either.get_base_model().set_attn_implementation("eager")
    falqon_fx.compile_blocks(model, CONFIG)
    loss, grads = step(model, ids)
    whole.compile(backend="falqon", options={"config": CONFIG})
    expected, of_whole = step(whole, ids)
    # The same ops in the same order, in one graph or in several.
    assert torch.equal(loss, expected)
    assert grads.keys() == of_whole.keys()
    assert all(torch.equal(grads[name], of_whole[name]) for name in grads)


def test_lengths_modes_and_generation_add_few_graphs(graphs):
    """Sizes that are numbers, sizes that are symbols, no gradient: as for a whole model. Prepared,
    and with checkpoints.
    """
    model = llama()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    falqon_fx.prepare(model, CONFIG, progress=False)
    falqon_fx.compile_blocks(model, CONFIG)
    counts = []
    for length in (5, 7, 6, 9):
        step(model, tokens(2, length))
        counts.append(len(graphs))
    assert counts == [1, 2, 2, 2]
    model.eval()
    with torch.no_grad():
        for length in (6, 8):
            model(input_ids=tokens(2, length))
    assert len(graphs) == 3
    ids = tokens(1, 5)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] == 8
    step(model.train(), tokens(2, 8))
    assert len(graphs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_two_hundred_lengths_are_two_graphs_of_inductor(graphs, regional):
    """Its guards on symbols add none."""
    model = llama(layers=2)
    if regional:
        falqon_fx.compile_blocks(model)
    else:
        model.config.use_cache = False
        model.compile(backend="falqon")
    for length in torch.randperm(200).tolist():
        step(model, tokens(2, length + 4))
    assert len(graphs) == 2


def test_the_first_of_trained_blocks_behind_frozen_ones_gets_no_useless_gradient(graphs):
    model = llama(layers=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3])
    falqon_fx.compile_blocks(model, CONFIG)
    _, grads = step(model, tokens(2, 8))
    assert {name.split(".layers.")[1][0] for name in grads} == {"2", "3"}
    # The frozen blocks, which have layers too small for FP8 here, run without autograd.
    assert [len(graph.sites) for graph in graphs] == [0, 2]
    before, after = (model.base_model.model.model.layers[i] for i in (0, 2))
    x = torch.randn(1, 4, 32)
    as_given = _as_in_any_block(x, before), _as_in_any_block(x, after)
    assert [y.requires_grad for y in as_given] == [False, True]
    assert not x.requires_grad


def test_copies_and_pickles_are_those_of_a_model(tmp_path):
    model = llama(layers=2)
    ids = tokens(2, 8)
    falqon_fx.compile_blocks(model, CONFIG)
    loss, _ = step(model, ids)
    twin = copy.deepcopy(model)
    methods: list[Any] = [(m, m.forward) for m in twin.modules()]
    assert all(forward.__self__ is m for m, forward in methods)
    assert torch.equal(step(twin, ids)[0], loss)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(step(model, ids)[0], loss)
    again = pickle.loads(pickle.dumps(model))
    assert model.state_dict().keys() == again.state_dict().keys()
    assert again(input_ids=ids, labels=ids).loss.isfinite()


class Around(nn.Module):
    """Blocks between an adapted layer, a frozen one and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.adapted = nn.Linear(64, 64)
        self.stack = Stack(3, 64, 64)
        self.lm_head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.stack(self.adapted(self.first(x))))


def test_layers_outside_of_the_blocks_run_in_fp8_too(graphs):
    for prepared in (False, True):
        model = peft.get_peft_model(Around(), peft.LoraConfig(r=4, target_modules=["adapted"]))
        if prepared:
            falqon_fx.prepare(model, CONFIG, progress=False)
        report = falqon_fx.compile_blocks(model, CONFIG)
        outside = {path.removeprefix("base_model.model.") for path in report.layers}
        assert outside == {"first", "adapted"}
        assert [path.split(".")[-1] for path in report.blocks] == ["0", "1", "2"]
        graphs.clear()
        model(torch.randn(2, 64)).sum().backward()
        # first and adapted, and a block of two sites, which two of three share: the first has an
        # x without gradient only where nothing before it trains.
        assert sorted(len(graph.sites) for graph in graphs) == [1, 1, 2]


def test_what_cannot_be_compiled_by_blocks_is_refused():
    with pytest.raises(FalqonError, match="no repeated blocks"):
        falqon_fx.compile_blocks(nn.Sequential(nn.Linear(64, 64)))
    model = llama(layers=2)
    block = model.base_model.model.model.layers[1]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    with pytest.raises(FalqonError, match=r"layers\.1: something has replaced its forward"):
        falqon_fx.compile_blocks(model)
    assert "forward" not in vars(model.base_model.model.model.layers[0])


def test_an_error_in_a_block_names_the_layer_of_the_model():
    model = llama(layers=3)
    with torch.no_grad():
        model.base_model.model.model.layers[2].mlp.up_proj.base_layer.weight.fill_(float("nan"))
    falqon_fx.compile_blocks(model, CONFIG)
    with pytest.raises(FalqonError, match=r"model\.layers\.2\.mlp\.up_proj: "):
        step(model, tokens(2, 8))


def test_the_callback_compiles_blocks(graphs, tmp_path: Path):
    """The losses are those of the callback that compiles the whole."""
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 6)]
    losses = []
    for regional in (False, True):
        graphs.clear()
        args = transformers.TrainingArguments(
            str(tmp_path / str(regional)),
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = FalqonCallback(CONFIG, prepare=True, regional=regional)
        trainer = transformers.Trainer(llama(2), args, train_dataset=data, callbacks=[callback])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert [len(graph.sites) for graph in graphs] == [7 if regional else 14]
    assert losses[0] == losses[1]
