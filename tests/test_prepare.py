"""`prepare`, `restore`, `adapters` and `flush` on PEFT models."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, MergedAdapter
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.prepare import Adapter
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.site.numerics import E4M3
from tests.models import fill_b, freeze_a, tiny_llama, tiny_mlp
from tests.sites import dequantized, randn, snapshot
from tests.tolerances import (
    Approx,
    fp8_cast_bound,
    gamma,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEFAULT = FalqonConfig()
ROWS = FalqonConfig(update="rows")
SITES = ["base_model.model.0", "base_model.model.2"]
UPDATES = pytest.mark.parametrize("config", [DEFAULT, ROWS], ids=["adapter", "rows"])
GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])
SCALE = pytest.mark.parametrize("scale", ["amax", "pow2"])


def prepared_mlp(config: FalqonConfig = DEFAULT, b_size: float = 0.1, **lora: object) -> nn.Module:
    model = tiny_mlp(**lora)
    fill_b(model, b_size)
    if config.update == "rows":
        freeze_a(model)
    falqon_fx.prepare(model, config, progress=False)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(
        torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before
    )


def is_prepared(module: nn.Module) -> bool:
    return isinstance(module, Fp8Linear | MergedBaseLinear)


def states(model: nn.Module) -> list[list[Tensor]]:
    return [
        snapshot(state)
        if isinstance(state, MergedAdapter)
        else [state.weight.view(torch.uint8).clone(), state.scale.clone()]
        for state in falqon_fx.adapters(model).values()
    ]


# -- eager use -------------------------------------------------------------------------------------


def base_off(state: Adapter | MergedAdapter, base: Tensor) -> Tensor:
    """|dq(W) - base|: one cast.

    With update="rows" |dq(W) - s·applied·dq(A) - base| of a state that was just made: the cast of
    the merged row, and float32 sums of r products when it is merged and when it is taken apart
    again.
    """
    if isinstance(state, Adapter):
        return fp8_cast_bound(base, state.scale, E4M3)
    merged = dequantized(state)
    rows = len(base)
    terms = base.double().abs() + abs(state.scaling) * (
        state.applied.double().abs() @ merged[rows:].abs()
    )
    own = gamma(state.rank + 8) * terms
    scale = state.scale.expand(rows + state.rank, 1)[:rows]
    exact = base.double() + state.scaling * state.applied.double() @ merged[rows:]
    return 2 * own + fp8_cast_bound(exact.abs() + own, scale, E4M3)


def layer_output(layer: nn.Module, x: Tensor, base: Approx, adapter: bool) -> Approx:
    """x·baseᵀ + bias, and s·B·A·x with the adapter, as PEFT's layer computes it in float32."""
    result = (Approx.exact(x) @ base.t()).rounded(F32)
    if layer.base_layer.bias is not None:
        result = (result + Approx.exact(layer.base_layer.bias.detach())).rounded(F32)
    if adapter:
        a, b = (Approx.exact(p.default.weight.detach()) for p in (layer.lora_A, layer.lora_B))
        scaling = Approx.exact(torch.tensor(layer.scaling["default"]))
        term = (Approx.exact(x) @ a.t()).rounded(F32) @ b.t()
        result = (result + (term.rounded(F32) * scaling).rounded(F32)).rounded(F32)
    return result


@GRANULARITY
@SCALE
@pytest.mark.parametrize("update", ["adapter", "rows"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_eager_forward_of_a_prepared_layer_is_right(granularity, scale, update, bias):
    """Base alone within the FP8 casts, and with the adapter enabled s·B·A·x on top, unquantized."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 48, bias=bias)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight.detach().clone()
    config = FalqonConfig(update=update, granularity=granularity, scale=scale)
    falqon_fx.prepare(model, config, progress=False)
    assert is_prepared(layer.base_layer)
    (state,) = falqon_fx.adapters(model).values()
    x, base = randn(5, 32), Approx(weight.double(), base_off(state, weight))
    layer_output(layer, x, base, adapter=True).assert_holds(model(x).detach())
    with model.disable_adapter():
        layer_output(layer, x, base, adapter=False).assert_holds(model(x).detach())


@UPDATES
def test_eager_gradients_reach_x_a_and_b_as_in_peft(config):
    """With the base weight that the prepared layer stands for, the gradients are PEFT's."""
    model = prepared_mlp(config)
    plain = falqon_fx.restore(copy.deepcopy(model))
    grads = []
    for candidate in (model, plain):
        x = randn(5, 32).requires_grad_()
        candidate(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in candidate.parameters() if p.requires_grad)])
    assert len(grads[0]) == (5 if config.update == "adapter" else 3)
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@UPDATES
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_gives_its_dtype_as_a_plain_linear_does(dtype, config):
    model = prepared_mlp(config)
    with torch.autocast("cpu", dtype=dtype):
        assert model.base_model.model[0](randn(3, 32)).dtype == dtype


@UPDATES
def test_a_prepared_llama_is_peft_on_base_weights_within_the_fp8_casts(config):
    """Bit for bit the model that `restore` gives, whose base weights are off by their casts."""
    model = freeze_a(tiny_llama().eval())
    fill_b(model)
    plain = copy.deepcopy(model)
    assert len(falqon_fx.prepare(model, config, progress=False).prepared) == 14
    restored = falqon_fx.restore(copy.deepcopy(model))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, restored(tokens).logits)
        with model.disable_adapter(), restored.disable_adapter():
            assert torch.equal(model(tokens).logits, restored(tokens).logits)
    states = falqon_fx.adapters(model)
    assert len(states) == 14
    for path, state in states.items():
        original = plain.get_submodule(path).base_layer.weight.detach()
        near = Approx(original.double(), base_off(state, original))
        near.assert_holds(restored.get_submodule(path).base_layer.weight.detach())


# -- the report ------------------------------------------------------------------------------------


@UPDATES
def test_the_report_names_what_was_prepared(config):
    report = falqon_fx.prepare(freeze_a(tiny_mlp()), config, progress=False)
    assert list(report.prepared) == SITES
    assert report.frozen == ()
    assert report.skipped == {}
    assert "2 layers prepared, 0 of them without an adapter" in str(report)


def smollm_layer(**lora: object) -> nn.Module:
    """One layer of SmolLM2-135M's shapes in bfloat16, PEFT on q and v."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).to(BF16)
    options = {"r": 16, "target_modules": ["q_proj", "v_proj"], **lora}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def linear_bytes(model: nn.Module) -> int:
    """Of the weights of all linear layers but the tied head and the adapters."""
    return sum(
        p.nbytes for name, p in model.named_parameters() if "proj" in name and "lora_" not in name
    )


@GRANULARITY
def test_all_seven_linears_are_freed_and_leave_0_51_of_bf16(granularity):
    """A byte an element, 4 for each row of at least 576 elements, and 8 for the hash of a layer
    that has at least 192 x 576: (1 + 4/576 + 8/110592) / 2 = 0.504 of bfloat16's two bytes.
    """
    model = smollm_layer()
    before = linear_bytes(model)
    report = falqon_fx.prepare(model, FalqonConfig(granularity=granularity), progress=False)
    assert {path.rpartition(".")[2] for path in report.prepared} == SEVEN
    assert {path.rpartition(".")[2] for path in report.frozen} == SEVEN - {"q_proj", "v_proj"}
    assert report.skipped == {"base_model.model.lm_head": "its weight is tied to an embedding"}
    assert report.bytes_before == before
    assert linear_bytes(model) == report.bytes_after + 7 * 8
    assert linear_bytes(model) <= 0.51 * before
    assert not any(p.dtype == BF16 and "proj" in n and "lora" not in n
                   for n, p in model.named_parameters())  # fmt: skip


def test_bytes_with_update_rows_are_at_most_0_57_of_bf16():
    """FP8, scales, ``applied`` of rank 16 and what is kept of W, at the shapes that
    have adapters.
    """
    model = smollm_layer(target_modules=sorted(SEVEN))
    before = linear_bytes(model)
    falqon_fx.prepare(freeze_a(model), ROWS, progress=False)
    held = [m for m in model.modules() if isinstance(m, MergedBaseLinear)]
    assert len(held) == 7
    assert sum(p.nbytes for m in held for p in m.parameters()) <= 0.57 * before


def test_frozen_leave_keeps_the_layers_without_an_adapter():
    model = smollm_layer()
    report = falqon_fx.prepare(model, FalqonConfig(frozen="leave"), progress=False)
    assert {path.rpartition(".")[2] for path in report.prepared} == {"q_proj", "v_proj"}
    assert (report.frozen, report.skipped) == ((), {})
    kept = [m for n, m in model.named_modules() if n.rpartition(".")[2] in SEVEN - {"q_proj"}]
    assert sum(type(m) is nn.Linear for m in kept) == 5


class Mixed(nn.Module):
    """Layers that a model keeps as they are beside one that FP8 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 64)
        self.up, self.wide, self.small = nn.Linear(64, 64), nn.Linear(64, 96), nn.Linear(96, 48)
        self.gate, self.score = nn.Linear(64, 80), nn.Linear(64, 72)
        self.tied = nn.Linear(64, 40, bias=False)
        self.tied.weight = self.embed.weight

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = self.up(self.embed(ids))
        return [self.small(self.wide(x)), self.gate(x), self.score(x), self.tied(x)]


def test_prepare_leaves_what_compiled_code_leaves_for_the_same_reasons():
    def made() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=["up"]))

    ids = torch.arange(6).view(2, 3)
    (graph,) = falqon_fx.explain(made(), ids).graphs
    report = falqon_fx.prepare(made(), progress=False)
    assert {site.path.removesuffix(".base_layer") for site in graph.sites} == set(report.prepared)
    assert list(report.prepared) == ["base_model.model.up", "base_model.model.wide"]
    assert {item.site: item.reason for item in graph.left} == report.skipped
    assert {path.rpartition(".")[2] for path in report.skipped} == {
        "small",
        "gate",
        "score",
        "tied",
    }


def test_frozen_parts_of_adapters_are_no_layers_without_an_adapter():
    """A of rank 64 is as large as a layer, and PEFT freezes an adapter that is not active."""
    lora = peft.LoraConfig(r=64, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(128, 96), nn.Linear(96, 128)), lora)
    model.add_adapter("other", lora)
    fill_b(model, 0.1)
    freeze_a(model)
    before = {n: p for n, p in parameters(model).items() if "lora_" in n}
    assert not model.get_parameter("base_model.model.0.lora_B.other.weight").requires_grad
    (graph,) = falqon_fx.explain(model, randn(3, 128)).graphs
    report = falqon_fx.prepare(model, progress=False)
    assert list(report.prepared) == ["base_model.model.0", "base_model.model.1"]
    assert [site.path for site in graph.sites] == list(report.prepared)
    assert (report.skipped, graph.left) == ({}, ())
    assert len(before) == 4
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.up, self.head = nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.embed(x)))


def skipped(model: nn.Module, config: FalqonConfig = DEFAULT) -> dict[str, str]:
    before = parameters(model)
    report = falqon_fx.prepare(model, config, progress=False)
    assert report.prepared == ()
    assert unchanged(model, before)
    return report.skipped


def test_the_base_of_dora_is_prepared_and_with_update_rows_skipped():
    reasons = skipped(tiny_mlp(use_dora=True), ROWS)
    assert list(reasons) == SITES
    assert all("DoRA" in reason for reason in reasons.values())
    assert list(falqon_fx.prepare(tiny_mlp(use_dora=True), progress=False).prepared) == SITES


@UPDATES
def test_a_prepared_layer_is_not_prepared_again(config):
    reasons = skipped(prepared_mlp(config), config)
    assert all("prepared already" in reason for reason in reasons.values())
    assert list(reasons) == SITES


def test_convolutions_and_embeddings_are_skipped_or_not_seen():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv2d(3, 4, 1))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    reasons = skipped(model)
    assert "Conv2d" in reasons["base_model.model.1"]


@UPDATES
def test_a_trained_base_weight_is_skipped(config):
    model = tiny_mlp()
    for name in ("0", "2"):
        model.base_model.model.get_submodule(name).base_layer.weight.requires_grad_()
    assert all("trained too" in reason for reason in skipped(model, config).values())


def test_the_base_under_two_active_adapters_is_prepared_and_with_update_rows_skipped():
    def made() -> nn.Module:
        model = tiny_mlp()
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0", "2"]))
        model.base_model.set_adapter(["default", "second"])
        return model

    assert all("more than one adapter" in why for why in skipped(made(), ROWS).values())
    assert list(falqon_fx.prepare(made(), progress=False).prepared) == SITES


@UPDATES
def test_a_quantized_base_is_skipped(config):
    model = tiny_mlp()
    for name in ("0", "2"):
        base = model.base_model.model.get_submodule(name).base_layer
        base.weight = nn.Parameter(base.weight.detach().to(E4M3), requires_grad=False)
    report = falqon_fx.prepare(model, config, progress=False)
    assert report.prepared == ()
    assert list(report.skipped) == SITES
    assert all("already quantized" in reason for reason in report.skipped.values())


@UPDATES
def test_another_kind_of_base_layer_is_skipped(config):
    class Odd(nn.Linear):
        """A subclass may compute anything, as those of quantization libraries do."""

    model = tiny_mlp()
    for name in ("0", "2"):
        layer = model.base_model.model.get_submodule(name)
        odd = Odd(*reversed(layer.base_layer.weight.shape)).requires_grad_(False)
        layer.base_layer = odd
    reasons = skipped(model, config)
    assert list(reasons) == SITES
    assert all("is a Odd" in reason for reason in reasons.values())


@UPDATES
def test_include_and_exclude_choose_the_layers(config):
    model = freeze_a(tiny_mlp())
    config = FalqonConfig(update=config.update, exclude=("*.2",))
    report = falqon_fx.prepare(model, config, progress=False)
    assert list(report.prepared) == SITES[:1]
    assert "exclude=" in report.skipped[SITES[1]]
