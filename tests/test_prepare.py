"""`prepare`, `restore`, `adapters` and `flush` on PEFT models."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError, MergedAdapter
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.prepare import Adapter
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.site.numerics import E4M3
from tests.models import Relu, fill_b, freeze_a, lora_b, tiny_llama, tiny_mlp
from tests.sites import dequantized, randn, same, snapshot
from tests.tolerances import (
    Approx,
    assert_within,
    fp8_cast_bound,
    fp8_stochastic_bound,
    gamma,
    rounded_bound,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEFAULT = FalqonConfig()
ROWS = FalqonConfig(update="rows")
SITES = ["base_model.model.0", "base_model.model.2"]
UPDATES = pytest.mark.parametrize("config", [DEFAULT, ROWS], ids=["adapter", "rows"])
GRANULARITY = pytest.mark.parametrize("granularity", ["tensor", "row"])
SCALE = pytest.mark.parametrize("scale", ["amax", "pow2"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


# -- errors change nothing -------------------------------------------------------------------------


def refused(model: nn.Module, config: FalqonConfig = DEFAULT) -> FalqonError:
    before = parameters(model)
    with pytest.raises(FalqonError) as caught:
        falqon_fx.prepare(model, config, progress=False)
    assert unchanged(model, before)
    assert not any(map(is_prepared, model.modules()))
    return caught.value


@UPDATES
def test_a_tied_weight_is_refused(config):
    model = peft.get_peft_model(Tied(), peft.LoraConfig(r=2, target_modules=["up", "head"]))
    error = refused(freeze_a(model), config)
    assert error.site == "base_model.model.head"
    assert "tied" in str(error)
    assert "embed" in str(error)
    assert "exclude=" in error.remedy
    config = FalqonConfig(update=config.update, exclude=("*head",))
    report = falqon_fx.prepare(model, config, progress=False)
    assert list(report.prepared) == ["base_model.model.up"]  # the remedy works


@UPDATES
@pytest.mark.parametrize("init", ["svd", "keep"])
@pytest.mark.parametrize("bad", [float("nan"), -float("inf"), 1e5])
def test_bad_values_in_the_last_base_change_no_layer_before_it(bad, init, config):
    """Not even lora_A of the first, which init="svd" overwrites."""
    model = freeze_a(tiny_mlp())
    with torch.no_grad():
        model.get_submodule(f"{SITES[1]}.base_layer").weight[1, 2] = bad
    error = refused(model, FalqonConfig(update=config.update, init=init))
    assert error.site == SITES[1]
    assert "65536" in str(error) if bad == 1e5 else "NaN or Inf" in str(error)
    assert "exclude=" in error.remedy


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e5])
def test_bad_values_in_a_frozen_layer_without_an_adapter_change_nothing(bad):
    model = smollm_layer()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").weight[3, 4] = bad
    error = refused(model)
    assert error.site == "base_model.model.model.layers.0.mlp.down_proj"
    assert "65536" in str(error) if bad == -1e5 else "NaN or Inf" in str(error)
    assert "exclude=" in error.remedy
    report = falqon_fx.prepare(model, FalqonConfig(exclude=("*down_proj",)), progress=False)
    assert len(report.prepared) == 6  # the remedy works


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_bad_values_in_an_adapter_are_its_own_affair_but_with_update_rows(which):
    """They are no part of what `prepare` casts: the result is NaN with and without it."""
    model = freeze_a(tiny_mlp())
    with torch.no_grad():
        model.get_submodule(f"{SITES[1]}.{which}.default").weight[1, 2] = float("nan")
    error = refused(copy.deepcopy(model), ROWS)
    assert error.site == SITES[1]
    assert "NaN or Inf" in str(error)
    x = randn(3, 32)
    before = model(x).isnan()
    falqon_fx.prepare(model, progress=False)
    assert before.any()
    assert torch.equal(model(x).isnan(), before)


@pytest.mark.parametrize(
    ("part", "shape"),
    [("lora_A", (5, 48)), ("lora_A", (4, 47)), ("lora_B", (32, 3)), ("lora_B", (31, 4))],
)
@UPDATES
def test_an_adapter_that_does_not_fit_is_refused(part, shape, config):
    """As after a swap of A or B alone."""
    model = freeze_a(tiny_mlp())
    layer = model.get_submodule(SITES[1])
    getattr(layer, part)["default"].weight = nn.Parameter(randn(*shape))
    error = refused(model, config)
    assert error.site == SITES[1]
    assert all(str(n) in error.problem for n in shape)
    assert "A [r, in] and B [out, r]" in error.remedy


@pytest.mark.parametrize("adapted", [True, False])
@UPDATES
def test_a_model_without_values_is_refused(config, adapted):
    model = freeze_a(tiny_mlp()) if adapted else nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(FalqonError, match="its base weight is on the meta device") as caught:
        falqon_fx.prepare(model.requires_grad_(False).to("meta"), config, progress=False)
    assert caught.value.site == (SITES[0] if adapted else "0")
    assert "Give it values" in caught.value.remedy
    assert not any(map(is_prepared, model.modules()))


@UPDATES
def test_an_adapter_on_another_device_is_refused(config):
    model = freeze_a(tiny_mlp())
    model.get_submodule(SITES[1]).lora_A.to("meta")
    with pytest.raises(FalqonError) as caught:
        falqon_fx.prepare(model, config, progress=False)
    assert caught.value.site == SITES[1]
    assert "lora_A is on meta, its base weight on cpu" in str(caught.value)
    assert "Move the whole model to one device" in caught.value.remedy
    assert not any(map(is_prepared, model.modules()))


def test_a_topk_above_the_rows_of_a_layer_is_refused():
    error = refused(freeze_a(tiny_mlp()), FalqonConfig(update="rows", topk=40))  # of 48, then 32
    assert isinstance(error, FalqonConfigError)
    assert SITES[1] in str(error)
    assert '"all"' in str(error)


# -- the state travels with the module -------------------------------------------------------------


def states(model: nn.Module) -> list[list[Tensor]]:
    return [
        snapshot(state)
        if isinstance(state, MergedAdapter)
        else [state.weight.view(torch.uint8).clone(), state.scale.clone()]
        for state in falqon_fx.adapters(model).values()
    ]


def same_states(a: nn.Module, b: nn.Module) -> bool:
    return len(states(a)) == 2 and all(map(same, states(a), states(b)))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@UPDATES
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_have_the_same_state_in_memory_of_their_own(
    copied: Callable[[nn.Module], nn.Module], config
):
    model = prepared_mlp(config)
    other, x = copied(model), randn(3, 32)
    assert same_states(model, other)
    assert torch.equal(model(x), other(x))
    pairs = zip(falqon_fx.adapters(model).values(), falqon_fx.adapters(other).values(), strict=True)
    for one, two in pairs:
        assert one.weight.data_ptr() != two.weight.data_ptr()
        assert one.scale.data_ptr() != two.scale.data_ptr()
    before = states(model)
    fill_b(other, 1.0, seed=5)
    falqon_fx.flush(other)
    assert all(map(same, states(model), before))
    assert same_states(model, other) == (config.update == "adapter")


@UPDATES
def test_state_dict_round_trip(tmp_path, config):
    model = prepared_mlp(config)
    torch.manual_seed(7)  # another base, another adapter
    other = prepared_mlp(config, b_size=0.0)
    assert not same_states(model, other)
    file = tmp_path / "model.safetensors"
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, file)
    missing = other.load_state_dict(load_file(file))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert same_states(model, other)
    assert torch.equal(model(randn(3, 32)), other(randn(3, 32)))


@UPDATES
def test_a_state_dict_holds_no_tensor_that_a_cast_could_hurt(config):
    """FP8 travels as uint8: `.to(bfloat16)` and DDP's broadcast leave it alone. So do the float32
    scales of the default, as int32, which FSDP's mixed precision would cast.
    """
    model = prepared_mlp(config)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {d for n, d in types.items() if n.endswith(".code")} == {torch.uint8}
    assert E4M3 not in types.values()
    if config.update == "adapter":
        base = {n for n in types if "base_layer" in n and not n.endswith("bias")}
        assert not any(types[n].is_floating_point for n in base)
        assert len(base) == 2 * 3
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    assert not list(model.buffers())


@UPDATES
@pytest.mark.parametrize("dtype", [BF16, F16, torch.float64])
def test_a_cast_of_the_model_keeps_the_state(dtype, config):
    model = prepared_mlp(config)
    before = states(model)
    model.to(dtype)
    assert all(map(same, states(model), before))
    assert model.base_model.model[0].base_layer.bias.dtype == dtype
    assert model(randn(3, 32).to(dtype)).dtype == dtype


def test_moving_to_another_device_keeps_dtypes():
    model = prepared_mlp().to("meta")
    base = model.base_model.model[0].base_layer
    types = [torch.uint8, torch.int32, torch.uint8]
    assert [t.dtype for t in (base.code, base.scale, base.digest)] == types
    assert {t.device.type for t in (base.code, base.scale, base.digest)} == {"meta"}
    assert model(torch.empty(3, 32, device="meta")).shape == (3, 32)  # nothing there to verify
    scale = prepared_mlp(ROWS).to("meta").base_model.model[0].base_layer.scale
    assert (scale.dtype, scale.device.type) == (F32, "meta")


def test_the_saved_adapter_loads_in_plain_peft(tmp_path):
    """Base + s·B·A with the adapter's own A and B; the prepared base weight is not in it."""
    model = tiny_mlp()
    base = nn.Sequential(
        *(copy.deepcopy(getattr(m, "base_layer", m)) for m in model.base_model.model)
    )
    falqon_fx.prepare(model, FalqonConfig(init="svd"), progress=False)
    fill_b(model, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: no config of a base model to look up
        model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    for (name, a), (other, b) in zip(
        sorted((n, p) for n, p in model.named_parameters() if "lora_" in n),
        sorted((n, p) for n, p in loaded.named_parameters() if "lora_" in n),
        strict=True,
    ):
        assert name == other
        assert torch.equal(a, b)
    for path, state in falqon_fx.adapters(model).items():
        layer, plain = model.get_submodule(path), loaded.get_submodule(path)
        assert type(plain.base_layer) is nn.Linear
        weight = plain.base_layer.weight.detach()
        x = randn(5, weight.shape[1])
        exact, near = Approx.exact(weight), Approx(weight.double(), base_off(state, weight))
        layer_output(plain, x, exact, adapter=True).assert_holds(plain(x).detach())
        layer_output(plain, x, near, adapter=True).assert_holds(layer(x).detach())


# -- averages --------------------------------------------------------------------------------------


def move(model: nn.Module, seed: int) -> None:
    """A step of an optimizer on A and B."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.add_(randn(*parameter.shape, seed=97 * seed + i) * 0.05)


def test_an_averaged_model_averages_a_and_b_and_has_the_same_base():
    """SWA. Float32 running means of three values: at most 3 · 3 roundings of what they contain."""
    model = prepared_mlp()
    average, seen = AveragedModel(model), []
    for step in range(3):
        move(model, step)
        average.update_parameters(model)
        seen.append(parameters(model))
    assert same_states(model, average.module)
    for name, parameter in average.module.named_parameters():
        if "lora_" in name:
            each = torch.stack([values[name] for values in seen]).double()
            assert_within(parameter, each.mean(0), gamma(9) * each.abs().sum(0))
    x = randn(3, 32)
    assert torch.equal(average(x), falqon_fx.restore(copy.deepcopy(average.module))(x))


def ema_of_all(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(3):
        move(model, step)
        average.update_parameters(model)
    return average.module


def ema_through_data(model: nn.Module) -> nn.Module:
    """After it was used, by writes that no version counter sees."""
    average = copy.deepcopy(model)
    average(randn(2, 32))
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.copy_(0.9 * mine.data + 0.1 * theirs.data)
    return average


def ema_rounded(model: nn.Module) -> nn.Module:
    """Loaded from a state dict whose averages were cast back to the dtypes that they had."""
    average = copy.deepcopy(model)
    average(randn(2, 32))
    state = {n: (0.9 * t + 0.1 * t).to(t.dtype) for n, t in model.state_dict().items()}
    average.load_state_dict(state)
    return average


USES: dict[str, Callable[[nn.Module], object]] = {
    "eager": lambda m: m(randn(3, 32)),
    "compiled": lambda m: torch.compile(m, backend="falqon", options={"inner": "eager"})(
        randn(3, 32)
    ),
    "another backend": lambda m: torch.compile(m, backend="eager")(randn(3, 32)),
    "restore": falqon_fx.restore,
    "merge": falqon_fx.merge_and_unload,
    "adapters": falqon_fx.adapters,
    "weight": lambda m: m.get_submodule(SITES[0]).base_layer.weight,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("ema", [ema_of_all, ema_through_data, ema_rounded])
def test_an_average_of_the_base_is_an_error_and_never_used(ema, use):
    average = ema(prepared_mlp())
    with pytest.raises(FalqonError, match="bytes of its FP8 base are not those") as caught:
        USES[use](average)
    site = "a prepared layer" if use == "another backend" else SITES[0]
    assert caught.value.site == site
    assert "Average the trained parameters alone" in caught.value.remedy


def test_an_average_of_a_state_dict_does_not_load():
    model = prepared_mlp()
    average = {name: 0.9 * t + 0.1 * t for name, t in model.state_dict().items()}
    before = parameters(model)
    with pytest.raises(FalqonError, match=r"torch\.uint8.*has torch\.float32") as caught:
        model.load_state_dict(average)
    assert caught.value.site == SITES[0]
    assert "Average or cast the trained parameters alone" in caught.value.remedy
    base = [name for name in before if "base_layer" in name]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in base)


def test_an_average_of_the_trained_parameters_is_right():
    """The remedy of the errors above. Each of three steps rounds twice to get each product and once
    for the sum: at most 12 roundings of the largest value that a step had.
    """
    model = prepared_mlp()
    average = copy.deepcopy(model)
    exact = {n: p.double() for n, p in parameters(model).items() if "lora_" in n}
    largest = {name: value.abs() for name, value in exact.items()}
    for step in range(3):
        move(model, step)
        with torch.no_grad():
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                if theirs.requires_grad:
                    mine.mul_(0.9).add_(theirs, alpha=0.1)
        for name in exact:
            new = model.get_parameter(name).detach().double()
            exact[name] = 0.9 * exact[name] + 0.1 * new
            largest[name] = largest[name].maximum(exact[name].abs() + new.abs())
    assert same_states(model, average)
    for name, value in exact.items():
        assert_within(average.get_parameter(name), value, gamma(12) * largest[name])
    x = randn(3, 32)
    assert torch.equal(average(x), falqon_fx.restore(copy.deepcopy(average))(x))


# -- restore ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@GRANULARITY
@SCALE
def test_restore_gives_plain_base_weights(dtype, granularity, scale):
    """dq(W), rounded to the base's dtype: the product of code and scale rounds to
    float32 before.
    """
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    bias, b, original = layer.base_layer.bias, lora_b(model)[0], layer.base_layer.weight.detach()
    config = FalqonConfig(granularity=granularity, scale=scale)
    falqon_fx.prepare(model, config, progress=False)
    (state,) = falqon_fx.adapters(model).values()
    fill_b(model, 0.05, seed=1)
    falqon_fx.restore(model)
    assert type(layer.base_layer) is nn.Linear
    weight = layer.base_layer.weight
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    assert layer.base_layer.bias is bias
    assert lora_b(model)[0] is b
    assert torch.equal(weight, (state.weight.float() * state.scale).to(dtype))
    off = fp8_cast_bound(original, state.scale, E4M3)
    assert_within(weight, original, rounded_bound(original, off, dtype))
    assert not falqon_fx.adapters(model)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_restore_with_update_rows_takes_the_adapter_out(dtype):
    """base := dq(W) - s·applied·dq(A), rounded to the base dtype, after B moved and was written."""
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    original = layer.base_layer.weight.detach()
    falqon_fx.prepare(freeze_a(model), FalqonConfig(update="rows", topk="all"), progress=False)
    start = next(iter(falqon_fx.adapters(model).values()))
    first = base_off(start, original)
    fill_b(model, 0.05, seed=1)
    falqon_fx.flush(model)
    (state,) = falqon_fx.adapters(model).values()
    merged = dequantized(state)
    adapter = state.scaling * state.applied.double()
    exact = merged[:48] - adapter @ merged[48:]
    off = gamma(state.rank + 4) * (merged[:48].abs() + adapter.abs() @ merged[48:].abs())
    falqon_fx.restore(model)
    assert type(layer.base_layer) is nn.Linear
    weight = layer.base_layer.weight
    assert (weight.dtype, weight.requires_grad) == (dtype, False)
    Approx(exact, rounded_bound(exact, off, dtype)).assert_holds(weight.detach())
    # One cast at the start, one stochastic write (less than a gap: |x|/8 or a subnormal's).
    scale = state.scale.double().expand(52, 1)[:48]
    write = fp8_stochastic_bound(merged[:48], scale, E4M3)
    total = rounded_bound(original, first + write + 2 * off, dtype)
    Approx(original.double(), total).assert_holds(weight.detach())


@UPDATES
def test_restore_keeps_the_result_and_the_adapter_apart(config):
    model = prepared_mlp(config)
    x = randn(3, 32)
    before = model(x)
    with model.disable_adapter():
        base_before = model(x)
    assert falqon_fx.restore(model) is model
    assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), base_before)


def test_restore_leaves_unprepared_layers_alone_and_a_second_cast_changes_nothing():
    """What lies on the FP8 grid once stays where it is: also at the scale of its own amax, which
    may be one power of two smaller.
    """
    model = tiny_mlp()
    weights = parameters(model)
    falqon_fx.restore(model)
    assert unchanged(model, weights)
    falqon_fx.prepare(model, progress=False)
    once = [state.base() for state in falqon_fx.adapters(model).values()]
    falqon_fx.restore(model)
    report = falqon_fx.prepare(model, progress=False)
    assert list(report.prepared) == SITES
    twice = [state.base() for state in falqon_fx.adapters(model).values()]
    assert all(map(torch.equal, once, twice))


def test_restore_gives_frozen_layers_without_an_adapter_too():
    model = smollm_layer()
    before = {n: m.weight.detach() for n, m in model.named_modules() if type(m) is nn.Linear}
    report = falqon_fx.prepare(model, progress=False)
    falqon_fx.restore(model)
    for path in report.frozen:
        layer = model.get_submodule(path)
        assert type(layer) is nn.Linear
        weight = layer.weight.detach()
        assert (weight.dtype, weight.requires_grad) == (BF16, False)
        amax = before[path].double().abs().amax(1, keepdim=True)
        off = fp8_cast_bound(before[path], 2 * amax / 448, E4M3)  # a power of two is below that
        assert_within(weight, before[path], off)


# -- adapters and flush ----------------------------------------------------------------------------


def test_adapters_takes_the_module_or_its_compiled_wrapper():
    model = prepared_mlp()
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    assert list(falqon_fx.adapters(model)) == list(falqon_fx.adapters(compiled)) == SITES
    state = falqon_fx.adapters(model)[SITES[0]]
    assert (state.weight.shape, state.weight.dtype) == ((48, 32), E4M3)
    assert (state.scale.shape, state.scale.dtype) == ((48, 1), F32)
    layer = model.get_submodule(SITES[0])
    ((a, b, scaling),) = state.adapters
    assert (a is layer.lora_A.default.weight, b is layer.lora_B.default.weight) == (True, True)
    assert scaling == layer.scaling["default"]


def test_merged_is_the_base_with_the_active_adapters_added():
    """In float32, in the order of the adapters: r products, the scaling and the sum round."""
    model = tiny_mlp()
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"]))
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    for names in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(names)
        for path, state in falqon_fx.adapters(model).items():
            layer, exact = model.get_submodule(path), state.base().double()
            assert [s for _, _, s in state.adapters] == [layer.scaling[n] for n in names]
            largest = exact.abs()
            for name in names:
                a, b = (getattr(layer, p)[name].weight.detach().double() for p in PARTS)
                exact = exact + layer.scaling[name] * b @ a
                largest = largest + layer.scaling[name] * b.abs() @ a.abs()
            assert_within(state.merged(), exact, gamma(4 + 2 + len(names)) * largest)


PARTS = ("lora_A", "lora_B")


@UPDATES
def test_adapters_of_an_unprepared_model_appear_with_the_first_call(config):
    model = freeze_a(tiny_mlp())
    assert falqon_fx.adapters(model) == {}
    options = {"inner": "eager", "update": config.update}
    compiled = torch.compile(model, backend="falqon", options=options)
    compiled(randn(3, 32))
    assert sorted(falqon_fx.adapters(compiled)) == SITES
    if config.update == "rows":
        falqon_fx.restore(compiled)
        assert falqon_fx.adapters(model) == {}


def test_adapters_of_layers_that_are_not_pefts_follow_the_scaling_of_the_last_call():
    model, x = Relu(), randn(3, 32)
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    for scaling in (2.0, 3.0, 2.0):  # the last time a graph is found again
        model.up.scaling = scaling
        compiled(x)
        found = falqon_fx.adapters(model)
        assert list(found) == ["up", "down"]
        for path, state in found.items():
            layer = model.get_submodule(path)
            ((a, b, s),) = state.adapters
            assert (a is layer.lora_A.weight, b is layer.lora_B.weight) == (True, True)
            assert s == layer.scaling


@pytest.mark.parametrize("init", ["keep", "svd"])
def test_parameters_that_share_one_flat_buffer_are_told_apart(init):
    """As optimizers that flatten them leave them: views of one memory."""
    model, x = Relu(), randn(3, 32)
    apart = copy.deepcopy(model)
    for part in ("base_layer", "lora_A", "lora_B"):
        mine = [p for name, p in model.named_parameters() if part in name]
        flat = torch.cat([p.detach().flatten() for p in mine])
        for parameter, view in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
            parameter.data = view.view(parameter.shape)
    results = []
    for each in (model, apart):
        options = {"inner": "eager", "init": init}
        results.append(torch.compile(each, backend="falqon", options=options)(x))
    assert torch.equal(*results)
    found, wanted = falqon_fx.adapters(model), falqon_fx.adapters(apart)
    assert list(found) == list(wanted) == ["up", "down"]
    for path, state in found.items():
        assert torch.equal(state.base(), wanted[path].base())
        assert torch.equal(state.merged(), wanted[path].merged())
        assert state.adapters[0][0] is model.get_submodule(path).lora_A.weight
        assert torch.equal(state.adapters[0][0], apart.get_submodule(path).lora_A.weight)
    report = falqon_fx.prepare(model, progress=False)  # they are not tied either
    assert list(report.prepared) == ["up.base_layer", "down.base_layer"]
    assert torch.equal(torch.compile(model, backend="falqon", options=options)(x), results[0])


def test_adapters_are_live_and_their_base_is_constant():
    model = prepared_mlp()
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager"})
    state = falqon_fx.adapters(model)[SITES[0]]
    before, merged = state.base(), state.merged()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        compiled(randn(3, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(state.base(), before)
    assert not torch.equal(state.merged(), merged)
    assert torch.equal(state.merged(), falqon_fx.adapters(model)[SITES[0]].merged())


def test_adapters_with_update_rows_are_live():
    """What `adapters` gives shares memory with the model that trains."""
    config = FalqonConfig(update="rows", inner="eager", topk=10)
    model = prepared_mlp(config)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    state = falqon_fx.adapters(model)[SITES[0]]
    compiled(randn(3, 32))
    assert not state.writes.any()
    fill_b(model, 0.1, seed=3)  # so that no row grows by more than four times
    compiled(randn(3, 32))
    assert int(state.writes.sum()) == 10


def test_flush_writes_all_sites_and_by_default_nothing():
    model = prepared_mlp(ROWS)
    fill_b(model, 0.2, seed=4)
    assert all(state.pending().any() for state in falqon_fx.adapters(model).values())
    falqon_fx.flush(model)
    for state, b in zip(falqon_fx.adapters(model).values(), lora_b(model), strict=True):
        assert torch.equal(state.applied, b)
        assert not state.pending().any()
        assert (state.writes == 1).all()
    model = prepared_mlp()
    fill_b(model, 0.2, seed=4)
    before = parameters(model)
    falqon_fx.flush(model)
    assert unchanged(model, before)


def test_the_progress_bar_is_shown_on_request_only(capsys):
    falqon_fx.prepare(tiny_mlp(), progress=False)
    assert capsys.readouterr() == ("", "")
