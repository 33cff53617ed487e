"""PEFT's model calls before and after compile, unprepared and prepared: what their documentation
promises, or an error that names the site and the remedy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from tests import tolerances as tol
from tests.emulation import emulate
from tests.models import fill_b, freeze_a, tiny_mlp, train
from tests.parameters import PREPARED_OR_NOT, each_pair, each_value

CONFIG = FalqonConfig(inner="eager")
ROWS = FalqonConfig(inner="eager", update="rows", rounding="nearest", topk=10)
SITES = ["base_model.model.0", "base_model.model.2"]
WHEN = pytest.mark.parametrize("when", ["before", "after"])
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


def made(prepared: bool = False, config: FalqonConfig = CONFIG, **lora: object) -> nn.Module:
    """An adapter that was trained before, always the same."""
    torch.manual_seed(0)
    model = tiny_mlp(**lora)
    fill_b(model, 0.1)
    if config is ROWS:
        freeze_a(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return model


def compiled(model: nn.Module, config: FalqonConfig = CONFIG) -> Any:
    return torch.compile(model, backend="falqon", options=dict[str, Any](config=config))


def inputs() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


def afresh(model: nn.Module) -> Tensor:
    """What a copy of a model gives that nothing was compiled of before."""
    torch._dynamo.reset()
    return compiled(copy.deepcopy(model))(inputs()).detach()


def after(
    act: Callable[[nn.Module], object], prepared: bool, when: str
) -> tuple[Tensor, nn.Module, Tensor]:
    """What a compiled model gives after a call of PEFT's, and what it gave before it."""
    model = made(prepared)
    first = compiled(copy.deepcopy(model))(inputs()).detach()
    call = compiled(model)
    if when == "after":
        assert torch.equal(call(inputs()), first)
    act(model)
    return call(inputs()).detach(), model, first


def other_config(rank: int = 4) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])


def other(rank: int = 4) -> nn.Module:
    """The same base weights with another adapter."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    torch.manual_seed(9)
    model = peft.get_peft_model(base, other_config(rank))
    fill_b(model, 0.3, seed=9)
    return model


@pytest.fixture
def saved(tmp_path):
    other().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def load(path: Path, name: str) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        model.load_adapter(path, name)
        model.set_adapter(name)

    return act


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


# -- the adapter stays as it is --------------------------------------------------------------------


@WHEN
@PREPARED
def test_disable_adapter_gives_the_fp8_base_and_comes_back(prepared, when):
    model = made(prepared)
    call = compiled(model)
    first = call(inputs()) if when == "after" else None
    with model.disable_adapter():
        disabled = call(inputs())
    last = call(inputs())
    assert first is None or torch.equal(first, last)
    twin = emulate(made(), falqon_fx.adapters(model))
    assert torch.equal(last, twin(inputs()))
    with twin.disable_adapter():
        assert torch.equal(disabled, twin(inputs()))


@PREPARED
def test_the_reference_model_is_the_same_bit_for_bit_from_first_to_last_step(prepared):
    """As DPO has it: the policy with its adapter disabled."""
    model = made(prepared)
    call, optimizer, seen = compiled(model), trained(model), []
    for _ in range(4):
        with model.disable_adapter(), torch.no_grad():
            seen.append(call(inputs()))
        train(call, optimizer, inputs(), steps=1)
    assert all(torch.equal(seen[0], result) for result in seen)


@WHEN
@PREPARED
def test_an_added_adapter_changes_nothing_until_it_is_active(prepared, when):
    found, model, first = after(lambda m: m.add_adapter("other", other_config()), prepared, when)
    assert torch.equal(found, first)
    assert list(falqon_fx.adapters(model)) == SITES


@PREPARED
def test_save_pretrained_after_training_writes_the_trained_adapter(prepared, tmp_path):
    model = made(prepared)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    train(compiled(model), trained(model), inputs(), steps=3)
    assert all(not torch.equal(model.get_parameter(n), p) for n, p in before.items())
    model.save_pretrained(tmp_path)
    loaded = other()
    loaded.load_adapter(tmp_path, "back")
    for path in SITES:
        for part in ("lora_A", "lora_B"):
            layers = (getattr(m.get_submodule(path), part) for m in (model, loaded))
            assert torch.equal(*(x[n].weight for x, n in zip(layers, ("default", "back"))))


# -- scalings --------------------------------------------------------------------------------------


def each_layer(call: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        for path in SITES:
            call(model.get_submodule(path))

    return act


SCALINGS: dict[str, Callable[[nn.Module], object]] = {
    "scale_layer": each_layer(lambda layer: layer.scale_layer(0.5)),
    "set_scale": each_layer(lambda layer: layer.set_scale("default", 3.0)),
}


@each_pair(act=list(SCALINGS), when=["before", "after"], prepared=PREPARED_OR_NOT)
def test_another_scaling_is_used_on_the_same_base(act, when, prepared):
    """And back: `unscale_layer`."""
    model = made(prepared)
    call = compiled(model)
    first = call(inputs())
    made_at_first = [state.weight.data_ptr() for state in falqon_fx.adapters(model).values()]
    if when == "before":
        torch._dynamo.reset()
    SCALINGS[act](model)
    found = call(inputs())
    states = falqon_fx.adapters(model)
    assert [state.weight.data_ptr() for state in states.values()] == made_at_first
    wanted = [model.get_submodule(path).scaling["default"] for path in SITES]
    assert [s for state in states.values() for *_, s in state.adapters] == wanted
    assert torch.equal(found, afresh(model))
    if act == "scale_layer":
        each_layer(lambda layer: layer.unscale_layer())(model)
        assert torch.equal(call(inputs()), first)


# -- another adapter -------------------------------------------------------------------------------


def activate(model: nn.Module, rank: int = 4) -> None:
    """Add another adapter and switch to it, without a file."""
    model.add_adapter("other", other_config(rank))
    model.set_adapter("other")
    source = dict(other(rank).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(source[name.replace(".other.", ".default.")])


def activate_of_rank_3(model: nn.Module) -> None:
    activate(model, rank=3)


def replace(model: nn.Module) -> None:
    activate(model)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


@each_value(
    act=[activate, activate_of_rank_3, replace],
    when=["before", "after"],
    prepared=PREPARED_OR_NOT,
)
def test_another_adapter_is_used_on_the_same_base(act, when, prepared):
    found, model, first = after(act, prepared=prepared, when=when)
    rank = 3 if act is activate_of_rank_3 else 4
    assert torch.equal(found, afresh(other(rank)))
    assert not torch.equal(found, first)


@each_pair(
    name=["other", "default"],
    when=["before", "after"],
    prepared=PREPARED_OR_NOT,
)
def test_a_loaded_adapter_is_used(saved, name, when, prepared):
    """Under a name of its own, or over the adapter that was active."""
    found, _, first = after(load(saved, name), prepared=prepared, when=when)
    assert torch.equal(found, afresh(other()))
    assert not torch.equal(found, first)


@WHEN
@PREPARED
def test_two_active_adapters_are_both_used(when, prepared):
    def both(model: nn.Module) -> None:
        activate(model, rank=3)
        model.base_model.set_adapter(["default", "other"])

    found, model, first = after(both, prepared=prepared, when=when)
    plain = made()
    both(plain)
    twin = emulate(plain, falqon_fx.adapters(model))
    assert torch.equal(found, twin(inputs()))
    assert not torch.equal(found, first)
    assert all(len(state.adapters) == 2 for state in falqon_fx.adapters(model).values())


# -- mixed batches ---------------------------------------------------------------------------------


@each_value(inner=["eager", "aot_eager", "inductor"], prepared=PREPARED_OR_NOT)
def test_a_mixed_batch_has_the_adapter_of_each_sample(prepared, inner):
    """PEFT adds each sample's adapter to its rows of the base layer's result: in FP8 that of the
    base, the adapters as they were. So the original on exact operands, with the casts of the base
    layer in each, is what bounds it.
    """
    model = made(prepared)
    activate(model, rank=3)
    model.eval()
    plain = made()
    activate(plain, rank=3)
    plain.eval()
    names = ["default", "other", "__base__", "other", "default"]
    call = torch.compile(model, backend="falqon", options={"inner": inner})
    with torch.no_grad():
        found = call(inputs(), adapter_names=names)
        eager = model(inputs(), adapter_names=names)
        wanted = mixed(plain, inputs(), names)
        if prepared:
            restored = falqon_fx.restore(copy.deepcopy(model))
            assert torch.equal(eager, restored(inputs(), adapter_names=names))
    wanted.assert_holds(found)


def mixed(model: nn.Module, x: Tensor, names: list[str]) -> tol.Approx:
    """Layer by layer, with the bounds of one cast of x and one of W."""
    value = tol.Approx.exact(x)
    for path in SITES:
        layer = model.get_submodule(path)
        weight = tol.Approx.exact(layer.base_layer.weight.detach())
        y = (cast(value) @ cast(weight).t()).rounded(torch.float32)
        y = (y + tol.Approx.exact(layer.base_layer.bias.detach())).rounded(torch.float32)
        rows = []
        for i, name in enumerate(names):
            row = tol.Approx(y.value[i : i + 1], y.bound[i : i + 1])
            if name != "__base__":
                a, b = (tol.Approx.exact(m[name].weight) for m in (layer.lora_A, layer.lora_B))
                of_x = tol.Approx(value.value[i : i + 1], value.bound[i : i + 1])
                term = (of_x @ a.t()).rounded(torch.float32) @ b.t()
                factor = tol.Approx.exact(torch.tensor(layer.scaling[name]))
                term = (term.rounded(torch.float32) * factor).rounded(torch.float32)
                row = (row + term).rounded(torch.float32)
            rows.append(row)
        value = tol.Approx(
            torch.cat([row.value for row in rows]), torch.cat([row.bound for row in rows])
        )
        if path == SITES[0]:  # ReLU moves no two values further apart
            value = tol.Approx(value.value.relu(), value.bound)
    return value


def cast(a: tol.Approx) -> tol.Approx:
    """A row at a time to E4M3; a scale of a power of two is below 2·amax/448."""
    e4m3 = torch.float8_e4m3fn
    scale = 2 * a.largest.amax(1, keepdim=True) / torch.finfo(e4m3).max
    return tol.Approx(a.value, a.bound + tol.fp8_cast_bound(a.largest, scale, e4m3))


# -- DoRA ------------------------------------------------------------------------------------------


def dora_parts(layer: nn.Module, x: tol.Approx) -> tuple[tol.Approx, tol.Approx, tol.Approx]:
    """Of a DoRA layer on plain weights: x·Wᵀ with a cast of x, s·B·A·x, and magnitude / ‖W +
    s·B·A‖, a float32 sum of ``in`` squares of sums of r products.
    """
    f32, exact = torch.float32, tol.Approx.exact
    weight, magnitude = layer.base_layer.weight, layer.lora_magnitude_vector["default"].weight
    a, b = (exact(m["default"].weight.detach()) for m in (layer.lora_A, layer.lora_B))
    factor = exact(torch.tensor(layer.scaling["default"]))
    base = (cast(x) @ exact(weight.detach()).t()).rounded(f32)
    lora = ((x @ a.t()).rounded(f32) @ b.t()).rounded(f32)
    delta = layer.get_delta_weight("default").detach().double()
    ratio = magnitude.detach().double() / (weight.detach().double() + delta).norm(dim=1)
    return base, (lora * factor).rounded(f32), tol.Approx(ratio, tol.gamma(2 * 64) * ratio.abs())


def dora(layer: nn.Module, x: tol.Approx) -> tol.Approx:
    """y + ((ratio - 1)·(y - bias) + ratio·s·B·A·x) for y = x·Wᵀ + bias, as PEFT computes it."""
    f32, bias = torch.float32, tol.Approx.exact(layer.base_layer.bias.detach())
    base, lora, ratio = dora_parts(layer, x)
    y = (base + bias).rounded(f32)
    apart = (y + tol.Approx(-bias.value, bias.bound)).rounded(f32)
    less = tol.Approx(ratio.value - 1, ratio.bound).rounded(f32)
    added = ((less * apart).rounded(f32) + (ratio * lora).rounded(f32, f32)).rounded(f32)
    return (y + added).rounded(f32)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_the_base_of_dora_runs_in_fp8_behind_its_norm(inner):
    """DoRA reads the base layer's weight for its norm, and rescales the layer's result: against the
    original on the restored weights, with a cast of x before the base.
    """
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(64, 96)),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True),
    )
    fill_b(model, 0.1)
    report = falqon_fx.prepare(model, CONFIG, progress=False)
    assert list(report.prepared) == ["base_model.model.0"]
    layer = falqon_fx.restore(copy.deepcopy(model)).base_model.model[0]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    call = torch.compile(model, backend="falqon", options={"inner": inner})
    with pytest.warns(UserWarning, match="no DoRA or other variant"):
        found = call(x)
    expected = layer(x)
    exact = dora(layer, tol.Approx.exact(x))
    exact.assert_holds(found.detach())
    assert not torch.equal(found, expected)  # FP8 had a part in it

    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(4))
    found.backward(grad)
    expected.backward(grad)
    base, lora, ratio = dora_parts(layer, tol.Approx.exact(x))
    a, b = (m["default"].weight.detach().double().abs() for m in (layer.lora_A, layer.lora_B))
    through = grad.double().abs() * ratio.largest * layer.scaling["default"]
    norm = layer.lora_magnitude_vector["default"].weight.detach().double() / ratio.value
    limits = {  # float32 on both sides, but for the base's cast of x in dL/dmagnitude
        "lora_A": 2 * tol.gamma(96 + 5 + 8) * (through @ b).t() @ x.double().abs(),
        "lora_B": 2 * tol.gamma(64 + 5 + 8) * through.t() @ (x.double().abs() @ a.t()),
        "lora_magnitude_vector": (grad.double().abs() * (base.bound + lora.bound)).sum(0) / norm
        + 2
        * tol.gamma(64 + 8)
        * (grad.double().abs() * (base.largest + lora.largest)).sum(0)
        / norm,
    }
    names = {p: n for n, p in layer.named_parameters()}
    ours, theirs = model.base_model.model[0], layer
    for name, limit in limits.items():
        (path,) = (n for p, n in names.items() if name in n)
        tol.assert_within(ours.get_parameter(path).grad, theirs.get_parameter(path).grad, limit)


def test_a_dora_model_trains_in_fp8_as_on_its_restored_weights():
    """In each step the loss is that of the original with the same parameters, to what the casts of
    the inputs of its two layers move the output by: |Δ mean(r²)| <= mean(2|r||e| + e²).
    """
    model, x = made(True, use_dora=True), inputs()
    call, optimizer, losses = compiled(model), trained(model), []
    for _ in range(5):
        plain = falqon_fx.restore(copy.deepcopy(model))
        first, second = (plain.get_submodule(path) for path in SITES)
        hidden = dora(first, tol.Approx.exact(x))
        result = dora(second, tol.Approx(hidden.value.relu(), hidden.bound))
        rest = (result.value - x.double() / 2).abs()
        bound = (2 * rest * result.bound + result.bound.square()).mean()
        (loss,) = train(call, optimizer, x, steps=1)
        assert abs(loss - rest.square().mean()) <= bound + tol.gamma(5 * 32 + 4) * loss
        losses.append(loss)
    assert losses[-1] < losses[0]


# -- merging and unloading -------------------------------------------------------------------------


def merged_weights(model: nn.Module) -> list[Tensor]:
    """W + s·B·A as PEFT computes it, from a model whose base layers are plain."""
    result = []
    for path in SITES:
        layer = model.get_submodule(path)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        result.append((layer.base_layer.weight + delta * layer.scaling["default"]).detach())
    return result


def plain_weights(model: Any) -> list[Tensor]:
    """The weights of an unloaded model."""
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    return [model[0].weight.detach(), model[2].weight.detach()]


@pytest.mark.parametrize("safe", [False, True])
@WHEN
def test_merge_and_unload_adds_the_trained_adapter_to_the_base_weights(safe, when):
    model = made()
    if when == "after":
        train(compiled(model), trained(model), inputs(), steps=3)
    expected = merged_weights(model)
    unloaded = model.merge_and_unload(safe_merge=safe)
    assert all(map(torch.equal, plain_weights(unloaded), expected))
    assert torch.equal(compiled(unloaded)(inputs()), unloaded(inputs()))


@WHEN
def test_unload_gives_the_base_model(when):
    model = made()
    expected = [model.get_submodule(path).base_layer.weight.clone() for path in SITES]
    if when == "after":
        train(compiled(model), trained(model), inputs(), steps=3)
    assert all(map(torch.equal, plain_weights(model.unload()), expected))


@WHEN
def test_merge_adapter_and_back(when):
    """A merged base weight is another one, so its FP8 form is made anew."""
    found, model, first = after(lambda m: m.merge_adapter(), False, when)
    assert torch.equal(found, afresh(model))
    call = compiled(model)
    model.unmerge_adapter()  # W + ΔW - ΔW: W but for its rounding
    back = call(inputs())
    assert torch.equal(back, afresh(model))


@pytest.mark.parametrize("config", [CONFIG, ROWS], ids=["adapter", "rows"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_a_prepared_model_is_an_error_whose_remedy_works(call, safe, config):
    """PEFT writes into a weight that is only a copy here: the write would be lost."""
    model = made(True, config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FalqonError, match="FP8 in the place of its base weight") as no:
        getattr(model, call)(safe_merge=safe)
    assert no.value.site == SITES[0]
    assert "falqon_fx.restore(model)" in no.value.remedy
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    falqon_fx.restore(model)
    expected = merged_weights(model)
    getattr(model, call)(safe_merge=safe)
    unloaded = model.unload()
    assert all(map(torch.equal, plain_weights(unloaded), expected))


def test_an_initialization_that_writes_the_base_weight_is_refused_on_a_prepared_model():
    config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights="pissa")
    with pytest.raises(FalqonError, match=r"base_model\.model\.0: prepare"):
        made(prepared=True).add_adapter("other", config)


@pytest.mark.parametrize("through", ["weight", "data", "transpose", "slice"])
def test_writes_into_a_prepared_weight_are_errors_and_copies_are_free(through):
    layer = made(prepared=True).get_submodule(SITES[0]).base_layer
    views = {
        "weight": lambda w: w,
        "data": lambda w: w.data,
        "transpose": lambda w: w.t(),
        "slice": lambda w: w[:1],
    }
    view = views[through](layer.weight)
    for write in (
        lambda: view.add_(1),
        lambda: view.__iadd__(1),
        lambda: view.__setitem__(0, 1.0),
        lambda: view.copy_(view),
    ):
        with pytest.raises(FalqonError, match="would be lost"):
            write()
    own = view.float().clone()
    own += 1
    assert type(own) is Tensor
    assert torch.equal(own, view + 1)


def test_unload_of_a_prepared_model_leaves_fp8_layers_which_restore_makes_plain():
    model = made(prepared=True)
    restored = falqon_fx.restore(copy.deepcopy(model))
    call = compiled(model)
    with restored.disable_adapter(), model.disable_adapter():
        eager, base = restored(inputs()), call(inputs())
    unloaded = model.unload()
    assert isinstance(unloaded[0], Fp8Linear)
    assert torch.equal(unloaded(inputs()), eager)
    assert torch.equal(compiled(unloaded)(inputs()), base)
    plain = [restored.get_submodule(path).base_layer.weight for path in SITES]
    assert all(map(torch.equal, plain_weights(falqon_fx.restore(unloaded)), plain))


@pytest.mark.parametrize("config", [CONFIG, ROWS], ids=["adapter", "rows"])
def test_a_merged_adapter_is_not_prepared(config):
    model = made(config=config)
    model.merge_adapter()
    report = falqon_fx.prepare(model, config, progress=False)
    assert report.prepared == ()
    assert all("unmerge_adapter()" in reason for reason in report.skipped.values())
    model.unmerge_adapter()
    assert list(falqon_fx.prepare(model, config, progress=False).prepared) == SITES


# -- update="rows" ---------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [activate, load])
@WHEN
def test_with_update_rows_another_adapter_gets_a_weight_of_its_own(act, when, saved):
    act = load(saved, "other") if act is load else activate
    model = made(config=ROWS)
    call = compiled(model, ROWS)
    if when == "after":
        call(inputs())
    act(model)
    freeze_a(model)
    found = call(inputs())
    torch._dynamo.reset()
    assert torch.equal(found, compiled(freeze_a(other()), ROWS)(inputs()))


@pytest.mark.parametrize("act", ["set_adapter", "delete_adapter", "load_adapter", "overwritten"])
@WHEN
def test_with_update_rows_another_adapter_on_a_prepared_model_is_an_error_whose_remedy_works(
    saved, act, when
):
    """Eagerly it is right all the same: the base layer stands apart from the adapter."""
    acts = {
        "set_adapter": activate,
        "delete_adapter": replace,
        "load_adapter": load(saved, "other"),
        "overwritten": load(saved, "default"),
    }
    model = made(True, ROWS)
    call, plain = compiled(model, ROWS), falqon_fx.restore(made(True, ROWS))
    if when == "after":
        call(inputs())
    acts[act](model)
    freeze_a(model)
    with pytest.raises(FalqonError) as no:
        call(inputs())
    assert no.value.site == SITES[0]
    assert "its lora_A is not the one that prepare() merged" in str(no.value)
    assert "Call falqon_fx.restore(model)" in no.value.remedy
    acts[act](plain)
    freeze_a(plain)
    assert torch.equal(model(inputs()), plain(inputs()))

    falqon_fx.restore(model)
    falqon_fx.prepare(model, ROWS, progress=False)
    assert torch.equal(call(inputs()), compiled(plain, ROWS)(inputs()))


def test_with_update_rows_an_adapter_of_another_rank_on_a_prepared_model_runs_unmerged():
    model = made(True, ROWS)
    activate(model, rank=3)
    freeze_a(model)
    with pytest.warns(UserWarning, match=r"prepare\(\) merged an adapter of another rank") as seen:
        found = compiled(model, ROWS)(inputs())
    assert "Call falqon_fx.restore(model)" in str(seen[0].message)
    assert torch.equal(found, model(inputs()))


def test_with_update_rows_unload_of_a_prepared_model_leaves_its_layers():
    model = made(True, ROWS)
    expected = falqon_fx.restore(copy.deepcopy(model))
    with expected.disable_adapter():
        result = expected(inputs())
    unloaded = model.unload()
    assert isinstance(unloaded[0], MergedBaseLinear)
    assert torch.equal(unloaded(inputs()), result)
    assert torch.equal(compiled(unloaded, ROWS)(inputs()), result)
    plain = [expected.get_submodule(path).base_layer.weight for path in SITES]
    assert all(map(torch.equal, plain_weights(falqon_fx.restore(unloaded)), plain))
