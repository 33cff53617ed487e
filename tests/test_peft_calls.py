"""PEFT's model calls before and after compile, unprepared and prepared: what their documentation
promises, or an error that names the site and the remedy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.prepare import MergedBaseLinear
from tests.models import fill_b, lora_b, tiny_mlp, train

CONFIG = FalqonConfig(inner="eager", rounding="nearest", topk=10)
SITES = ["base_model.model.0", "base_model.model.2"]
WHEN = pytest.mark.parametrize("when", ["before", "after"])
PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def made(prepared: bool = False) -> nn.Module:
    """An adapter that was trained before, always the same."""
    torch.manual_seed(0)
    model = tiny_mlp()
    fill_b(model, 0.1)
    if prepared:
        falqon_fx.prepare(model, CONFIG, progress=False)
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="falqon", options={"config": CONFIG})


def inputs() -> Tensor:
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(3))


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


# -- the adapter stays as it is --------------------------------------------------------------------


@WHEN
@PREPARED
def test_disable_adapter_gives_the_base_model_and_comes_back(prepared, when):
    model = made(prepared)
    expected = copy.deepcopy(model)
    call = compiled(model)
    if when == "after":
        call(inputs())
    with model.disable_adapter(), expected.disable_adapter():
        assert torch.equal(call(inputs()), expected(inputs()))
    assert torch.equal(call(inputs()), compiled(expected)(inputs()))


@WHEN
@PREPARED
def test_an_added_adapter_changes_nothing_until_it_is_active(prepared, when):
    found, model, first = after(lambda m: m.add_adapter("other", other_config()), prepared, when)
    assert torch.equal(found, first)
    assert list(falqon_fx.adapters(model)) == SITES


@PREPARED
def test_save_pretrained_after_training_writes_the_trained_adapter(prepared, tmp_path):
    model = made(prepared)
    optimizer = torch.optim.AdamW(lora_b(model), lr=1e-2)
    train(compiled(model), optimizer, inputs(), steps=3)
    model.save_pretrained(tmp_path)
    loaded = other()
    loaded.load_adapter(tmp_path, "back")
    for path in SITES:
        for part in ("lora_A", "lora_B"):
            layers = (getattr(m.get_submodule(path), part) for m in (model, loaded))
            assert torch.equal(*(x[n].weight for x, n in zip(layers, ("default", "back"))))


# -- another adapter -------------------------------------------------------------------------------


def activate(model: nn.Module) -> None:
    """Add another adapter and switch to it, without a file."""
    model.add_adapter("other", other_config())
    model.set_adapter("other")
    source = dict(other().named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.copy_(source[name.replace(".other.", ".default.")])


def replace(model: nn.Module) -> None:
    activate(model)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]


@pytest.mark.parametrize("act", [activate, replace], ids=["set_adapter", "delete_adapter"])
@WHEN
def test_another_adapter_gets_a_state_of_its_own(act, when):
    found, model, _ = after(act, prepared=False, when=when)
    assert torch.equal(found, compiled(other())(inputs()))


@pytest.mark.parametrize("name", ["other", "default"])
@WHEN
def test_a_loaded_adapter_is_used(saved, name, when):
    """Under a name of its own, or over the adapter that was active."""
    found, _, first = after(load(saved, name), prepared=False, when=when)
    assert torch.equal(found, compiled(other())(inputs()))
    assert not torch.equal(found, first)


@pytest.mark.parametrize("act", ["set_adapter", "delete_adapter", "load_adapter", "overwritten"])
@WHEN
def test_another_adapter_on_a_prepared_model_is_an_error_whose_remedy_works(saved, act, when):
    """Eagerly it is right all the same: the base layer stands apart from the adapter."""
    acts = {
        "set_adapter": activate,
        "delete_adapter": replace,
        "load_adapter": load(saved, "other"),
        "overwritten": load(saved, "default"),
    }
    model = made(prepared=True)
    call, plain = compiled(model), falqon_fx.restore(made(prepared=True))
    if when == "after":
        call(inputs())
    acts[act](model)
    with pytest.raises(FalqonError) as no:
        call(inputs())
    assert no.value.site == SITES[0]
    assert "its lora_A is not the one that prepare() merged" in str(no.value)
    assert "Call falqon_fx.restore(model)" in no.value.remedy
    acts[act](plain)
    assert torch.equal(model(inputs()), plain(inputs()))

    falqon_fx.restore(model)
    falqon_fx.prepare(model, CONFIG, progress=False)
    assert torch.equal(call(inputs()), compiled(plain)(inputs()))


def test_an_adapter_of_another_rank_on_a_prepared_model_runs_unmerged_with_a_warning():
    def act(m: nn.Module) -> None:
        m.add_adapter("other", other_config(rank=3))
        m.set_adapter("other")

    model = made(prepared=True)
    act(model)
    fill_b(model, 0.2)
    with pytest.warns(UserWarning, match=r"prepare\(\) merged an adapter of another rank") as seen:
        found = compiled(model)(inputs())
    assert "Call falqon_fx.restore(model)" in str(seen[0].message)
    assert torch.equal(found, model(inputs()))


# -- merging and unloading -------------------------------------------------------------------------


def merged_weights(model: nn.Module) -> list[Tensor]:
    """W + s·B·A as PEFT computes it, from a model whose base layers are plain."""
    result = []
    for path in SITES:
        layer = model.get_submodule(path)
        delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        result.append((layer.base_layer.weight + delta * layer.scaling["default"]).detach())
    return result


def plain_weights(model: nn.Module) -> list[Tensor]:
    """The weights of an unloaded model."""
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    return [model[0].weight.detach(), model[2].weight.detach()]


@pytest.mark.parametrize("safe", [False, True])
@WHEN
def test_merge_and_unload_adds_the_trained_adapter_to_the_base_weights(safe, when):
    model = made()
    if when == "after":
        train(compiled(model), torch.optim.AdamW(lora_b(model), lr=1e-2), inputs(), steps=3)
    expected = merged_weights(model)
    unloaded = model.merge_and_unload(safe_merge=safe)
    assert all(map(torch.equal, plain_weights(unloaded), expected))
    with pytest.warns(UserWarning, match="no LoRA layer"):
        assert torch.equal(compiled(unloaded)(inputs()), unloaded(inputs()))


@WHEN
def test_unload_gives_the_base_model(when):
    model = made()
    expected = [model.get_submodule(path).base_layer.weight.clone() for path in SITES]
    if when == "after":
        train(compiled(model), torch.optim.AdamW(lora_b(model), lr=1e-2), inputs(), steps=3)
    assert all(map(torch.equal, plain_weights(model.unload()), expected))


@WHEN
def test_merge_adapter_and_back(when):
    found, model, first = after(lambda m: m.merge_adapter(), False, when)
    assert torch.equal(found, copy.deepcopy(model)(inputs()))
    call = compiled(model)
    model.unmerge_adapter()  # W + ΔW - ΔW: W but for its rounding
    back = call(inputs())
    torch._dynamo.reset()
    assert torch.equal(back, compiled(copy.deepcopy(model))(inputs()))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_a_prepared_model_is_an_error_whose_remedy_works(call, safe):
    """PEFT writes into a weight that is only a copy here: the write would be lost."""
    model = made(prepared=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(FalqonError, match=r"prepare\(\) has merged its base weight") as no:
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
    expected = falqon_fx.restore(copy.deepcopy(model))
    with expected.disable_adapter():
        result = expected(inputs())
    unloaded = model.unload()
    assert isinstance(unloaded[0], MergedBaseLinear)
    assert torch.equal(unloaded(inputs()), result)
    assert torch.equal(compiled(unloaded)(inputs()), result)
    plain = [expected.get_submodule(path).base_layer.weight for path in SITES]
    assert all(map(torch.equal, plain_weights(falqon_fx.restore(unloaded)), plain))


def test_a_merged_adapter_is_not_prepared():
    model = made()
    model.merge_adapter()
    report = falqon_fx.prepare(model, CONFIG, progress=False)
    assert report.prepared == ()
    assert all("unmerge_adapter()" in reason for reason in report.skipped.values())
    model.unmerge_adapter()
    assert list(falqon_fx.prepare(model, CONFIG, progress=False).prepared) == SITES
