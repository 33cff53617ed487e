"""`prepare`, `restore`, `adapters` and `flush` on PEFT models."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.numerics import E4M3
from falqon_fx.prepare import MergedBaseLinear
from tests.models import fill_b, lora_b, tiny_llama, tiny_mlp
from tests.sites import dequantized, randn, same, snapshot
from tests.tolerances import Approx, fp8_cast_bound, fp8_stochastic_bound, gamma, rounded_bound

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KEEP = FalqonConfig(init="keep")
SITES = ["base_model.model.0", "base_model.model.2"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def prepared_mlp(config: FalqonConfig = KEEP, b_size: float = 0.1, **lora: object) -> nn.Module:
    model = tiny_mlp(**lora)
    fill_b(model, b_size)
    falqon_fx.prepare(model, config, progress=False)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = dict(model.named_parameters())
    return after.keys() == before.keys() and all(
        torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before
    )


# -- eager use -------------------------------------------------------------------------------------


def base_off(state: falqon_fx.MergedAdapter, base: Tensor) -> Tensor:
    """|dq(W) - s·applied·dq(A) - base| of a state that was just made: the cast of the merged row,
    and float32 sums of r products when it is merged and when it is taken apart again.
    """
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


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_the_eager_forward_of_a_prepared_layer_is_right(granularity, bias):
    """Base alone within the FP8 casts, and with the adapter enabled s·B·A·x on top, unquantized."""
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(32, 48, bias=bias)), peft.LoraConfig(r=4, target_modules=["0"])
    )
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight.detach().clone()
    falqon_fx.prepare(model, FalqonConfig(granularity=granularity), progress=False)
    assert isinstance(layer.base_layer, MergedBaseLinear)
    (state,) = falqon_fx.adapters(model).values()
    x, base = randn(5, 32), Approx(weight.double(), base_off(state, weight))
    layer_output(layer, x, base, adapter=True).assert_holds(model(x).detach())
    with model.disable_adapter():
        layer_output(layer, x, base, adapter=False).assert_holds(model(x).detach())


def test_eager_gradients_reach_x_a_and_b_as_in_peft():
    """With the base weight that the prepared layer stands for, the gradients are PEFT's."""
    model = prepared_mlp()
    plain = falqon_fx.restore(copy.deepcopy(model))
    grads = []
    for candidate in (model, plain):
        x = randn(5, 32).requires_grad_()
        candidate(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in candidate.parameters() if p.requires_grad)])
    assert len(grads[0]) == 5
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_gives_its_dtype_as_a_plain_linear_does(dtype):
    model = prepared_mlp()
    with torch.autocast("cpu", dtype=dtype):
        assert model.base_model.model[0](randn(3, 32)).dtype == dtype


def test_a_prepared_llama_is_peft_on_base_weights_within_the_fp8_casts():
    """Bit for bit the model that `restore` gives, whose base weights are off by their casts."""
    model = tiny_llama().eval()
    fill_b(model)
    plain = copy.deepcopy(model)
    assert len(falqon_fx.prepare(model, KEEP, progress=False).prepared) == 14
    restored = falqon_fx.restore(copy.deepcopy(model))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, restored(tokens).logits)
        with model.disable_adapter(), restored.disable_adapter():
            assert torch.equal(model(tokens).logits, restored(tokens).logits)
    for path, state in falqon_fx.adapters(model).items():
        original = plain.get_submodule(path).base_layer.weight.detach()
        near = Approx(original.double(), base_off(state, original))
        near.assert_holds(restored.get_submodule(path).base_layer.weight.detach())


# -- the report ------------------------------------------------------------------------------------


def test_the_report_names_what_was_prepared():
    report = falqon_fx.prepare(tiny_mlp(), KEEP, progress=False)
    assert list(report.prepared) == SITES
    assert report.skipped == {}
    assert "2 layers prepared" in str(report)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_bytes_are_at_most_0_57_of_bf16_at_the_shapes_of_smollm(granularity):
    """FP8 + scales + applied, rank 16, at the four shapes of SmolLM2-135M (576 wide)."""
    shapes = {"q": (576, 576), "k": (576, 192), "up": (576, 1536), "down": (1536, 576)}
    model = nn.ModuleDict({n: nn.Linear(*s, bias=False, dtype=BF16) for n, s in shapes.items()})
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=list(shapes)))
    before = sum(2 * a * b for a, b in shapes.values())
    report = falqon_fx.prepare(model, FalqonConfig(granularity=granularity), progress=False)
    assert report.bytes_before == before
    held = sum(p.nbytes for m in model.modules() if isinstance(m, MergedBaseLinear)
               for p in m.parameters())  # fmt: skip
    assert report.bytes_after == held
    assert held <= 0.57 * before
    assert not any(p.dtype == BF16 and p.numel() > 1536 * 16 for p in model.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.up, self.head = nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.embed(x)))


def skipped(model: nn.Module, config: FalqonConfig = KEEP) -> dict[str, str]:
    before = parameters(model)
    report = falqon_fx.prepare(model, config, progress=False)
    assert report.prepared == ()
    assert unchanged(model, before)
    return report.skipped


def test_dora_is_skipped():
    reasons = skipped(tiny_mlp(use_dora=True))
    assert list(reasons) == SITES
    assert all("DoRA" in reason for reason in reasons.values())


def test_a_prepared_layer_is_not_prepared_again():
    reasons = skipped(prepared_mlp())
    assert all("prepared already" in reason for reason in reasons.values())
    assert list(reasons) == SITES


def test_convolutions_and_embeddings_are_skipped_or_not_seen():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Conv2d(3, 4, 1))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    reasons = skipped(model)
    assert "Conv2d" in reasons["base_model.model.1"]


def test_a_trained_base_weight_is_skipped():
    model = tiny_mlp()
    for name in ("0", "2"):
        model.base_model.model.get_submodule(name).base_layer.weight.requires_grad_()
    assert all("trained too" in reason for reason in skipped(model).values())


def test_two_active_adapters_are_skipped():
    model = tiny_mlp()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "second"])
    assert all("more than one adapter" in reason for reason in skipped(model).values())


def test_a_quantized_base_is_skipped():
    model = tiny_mlp()
    for name in ("0", "2"):
        base = model.base_model.model.get_submodule(name).base_layer
        base.weight = nn.Parameter(base.weight.detach().to(E4M3), requires_grad=False)
    report = falqon_fx.prepare(model, KEEP, progress=False)
    assert report.prepared == ()
    assert all("already quantized" in reason for reason in report.skipped.values())


def test_another_kind_of_base_layer_is_skipped():
    class Odd(nn.Linear):
        """A subclass may compute anything, as those of quantization libraries do."""

    model = tiny_mlp()
    for name in ("0", "2"):
        layer = model.base_model.model.get_submodule(name)
        odd = Odd(*reversed(layer.base_layer.weight.shape)).requires_grad_(False)
        layer.base_layer = odd
    assert all("is a Odd" in reason for reason in skipped(model).values())


def test_include_and_exclude_choose_the_layers():
    model = tiny_mlp()
    report = falqon_fx.prepare(model, FalqonConfig(exclude=("*.2",)), progress=False)
    assert list(report.prepared) == SITES[:1]
    assert "exclude=" in report.skipped[SITES[1]]


# -- errors change nothing -------------------------------------------------------------------------


def refused(model: nn.Module, config: FalqonConfig = KEEP) -> FalqonError:
    before = parameters(model)
    with pytest.raises(FalqonError) as caught:
        falqon_fx.prepare(model, config, progress=False)
    assert unchanged(model, before)
    assert not any(isinstance(module, MergedBaseLinear) for module in model.modules())
    return caught.value


def test_a_tied_weight_is_refused():
    model = peft.get_peft_model(Tied(), peft.LoraConfig(r=2, target_modules=["up", "head"]))
    error = refused(model)
    assert error.site == "base_model.model.head"
    assert "tied" in str(error)
    assert "embed" in str(error)
    assert "exclude=" in error.remedy
    report = falqon_fx.prepare(model, FalqonConfig(exclude=("*head",)), progress=False)
    assert list(report.prepared) == ["base_model.model.up"]  # the remedy works


@pytest.mark.parametrize("init", ["svd", "keep"])
@pytest.mark.parametrize(
    ("which", "bad"),
    [
        ("base_layer", float("nan")),
        ("base_layer", -float("inf")),
        ("base_layer", 1e5),
        ("lora_A.default", float("nan")),
        ("lora_B.default", float("inf")),
    ],
)
def test_bad_values_in_the_last_layer_change_no_layer_before_it(which, bad, init):
    """Not even lora_A of the first, which init="svd" overwrites."""
    model = tiny_mlp()
    with torch.no_grad():
        model.get_submodule(f"{SITES[1]}.{which}").weight[1, 2] = bad
    error = refused(model, FalqonConfig(init=init))
    assert error.site == SITES[1]
    assert "65536" in str(error) if bad == 1e5 else "NaN or Inf" in str(error)
    assert "exclude=" in error.remedy


def test_a_topk_above_the_rows_of_a_layer_is_refused():
    error = refused(tiny_mlp(), FalqonConfig(topk=40))  # 48 rows, then 32
    assert isinstance(error, FalqonConfigError)
    assert SITES[1] in str(error)
    assert '"all"' in str(error)


# -- the state travels with the module -------------------------------------------------------------


def states(model: nn.Module) -> list[list[Tensor]]:
    return [snapshot(state) for state in falqon_fx.adapters(model).values()]


def same_states(a: nn.Module, b: nn.Module) -> bool:
    return len(states(a)) == 2 and all(map(same, states(a), states(b)))


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_have_the_same_state_and_their_own(copied: Callable[[nn.Module], nn.Module]):
    model = prepared_mlp(FalqonConfig(topk="all"))
    other, x = copied(model), randn(3, 32)
    assert same_states(model, other)
    assert torch.equal(model(x), other(x))
    before = states(model)
    fill_b(other, 1.0, seed=5)
    falqon_fx.flush(other)
    assert all(map(same, states(model), before))
    assert not same_states(model, other)


def test_state_dict_round_trip(tmp_path):
    model, other = prepared_mlp(), prepared_mlp(b_size=0.0)
    assert not same_states(model, other)
    file = tmp_path / "model.safetensors"
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, file)
    missing = other.load_state_dict(load_file(file))
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert same_states(model, other)
    assert torch.equal(model(randn(3, 32)), other(randn(3, 32)))


def test_a_state_dict_holds_no_tensor_that_a_cast_could_hurt():
    """FP8 travels as uint8: `.to(bfloat16)` and DDP's broadcast leave it alone."""
    model = prepared_mlp()
    names = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {d for n, d in names.items() if n.endswith(".code")} == {torch.uint8}
    assert E4M3 not in names.values()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    assert not list(model.buffers())


@pytest.mark.parametrize("dtype", [BF16, F16, torch.float64])
def test_a_cast_of_the_model_keeps_the_state(dtype):
    model = prepared_mlp()
    before = states(model)
    model.to(dtype)
    assert all(map(same, states(model), before))
    assert model.base_model.model[0].base_layer.bias.dtype == dtype
    assert model(randn(3, 32).to(dtype)).dtype == dtype


def test_moving_to_another_device_keeps_dtypes():
    model = prepared_mlp().to("meta")
    base = model.base_model.model[0].base_layer
    assert base.code.device.type == "meta"
    assert (base.code.dtype, base.scale.dtype) == (torch.uint8, F32)


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


# -- restore ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_restore_gives_plain_base_weights(dtype, granularity):
    """base := dq(W) - s·applied·dq(A), rounded to the base dtype, after B moved and was written."""
    model = nn.Sequential(nn.Linear(32, 48, dtype=dtype))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    fill_b(model, 0.1)
    layer = model.base_model.model[0]
    bias, b, original = layer.base_layer.bias, lora_b(model)[0], layer.base_layer.weight.detach()
    falqon_fx.prepare(model, FalqonConfig(granularity=granularity, topk="all"), progress=False)
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
    assert layer.base_layer.bias is bias
    assert lora_b(model)[0] is b
    Approx(exact, rounded_bound(exact, off, dtype)).assert_holds(weight.detach())
    # One cast at the start, one stochastic write (less than a gap: |x|/8 or a subnormal's).
    scale = state.scale.double().expand(52, 1)[:48]
    write = fp8_stochastic_bound(merged[:48], scale, E4M3)
    total = rounded_bound(original, first + write + 2 * off, dtype)
    Approx(original.double(), total).assert_holds(weight.detach())
    assert not falqon_fx.adapters(model)


def test_restore_keeps_the_result_and_the_adapter_apart():
    model = prepared_mlp()
    x = randn(3, 32)
    before = model(x)
    with model.disable_adapter():
        base_before = model(x)
    assert falqon_fx.restore(model) is model
    assert torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), base_before)


def test_restore_leaves_unprepared_layers_alone_and_prepare_works_again():
    model = tiny_mlp()
    weights = parameters(model)
    falqon_fx.restore(model)
    assert unchanged(model, weights)
    falqon_fx.prepare(model, KEEP, progress=False)
    falqon_fx.restore(model)
    report = falqon_fx.prepare(model, KEEP, progress=False)
    assert list(report.prepared) == SITES


# -- adapters and flush ----------------------------------------------------------------------------


def test_adapters_takes_the_module_or_its_compiled_wrapper():
    model = prepared_mlp()
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager", "init": "keep"})
    assert list(falqon_fx.adapters(model)) == list(falqon_fx.adapters(compiled)) == SITES
    state = falqon_fx.adapters(model)[SITES[0]]
    assert (state.weight.shape, state.applied.shape) == ((52, 32), (48, 4))
    assert torch.equal(state.pending(), lora_b(model)[0].detach() - state.applied)


def test_adapters_of_an_unprepared_model_appear_with_the_first_call():
    torch._dynamo.reset()
    model = tiny_mlp()
    assert falqon_fx.adapters(model) == {}
    compiled = torch.compile(model, backend="falqon", options={"inner": "eager", "topk": 10})
    compiled(randn(3, 32))
    assert sorted(falqon_fx.adapters(compiled)) == SITES
    falqon_fx.restore(compiled)
    assert falqon_fx.adapters(model) == {}


def test_adapters_are_live():
    """What `adapters` gives shares memory with the model that trains."""
    torch._dynamo.reset()
    config = FalqonConfig(init="keep", inner="eager", topk=10)
    model = prepared_mlp(config)
    compiled = torch.compile(model, backend="falqon", options={"config": config})
    state = falqon_fx.adapters(model)[SITES[0]]
    compiled(randn(3, 32))
    assert not state.writes.any()
    fill_b(model, 1.0, seed=3)
    compiled(randn(3, 32))
    assert int(state.writes.sum()) == 10


def test_flush_writes_all_sites():
    model = prepared_mlp()
    fill_b(model, 0.2, seed=4)
    assert all(state.pending().any() for state in falqon_fx.adapters(model).values())
    falqon_fx.flush(model)
    for state, b in zip(falqon_fx.adapters(model).values(), lora_b(model), strict=True):
        assert torch.equal(state.applied, b)
        assert not state.pending().any()
        assert (state.writes == 1).all()


def test_the_progress_bar_is_shown_on_request_only(capsys):
    falqon_fx.prepare(tiny_mlp(), KEEP, progress=False)
    assert capsys.readouterr() == ("", "")
