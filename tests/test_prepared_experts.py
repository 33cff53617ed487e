"""`prepare` and what acts on whole models, on transformers' stacked experts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.integrations.peft import trace_param_wrappers, untrace_param_wrappers
from falqon_fx.model.stacks import Fp8Stack
from tests.models import fill_b

EXPERTS = "base_model.model.model.layers.0.mlp.experts"
STACKS = [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]
IDS = torch.arange(24).reshape(2, 12) % 37


def build(adapted: bool = True, experts: str = "grouped_mm", **own: Any) -> Any:
    """One layer of Qwen3-MoE in bfloat16, LoRA on attention and, where ``adapted``, on experts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "head_dim": 32}
    config = transformers.Qwen3MoeConfig(
        **sizes,
        vocab_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        num_experts_per_tok=2,
        intermediate_size=64,
        use_cache=False,
        initializer_range=0.1,
        **own,
    )
    config._attn_implementation = "eager"
    config._experts_implementation = experts
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if adapted else None
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=names)
    model = peft.get_peft_model(model, lora)
    fill_b(model, 0.05)
    trace_param_wrappers(model)
    return model


def step(model: Any, compiled: bool = True) -> list[Tensor]:
    """The logits and the gradients of a step."""
    model.zero_grad()
    options = {"config": FalqonConfig(inner="eager")}
    call = torch.compile(model, backend="falqon", options=options) if compiled else model
    logits = call(input_ids=IDS).logits
    logits.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [logits.detach(), *(g.clone() for g in grads if g is not None)]


@pytest.mark.parametrize("adapted", [True, False])
def test_a_prepared_stack_computes_what_it_did_and_takes_half(adapted, graphs):
    model = build(adapted)
    expected = step(model)
    report = falqon_fx.prepare(model, progress=False)
    assert set(STACKS) <= {*report.prepared}
    assert (set(STACKS) <= {*report.frozen}) is not adapted
    assert report.bytes_after <= 0.56 * report.bytes_before
    assert f"{EXPERTS}.gate_up_proj" not in dict(model.named_parameters())
    torch._dynamo.reset()
    for ours, theirs in zip(step(model), expected, strict=True):
        assert torch.equal(ours, theirs)
    before, after = graphs
    for one in (before, after):
        assert sorted(s.path for s in one.sites if s.experts) == STACKS
    assert {s.prepared for s in after.sites} == {True}
    assert falqon_fx.prepare(model, progress=False).prepared == ()


def test_uncompiled_it_runs_on_its_fp8_values():
    model = build()
    falqon_fx.prepare(model, progress=False)
    twin = copy.deepcopy(model)
    falqon_fx.restore(twin)
    for ours, theirs in zip(step(model, False), step(twin, False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_its_own(copied):
    model = build()
    falqon_fx.prepare(model, progress=False)
    twin = copied(model)
    expected = step(model, False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    for ours, theirs in zip(step(twin, False), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_restore_gives_the_parameters_back():
    model = build()
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    plain = {n: p.detach().clone() for n, p in model.named_parameters()}
    falqon_fx.prepare(model, progress=False)
    falqon_fx.restore(model)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == classes
    for name, parameter in model.named_parameters():
        # Half a step of E4M3, then of bfloat16.
        torch.testing.assert_close(parameter, plain[name], rtol=2**-4 + 2**-8, atol=2**-9)
    untrace_param_wrappers(model)
    assert type(model.get_submodule(EXPERTS)) is peft.tuners.lora.layer.ParamWrapper


def test_adapters_has_a_row_for_each_stack():
    model = build()
    for prepared in (False, True):
        if prepared:
            falqon_fx.prepare(model, progress=False)
        torch._dynamo.reset()
        step(model)
        found = falqon_fx.adapters(model)
        assert sorted(path for path, a in found.items() if getattr(a, "experts", 0)) == STACKS
        for path in STACKS:
            adapter: Any = found[path]
            wrapper = _wrapper(model, path.rpartition(".")[2])
            delta = wrapper.get_delta_weight("default").float().flatten(0, 1)
            ours = adapter.merged() - adapter.base()
            # PEFT rounds the sum of 4 products to bfloat16, then twice that.
            torch.testing.assert_close(ours, delta, rtol=2**-7, atol=2**-10)


def _wrapper(model: Any, name: str) -> Any:
    return next(m for m in model.modules() if getattr(m, "parameter_name", None) == name)


def test_merge_and_unload_merges_prepared_stacks():
    model = build()
    falqon_fx.prepare(model, progress=False)
    expected = step(model, False)[0]
    merged = falqon_fx.merge_and_unload(model)
    assert not any(isinstance(m, Fp8Stack) for m in merged.modules())
    merged = merged(input_ids=IDS).logits
    assert torch.nn.functional.cosine_similarity(merged.flatten(), expected.flatten(), 0) > 0.999


def test_training_goes_on_from_a_checkpoint(tmp_path):
    model = build()
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_checkpoint(model, tmp_path / "saved")
    expected = step(model)
    twin = build()
    falqon_fx.prepare(twin, progress=False)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    falqon_fx.load_checkpoint(twin, tmp_path / "saved")
    torch._dynamo.reset()
    for ours, theirs in zip(step(twin), expected, strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(FalqonError, match="experts"):
        falqon_fx.load_checkpoint(build(), tmp_path / "saved")


def test_an_export_has_dense_experts(tmp_path):
    model = build()
    expected = step(model, False)[0]
    falqon_fx.prepare(model, progress=False)
    report = falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    inner = EXPERTS.removeprefix("base_model.model.")
    assert "dense" in report.dense[inner]
    loaded: Any = falqon_fx.load(tmp_path / "out")
    logits = loaded(input_ids=IDS).logits
    similar = torch.nn.functional.cosine_similarity
    assert similar(logits.flatten().float(), expected.flatten().float(), 0) > 0.99


def test_what_cant_be_prepared_is_named():
    reasons = {
        "set_experts_implementation": build(experts="eager"),
        "trace_param_wrappers": build(),
        "granularity": build(),
    }
    untrace_param_wrappers(reasons["trace_param_wrappers"])
    for text, model in reasons.items():
        config = FalqonConfig(granularity="tensor" if text == "granularity" else "row")
        skipped = falqon_fx.prepare(model, config, progress=False).skipped
        assert all(text in skipped[path] for path in STACKS)
    report = falqon_fx.prepare(build(), FalqonConfig(exclude=("*experts*",)), progress=False)
    assert set(STACKS) <= report.skipped.keys()
    bare = build(adapted=False)
    report = falqon_fx.prepare(bare, FalqonConfig(frozen="leave"), progress=False)
    assert not set(STACKS) & {*report.prepared, *report.skipped}


def test_a_write_into_prepared_bytes_is_seen():
    model = build()
    falqon_fx.prepare(model, progress=False)
    step(model)
    stack = next(m for m in model.modules() if isinstance(m, Fp8Stack))
    with torch.no_grad():
        stack.code.view(-1)[:64].add_(1)
    with pytest.raises(FalqonError, match="not those that prepare"):
        step(model)
