"""Where what a calibration buys back lives, and what is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.model import fp8_linear
from falqon_fx.model import prepare as prepare_module
from falqon_fx.model.fp8_linear import Fp8Linear
from tests.calibrated import CHANNELS, EAGER, IN, MIDDLE, OUT, RANK, adapted, calibrated, inputs
from tests.exports import IDS, assert_one_cast_off, export, merged_by_peft, wide_llama
from tests.models import fill_b
from tests.sites import randn
from tests.tolerances import assert_within, gamma

# -- where it lives --------------------------------------------------------------------------------


def test_the_adapter_stays_a_plain_adapter_of_the_plain_base(tmp_path: Path):
    plain, model = adapted(), calibrated()
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "model")
    name = "adapter_model.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [n for n, p in plain.named_parameters() if p.requires_grad]
    found = falqon_fx.adapters(model)
    assert [len(adapter.adapters) for adapter in found.values()] == [1, 1, 1]


def terms(model: nn.Module) -> dict[str, Mapping[str, Tensor]]:
    return {p: m.terms for p, m in model.named_modules() if isinstance(m, Fp8Linear)}


def test_restore_and_merge_and_unload_keep_what_was_bought():
    """Layer by layer: a weight of float32 is one rounding away from dq(W) + B_c·A_c + s·B·A, whose
    products are float32 sums, as those with x are.
    """
    model, x = calibrated().eval(), {n: randn(7, n, seed=n) for n in (IN, MIDDLE)}
    merged = falqon_fx.merge_and_unload(copy.deepcopy(model)).eval()
    restored = falqon_fx.restore(copy.deepcopy(model))
    for path, layer in model.named_modules():
        if not isinstance(layer, Fp8Linear):
            continue
        read, weight = x[layer.in_features], layer.base().dequantize().abs().double()
        weight += layer.error_b.double().abs() @ layer.error_a.double().abs()
        site = path.removesuffix(".base_layer")
        parts = {restored.get_submodule(path): layer}
        lora: Any = model.get_submodule(site)
        if site != path:
            parts[merged.get_submodule(site.removeprefix("base_model.model."))] = lora
        for plain, prepared in parts.items():
            gauge = read.abs().double() @ weight.t()
            if prepared is not layer:
                gauge += read.abs() @ lora.get_delta_weight("default").detach().abs().t()
            gauge += 0 if layer.bias is None else layer.bias.abs()
            bound = 2 * gamma(layer.in_features + 2 * RANK + 8) * gauge
            assert_within(plain(read).detach().double(), prepared(read).detach().double(), bound)
    assert not terms(restored)
    names = [*dict(restored.named_parameters()), *dict(restored.named_buffers())]
    assert not any(name.rpartition(".")[2] in Fp8Linear.TERMS for name in names)


@pytest.mark.parametrize("start", ["unprepared", "prepared", "calibrated otherwise"])
def test_a_checkpoint_brings_it_back_bit_for_bit(tmp_path: Path, start: str):
    model, other = calibrated(), adapted()
    falqon_fx.save_checkpoint(model, tmp_path / "checkpoint")
    if start == "prepared":
        falqon_fx.prepare(other, EAGER, progress=False)
    elif start != "unprepared":
        other = calibrated(compensate=3, outliers=0)
    falqon_fx.load_checkpoint(other, tmp_path / "checkpoint")
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_without_it_takes_it_away(tmp_path: Path):
    plain, model = adapted(), calibrated()
    falqon_fx.prepare(plain, EAGER, progress=False)
    falqon_fx.save_checkpoint(plain, tmp_path / "checkpoint")
    falqon_fx.load_checkpoint(model, tmp_path / "checkpoint")
    assert not any(terms(model).values())


def test_a_state_dict_is_taken_whole_or_not_at_all():
    model, other = calibrated(), adapted()
    falqon_fx.prepare(other, EAGER, progress=False)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in other.state_dict().items())
    path = "base_model.model.q.base_layer."
    for name, change, problem in (
        ("error_b", None, "lacks its error_b"),
        ("channels", torch.full((CHANNELS,), IN, dtype=torch.int32), "channels of x"),
        ("channels", torch.zeros(CHANNELS, dtype=torch.int32), "a channel of x twice"),
        ("error_a", torch.full((RANK, IN), torch.nan, dtype=torch.bfloat16), "NaN or Inf"),
        ("columns", torch.zeros(OUT, CHANNELS, dtype=torch.bfloat16), "to be bfloat16"),
    ):
        state = model.state_dict()
        if change is None:
            del state[path + name]
        else:
            state[path + name] = change
        with pytest.raises(FalqonError, match=problem):
            other.load_state_dict(state)
    moved = model.to(torch.float16)
    assert all(t.dtype != torch.float16 for of in terms(moved).values() for t in of.values())


@pytest.mark.parametrize("way", ["checkpoint", "state dict"])
def test_a_cast_of_all_parameters_by_peft_can_be_saved_and_loaded(tmp_path: Path, way: str):
    """To float32, on either side, also into one that was cast: bfloat16 is exact in it."""
    model, others = calibrated(), [adapted(), calibrated(compensate=3), calibrated(compensate=RANK)]
    falqon_fx.prepare(others[0], EAGER, progress=False)
    wanted = model.state_dict()
    for cast in (model, others[2]):
        peft.prepare_model_for_kbit_training(cast, use_gradient_checkpointing=False)
        assert cast.base_model.model.q.base_layer.error_a.dtype == torch.float32
    falqon_fx.save_checkpoint(model, tmp_path / "cast")
    for other in others:
        if way == "checkpoint":
            falqon_fx.load_checkpoint(other, tmp_path / "cast")
        else:
            other.load_state_dict(model.state_dict())
        found = other.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], t.to(found[name].dtype)) for name, t in wanted.items())
        assert other.base_model.model.q.base_layer.terms.keys() == set(Fp8Linear.TERMS)


def test_terms_that_are_no_longer_those_that_were_made_are_refused(tmp_path: Path):
    model, other = calibrated(), calibrated()
    layer: Any = model.base_model.model.q.base_layer
    layer.set_terms({**layer.terms, "columns": layer.columns * 0.9 + layer.columns.float() * 0.1})
    for use in (
        lambda: falqon_fx.save_checkpoint(model, tmp_path / "checkpoint"),
        lambda: other.load_state_dict(model.state_dict()),
    ):
        with pytest.raises(FalqonError, match=r"columns that bfloat16 doesn't hold") as caught:
            use()
        assert caught.value.site == "base_model.model.q"
        assert "Average the trained parameters alone" in caught.value.remedy


PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "floats": (("error_a", "error_b", "columns"), "lacks code, scale, digest"),
    "all terms": (Fp8Linear.TERMS, "lacks code, scale, digest"),
    "a term": (("error_a",), "lacks code, scale, digest"),
    "terms and bytes": (("code", *Fp8Linear.TERMS), "lacks scale, digest"),
    "no channels": ((*Fp8Linear.STATE, "error_a", "error_b", "columns"), "lacks its channels"),
}


@pytest.mark.parametrize("given", PARTS)
def test_terms_without_the_bytes_that_they_were_made_for_are_refused(given: str):
    """Of another calibration they would be wrong numbers, and nothing else would tell."""
    names, problem = PARTS[given]
    model = calibrated(compensate=3, outliers=2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = calibrated().state_dict()
    part = {name: t for name, t in state.items() if name.rpartition(".")[2] in names}
    with pytest.raises(FalqonError, match=problem) as caught:
        model.load_state_dict(part, strict=False)
    assert caught.value.site == "base_model.model.q"
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("base", ["fp8", "int8", "nvfp4"])
def test_outside_of_compiled_code_int8_alone_has_the_columns_that_its_cast_leaves_out(base):
    """What FP8's rounding did to them is in the others, and in the product."""
    model = calibrated(FalqonConfig(inner="eager", base_dtype=base))
    for layer in (m for m in model.modules() if isinstance(m, Fp8Linear)):
        assert layer.channels is not None
        assert layer.columns is not None
        wanted = layer.base().dequantize() + layer.error_b.float() @ layer.error_a.float()
        if base == "int8":
            wanted[:, layer.channels.long()] = layer.columns.float()
        assert torch.equal(layer.dequantized(), wanted)
        x = torch.eye(layer.in_features)
        y = layer(x) - (0 if layer.bias is None else layer.bias)
        off = gamma(RANK + 4) * (wanted.abs() + 1)  # a product of ranks, one with zeros, the bias
        assert_within(y.double(), wanted.t().double(), off.t())


def test_int8_has_no_correction_of_w_in_channels_that_its_cast_of_x_leaves_out(tmp_path: Path):
    """As calibrations before that had: W_S has no error."""
    model = calibrated(FalqonConfig(inner="eager", base_dtype="int8"))
    layer: Any = model.base_model.model.q.base_layer
    assert not layer.error_a[:, layer.channels.long()].any()
    assert layer.error_a.any()
    layer.set_terms({**layer.terms, "error_a": torch.ones_like(layer.error_a)})
    falqon_fx.save_checkpoint(model, tmp_path / "checkpoint")
    for load in (
        lambda: falqon_fx.load_checkpoint(adapted(), tmp_path / "checkpoint"),
        lambda: model.load_state_dict(model.state_dict()),
    ):
        with pytest.raises(FalqonError, match=r"base_model\.model\.q.*leaves out of the cast of x"):
            load()


@pytest.mark.parametrize("asked", [{"compensate": 0}, {"compensate": RANK}, {"compensate": "auto"}])
def test_int8_leaves_channels_out_of_all_that_read_x_whatever_has_an_adapter(asked):
    """One step holds x of q and k. An adapter of k that adds nothing changes nothing, but how
    float32 sums of as many products as x has values are put together.
    """
    config = FalqonConfig(inner="eager", base_dtype="int8")
    x = inputs(1)[0]
    results: list[Tensor] = []
    for without in (False, True):
        model = adapted(target_modules=["q", "o"] if without else ["q", "k", "o"]).eval()
        for name, parameter in model.named_parameters():
            if ".k.lora_B" in name:
                nn.init.zeros_(parameter)
            elif "lora_" in name:
                nn.init.constant_(parameter, 0.01)
        report = falqon_fx.prepare(model, config, calibration=inputs(), progress=False, **asked)
        assert {channels for _, channels in report.bought.values()} == {16}
        torch._dynamo.reset()
        call = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
        results.append(call(x).detach())
    torch.testing.assert_close(*results)


# What a file may hold in the place of q's, and what is said of it.
DAMAGED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "half of a pair": ({"error_b": None}, "lacks its error_b"),
    "other rows": ({"error_a": torch.zeros(RANK, IN + 1, dtype=torch.bfloat16)}, "to be bfloat16"),
    "other ranks": ({"error_a": torch.zeros(RANK + 1, IN, dtype=torch.bfloat16)}, "to be bfloat16"),
    "one number": ({"error_a": torch.tensor(1.0, dtype=torch.bfloat16)}, "to be bfloat16"),
    "wide": ({"columns": torch.zeros(MIDDLE, CHANNELS)}, "to be bfloat16"),
    "NaN": ({"columns": torch.full((MIDDLE, CHANNELS), torch.nan, dtype=torch.bfloat16)}, "NaN"),
    "far channels": ({"channels": torch.arange(CHANNELS, dtype=torch.int32) + IN}, "channels of x"),
    "no channels": ({"channels": -torch.arange(CHANNELS, dtype=torch.int32)}, "channels of x"),
    "channels twice": ({"channels": torch.zeros(CHANNELS, dtype=torch.int32)}, "twice"),
    "long channels": ({"channels": torch.arange(CHANNELS)}, "to be int32"),
}


def test_damaged_terms_of_a_checkpoint_are_refused_and_nothing_changes(tmp_path: Path):
    """By a plain model and by one that is calibrated otherwise, in turn."""
    model, others = calibrated(), [adapted(), calibrated(compensate=3)]
    layer: Any = model.base_model.model.q.base_layer
    whole, each = dict(layer.terms), itertools.cycle(others)
    before = {id(other): {n: t.clone() for n, t in other.state_dict().items()} for other in others}
    for name, (change, problem) in DAMAGED.items():
        layer.set_terms({n: t for n, t in {**whole, **change}.items() if t is not None})
        with pytest.MonkeyPatch.context() as patch:  # files are written as they stand in the model
            patch.setattr(fp8_linear, "as_made", lambda path, terms, where: terms)
            falqon_fx.save_checkpoint(model, tmp_path / name)
        with pytest.raises(FalqonError, match=problem) as caught:
            falqon_fx.load_checkpoint(other := next(each), tmp_path / name)
        assert "base_model.model.q" in str(caught.value)
        after = other.state_dict()
        assert list(after) == list(before[id(other)])
        assert all(torch.equal(after[n], t) for n, t in before[id(other)].items())


def test_an_export_has_the_merged_weight_and_says_what_has_no_place(tmp_path: Path):
    """Cast once from W + s·B·A where W is at hand, or from dq(W) + B_c·A_c + s·B·A, also where a
    layer has no adapter: its bytes alone are not W's.
    """
    model = wide_llama()
    wide_llama().unload().save_pretrained(tmp_path / "plain")
    fill_b(model, 0.05)
    original = copy.deepcopy(model).merge_and_unload()
    asked: dict[str, Any] = {"compensate": 8, "outliers": 4, "progress": False}
    falqon_fx.prepare(model, EAGER, calibration=[{"input_ids": IDS}], **asked)
    no_place = "were calibrated, and the folder has no place for that"
    with pytest.warns(UserWarning, match=no_place):
        export(model, tmp_path / "of W", base=tmp_path / "plain")
    assert_one_cast_off(tmp_path / "of W", original)
    with pytest.warns(UserWarning, match=no_place):
        export(model, tmp_path / "of casts")
    assert_one_cast_off(tmp_path / "of casts", merged_by_peft(model))


# -- what is refused -------------------------------------------------------------------------------


class Broken(Exception):
    pass


def broken() -> Any:
    yield inputs()[0]
    raise Broken("half way")


NAN = torch.full((4, IN), torch.nan)
HOSTILE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no batch": ({"calibration": []}, FalqonError, "no batch in it"),
    "not iterable": ({"calibration": 3}, FalqonError, "is not iterable"),
    "NaN": ({"calibration": [*inputs(), NAN]}, FalqonError, "holds NaN or Inf"),
    "another model's": ({"calibration": [randn(3, 7)]}, FalqonError, "can't run its batch 0"),
    "unknown names": ({"calibration": [{"ids": NAN}]}, FalqonError, "can't run its batch 0"),
    "text": ({"calibration": ["hello"]}, FalqonError, "batch 0 is a str"),
    "broken half way": ({"calibration": broken()}, Broken, "half way"),
    "ranks": ({"calibration": inputs(), "compensate": IN + 1}, FalqonError, "more than it has"),
    "channels": ({"calibration": inputs(), "outliers": 999}, FalqonError, "more than it has"),
    "negative": ({"calibration": inputs(), "compensate": -1}, FalqonError, "Give 0 or more"),
    "nothing": ({"calibration": inputs(), "compensate": 0, "outliers": 0}, FalqonError, "nothing"),
    "no calibration": ({"compensate": 8}, FalqonError, r"calibration=batches, compensate=8"),
    "no calibration 2": ({"outliers": 8}, FalqonError, r"calibration=batches, outliers=8"),
    "rows": (
        {"calibration": inputs(), "config": FalqonConfig(update="rows")}, FalqonError, "rows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_can_not_be_calibrated_is_refused_and_nothing_changes(name: str):
    asked, kind, problem = HOSTILE[name]
    model = adapted().train()
    model.base_model.model.drop.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    modules = [type(module) for module in model.modules()]
    arguments: dict[str, Any] = {"config": EAGER, "progress": False, **asked}
    with pytest.raises(kind, match=problem):
        falqon_fx.prepare(model, **arguments)
    assert modules == [type(module) for module in model.modules()]
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) for n, t in before.items())


def interrupted() -> Any:
    yield inputs()[0]
    raise KeyboardInterrupt


def test_an_interrupted_calibration_changes_nothing_and_an_interrupted_cast_goes_on(monkeypatch):
    model, wanted = adapted(), calibrated()
    with pytest.raises(KeyboardInterrupt):
        falqon_fx.prepare(model, EAGER, calibration=interrupted(), progress=False)
    assert not terms(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    asked: dict[str, Any] = {"compensate": RANK, "outliers": CHANNELS, "progress": False}
    cast, casts = prepare_module._cast, list[Any]()

    def cast_two(layer: Any, *given: Any) -> Any:
        if len(casts) == 2:
            raise KeyboardInterrupt
        casts.append(layer)
        return cast(layer, *given)

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "_cast", cast_two)
        with pytest.raises(KeyboardInterrupt):
            falqon_fx.prepare(model, EAGER, calibration=inputs(), **asked)
    assert len(terms(model)) == 2
    report = falqon_fx.prepare(model, EAGER, calibration=inputs(), **asked)
    assert len(report.bought) == 2
    every, found = terms(wanted), terms(model)
    assert every.keys() == found.keys()
    assert all(of.keys() == found[path].keys() for path, of in every.items())


def test_what_is_prepared_already_has_no_error_left_to_find():
    model = calibrated()
    with pytest.raises(FalqonError, match="its base weights are gone"):
        falqon_fx.prepare(model, EAGER, calibration=inputs(), progress=False)
    assert all(terms(model).values())


def test_layers_that_no_batch_reaches_are_cast_without():
    model = adapted()
    model.base_model.model.register_module("spare", nn.Linear(IN, IN).requires_grad_(False))
    report = falqon_fx.prepare(
        model, EAGER, calibration=({"x": x} for x in inputs()), compensate=4, progress=False
    )
    assert len(report.prepared) == 5
    assert sorted(path.rpartition(".")[2] for path in report.calibrated) == ["k", "o", "plain", "q"]
    assert report.tokens == 120
    assert "1 layers have no calibration" in str(report)
    assert not model.base_model.model.spare.terms
    assert all(0 < left < 1 for left in report.calibrated.values())
