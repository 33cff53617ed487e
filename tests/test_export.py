"""`save_fp8`: what the real engines' packages read back is what was trained."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.files.export_layers import ExportLayer
from falqon_fx.site.base import Base, cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.models import fill_b, freeze_a, tiny_llama
from tests.parameters import PREPARED_OR_NOT, each_pair, each_value
from tests.sites import randn
from tests.tolerances import assert_within, fp8_cast_bound, gamma

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("compressed_tensors")

F32, BF16 = torch.float32, torch.bfloat16
IDS = torch.arange(12).view(2, 6)


def wide_llama(**lora: Any) -> nn.Module:
    """Two layers of Llama whose linear layers are large enough to run in FP8 without an adapter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora}
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), peft.LoraConfig(**options))


def in_fp8(model: nn.Module, prepared: bool, b_size: float = 0.05, **options: Any) -> nn.Module:
    """The model with its linear layers in FP8, and a trained B."""
    config = FalqonConfig(inner="eager", **options)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    else:
        call(model, config)
    if b_size:
        fill_b(model, b_size)
    return model.eval()


def call(model: nn.Module, config: FalqonConfig) -> Any:
    """The compiled model, after one call."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    with torch.no_grad():
        compiled(IDS)
    return compiled


def by_rows(model: nn.Module, prepared: bool = True, **options: Any) -> nn.Module:
    """A model with update="rows" whose FP8 weights hold steps of B."""
    freeze_a(model)
    config = FalqonConfig(**{"update": "rows", "inner": "eager", **options})
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    else:
        call(model, config)
    fill_b(model, 0.05)
    falqon_fx.flush(model)
    return model.eval()


def export(model: nn.Module, folder: Path, **arguments: Any) -> falqon_fx.ExportReport:
    return falqon_fx.save_fp8(model, folder / "out", progress=False, **arguments)


def read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / "out").glob("*.safetensors")):
        tensors |= safetensors.load_file(file)
    return tensors


def layers_in(folder: Path) -> dict[str, Base]:
    """The FP8 layers of an exported folder."""
    tensors = read(folder)
    paths = [name.removesuffix(".weight_scale") for name in tensors if "weight_scale" in name]
    return {
        path: Base(tensors[f"{path}.weight"].view(torch.uint8), tensors[f"{path}.weight_scale"])
        for path in paths
    }


def load(folder: Path, dtype: torch.dtype = F32, **arguments: Any) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder / "out", dtype=dtype, **arguments
    ).eval()


def dense(folder: Path, dtype: torch.dtype = F32) -> nn.Module:
    """Loaded with all weights dequantized."""
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return load(folder, dtype, quantization_config=config)


def sites(model: nn.Module) -> dict[str, Any]:
    """`falqon_fx.adapters` by the paths of the base model."""
    found = falqon_fx.adapters(model)
    return {path.removeprefix("base_model.model."): site for path, site in found.items()}


def merged_by_peft(model: nn.Module) -> nn.Module:
    """What PEFT's own merge makes of the model, with dq(W) where the base weights are freed."""
    plain = copy.deepcopy(model)
    falqon_fx.restore(plain)
    return plain.merge_and_unload()


def assert_one_cast_off(folder: Path, expected: nn.Module) -> None:
    """The exported layers are the expected weights [out, in], float32, within one cast to E4M3.

    The sum that is cast may be rounded in another order than PEFT's: each of W, and one product and
    one sum an adapter, is a float32 rounding (gamma_6 for two adapters), of values whose magnitudes
    add up to less than 4 of the largest in the row.
    """
    found = layers_in(folder)
    assert found
    for path, base in found.items():
        weight = expected.get_submodule(path).weight.detach()
        bound = fp8_cast_bound(weight, base.scale.double(), E4M3)
        bound = bound + gamma(6) * 4 * weight.abs().amax(1, keepdim=True).double()
        assert_within(base.dequantize(), weight, bound)


# -- bytes -----------------------------------------------------------------------------------------


@each_pair(
    scale=["pow2", "amax"],
    granularity=["tensor", "row"],
    prepared=PREPARED_OR_NOT,
)
def test_without_a_trained_adapter_the_bytes_are_those_trained_on(
    tmp_path, prepared, granularity, scale
):
    options = {"granularity": granularity, "scale": scale}
    model = in_fp8(tiny_llama(), prepared, b_size=0, **options)
    expected = {path: (s.weight.clone(), s.scale.clone()) for path, s in sites(model).items()}
    report = export(model, tmp_path)
    assert len(expected) == 14
    assert report.cast_from == dict.fromkeys(expected, "unchanged")
    check_folder(tmp_path, expected, dict(model.get_base_model().named_parameters()))


@each_pair(
    scale=["pow2", "amax"],
    granularity=["tensor", "row"],
    prepared=PREPARED_OR_NOT,
)
def test_with_rows_the_bytes_are_those_trained_on(tmp_path, prepared, granularity, scale):
    model = by_rows(tiny_llama(), prepared, granularity=granularity, scale=scale)
    expected = {}
    for path, state in sites(model).items():
        out = len(state.applied)
        of_rows = state.scale[:out] if granularity == "row" else state.scale
        expected[path] = state.weight[:out].clone(), of_rows.clone()
    report = export(model, tmp_path)
    assert report.flushed.rows == 0
    assert report.cast_from == dict.fromkeys(expected, "unchanged")
    assert len(expected) == 14
    check_folder(tmp_path, expected, dict(model.get_base_model().named_parameters()))


def check_folder(
    folder: Path, expected: dict[str, tuple[Tensor, Tensor]], parameters: dict[str, Tensor]
) -> None:
    """Weights and scales are the expected ones, all other tensors the model's."""
    tensors = read(folder)
    for path, (weight, scale) in expected.items():
        found, of_rows = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
        assert found.dtype == E4M3
        assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))
        assert (of_rows.dtype, of_rows.shape) == (F32, (len(weight), 1))
        assert torch.equal(of_rows, scale.expand(len(weight), 1))
    others = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in expected}
    assert set(others) == {n for n in parameters if "base_layer" not in n and "lora_" not in n}
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in others.items())


@each_value(
    scale=["pow2", "amax"], granularity=["tensor", "row"], at_hand=["model", "folder", "nothing"]
)
def test_a_trained_adapter_is_cast_with_its_weight_at_once(tmp_path, at_hand, granularity, scale):
    """q(W + s·B·A), bit for bit, of the base weight where the model or a folder has it, else of
    dq(W); and the report says which.
    """
    model = tiny_llama()
    weights = {path: m.base_layer.weight.detach().clone() for path, m in lora_modules(model)}
    model.get_base_model().save_pretrained(tmp_path / "plain")
    stored = safetensors.load_file(tmp_path / "plain/model.safetensors")
    names = {n: n.replace(".base_layer", "") for n in stored}
    safetensors.save_file(
        {names[n]: t for n, t in stored.items() if "lora_" not in n},
        tmp_path / "plain/model.safetensors",
    )
    options = {"granularity": granularity, "scale": scale}
    model = in_fp8(model, at_hand != "model", **options)
    if at_hand == "nothing":
        weights = {path: site.base() for path, site in sites(model).items()}
    arguments = {"base": tmp_path / "plain"} if at_hand == "folder" else {}
    report = export(model, tmp_path, **arguments)

    source = "FP8 weight" if at_hand == "nothing" else "base weight"
    assert report.cast_from == dict.fromkeys(weights, source)
    assert ("14 were cast a second time" in str(report)) is (at_hand == "nothing")
    spec = SiteSpec.from_config(FalqonConfig(**options))
    found = layers_in(tmp_path)
    assert len(found) == 14
    for path, module in lora_modules(model):
        a, b = (part.default.weight.detach() for part in (module.lora_A, module.lora_B))
        expected = cast_base(weights[path] + (b @ a) * 2.0, spec)
        assert torch.equal(found[path].code, expected.code)
        assert torch.equal(found[path].scale, expected.scale.expand(len(b), 1))
    if at_hand != "folder":
        assert_one_cast_off(tmp_path, merged_by_peft(model))


def lora_modules(model: nn.Module) -> list[tuple[str, Any]]:
    modules = model.get_base_model().named_modules()
    return [(path, module) for path, module in modules if hasattr(module, "lora_A")]


def test_each_layer_is_cast_once_and_as_it_is_written(tmp_path, monkeypatch):
    """Not all at once: as much memory is needed as a file holds, not as the model does."""
    cast, written, seen = ExportLayer.cast, falqon_fx.files.storage.save_tensors, []
    monkeypatch.setattr(ExportLayer, "cast", lambda self: seen.append(self.path) or cast(self))
    monkeypatch.setattr(
        falqon_fx.files.storage, "save_tensors", lambda *args: seen.append("file") or written(*args)
    )
    report = export(in_fp8(tiny_llama(), True), tmp_path, max_shard_size="20KB")
    assert Counter(seen) == {**dict.fromkeys(report.layers, 1), "file": seen.count("file")}
    first = seen.index("file")
    assert 0 < first < 14  # of the 14 layers


# -- whatever is active ----------------------------------------------------------------------------


def scaled(model: nn.Module) -> None:
    for _, module in lora_modules(model):
        module.scale_layer(0.5)


def loaded_in_place(model: nn.Module) -> None:
    fill_b(model, 0.1, seed=7)
    with torch.no_grad():
        for i, (_, module) in enumerate(lora_modules(model)):
            a = module.lora_A.default.weight
            a.copy_(randn(*a.shape, seed=100 + i))


def another(model: nn.Module) -> None:
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    fill_b(model, 0.1, seed=3)
    model.set_adapter("other")


def both(model: nn.Module) -> None:
    another(model)
    model.base_model.set_adapter(["default", "other"])


CHANGES = {"scaled": scaled, "loaded": loaded_in_place, "another": another, "both": both}


@each_value(change=CHANGES, prepared=PREPARED_OR_NOT)
def test_what_is_active_is_merged_as_peft_merges_it(tmp_path, prepared, change):
    model = in_fp8(tiny_llama(), prepared)
    before = merged_by_peft(model)
    change(model)
    expected = merged_by_peft(model)
    report = export(model, tmp_path)
    assert set(report.cast_from.values()) == {"FP8 weight" if prepared else "base weight"}
    assert len(report.layers) == 14
    assert_one_cast_off(tmp_path, expected)
    with pytest.raises(AssertionError):  # what was active before is another model
        assert_one_cast_off(tmp_path, before)


@pytest.mark.parametrize("change", ["scaled", "loaded", "both"])
def test_with_rows_another_adapter_is_cast_with_a_weight_that_is_at_hand(tmp_path, change):
    model = by_rows(tiny_llama(layers=1), prepared=False)
    CHANGES[change](model)
    expected = merged_by_peft(model)
    assert set(export(model, tmp_path).cast_from.values()) == {"base weight"}
    assert_one_cast_off(tmp_path, expected)


@each_value(change=CHANGES, pending=["apply", "drop"])
def test_with_rows_another_adapter_than_the_trained_one_is_refused(tmp_path, pending, change):
    """Where the FP8 weight alone holds what was trained."""
    model = by_rows(tiny_llama(), prepared=pending == "apply", pending=pending)
    change(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    match = r"layers\.0\.self_attn\.q_proj: .* Activate the adapter that was trained"
    if (pending, change) == ("drop", another):  # nothing is known of it
        match = "no layer of the model has an FP8 weight"
    with pytest.raises(FalqonError, match=match):
        export(model, tmp_path)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_is_merged_already_is_not_merged_again(tmp_path):
    model = in_fp8(tiny_llama(), prepared=False)
    expected = merged_by_peft(model)
    model.merge_adapter()
    export(model, tmp_path)
    assert_one_cast_off(tmp_path, expected)


def test_disabled_adapters_are_not_active_ones(tmp_path):
    """PEFT merges what is active, whether it is enabled or not."""
    model = in_fp8(tiny_llama(), prepared=True)
    with model.disable_adapter():
        export(model, tmp_path)
    assert_one_cast_off(tmp_path, merged_by_peft(model))


def test_dora_is_merged_as_peft_merges_it(tmp_path):
    """Prepared: PEFT calls its base layer outside of compiled code, which is in FP8 then alone."""
    model = in_fp8(tiny_llama(use_dora=True), prepared=True)
    expected = merged_by_peft(model)
    assert len(export(model, tmp_path).layers) == 14
    assert_one_cast_off(tmp_path, expected)


def test_what_peft_cannot_merge_is_refused_by_its_layer(tmp_path):
    model = tiny_llama(target_modules=["q_proj"], alora_invocation_tokens=[1])
    falqon_fx.prepare(model, progress=False)
    fill_b(model, 0.1)
    with pytest.raises(FalqonError, match=r"q_proj: PEFT can't merge its adapter \(aLoRA"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "problem"),
    [(float("nan"), "1 of 192 elements of its lora_B hold NaN"), (1e30, "its merged weight")],
)
def test_a_merged_weight_that_fp8_cannot_hold_is_refused_by_its_layer(tmp_path, value, problem):
    model = in_fp8(tiny_llama(), prepared=True)
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_B.default.weight[3, 1] = value
    with pytest.raises(FalqonError, match=rf"layers\.1\.mlp\.up_proj: {problem}"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


# -- frozen layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
@pytest.mark.parametrize("frozen", ["fp8", "leave"])
def test_what_ran_in_fp8_without_an_adapter_is_in_fp8(tmp_path, prepared, frozen):
    model = wide_llama()
    plain = copy.deepcopy(model.get_base_model())
    report = export(in_fp8(model, prepared, frozen=frozen), tmp_path)
    adapted = {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}
    linear = {p for p, m in plain.named_modules() if isinstance(m, nn.Linear)}
    linear = {path.removesuffix(".base_layer") for path in linear if "lora_" not in path}
    others = linear - adapted - {"lm_head"}
    assert len(others) == 10
    wanted = adapted | others if frozen == "fp8" else adapted
    assert set(report.layers) == wanted
    assert set(report.dense) == linear - wanted
    assert report.dense["lm_head"] == "it is an output head"
    source = "FP8 weight" if prepared else "base weight"
    assert {p for p, s in report.cast_from.items() if s == source} == adapted
    found = layers_in(tmp_path)
    for path in others & wanted:
        expected = cast_base(plain.get_submodule(path).weight, SiteSpec.from_config(FalqonConfig()))
        assert torch.equal(found[path].code, expected.code)
        assert torch.equal(found[path].scale, expected.scale)
    # vLLM fuses q, k and v: all or none of them may be in FP8.
    assert any("vLLM" in note for note in report.notes) is (frozen == "leave")


# -- base= -----------------------------------------------------------------------------------------


def test_a_folder_of_other_weights_is_refused(tmp_path):
    model = in_fp8(tiny_llama(), prepared=True)
    torch.manual_seed(1)
    other = transformers.LlamaForCausalLM(model.get_base_model().config)
    other.save_pretrained(tmp_path / "plain")
    with pytest.raises(FalqonError, match=r"q_proj: its FP8 weight was not made from the weight"):
        export(model, tmp_path, base=tmp_path / "plain")
    file = tmp_path / "plain/model.safetensors"
    tensors = safetensors.load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    safetensors.save_file(tensors, file)
    with pytest.raises(FalqonError, match=r"has no tensor 'model\.layers\.0\.self_attn\.q_proj"):
        export(model, tmp_path, base=tmp_path / "plain")
    with pytest.raises(FalqonError, match=r"there is no config\.json in it"):
        export(model, tmp_path, base=tmp_path / "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


# -- pending rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pending", ["hold", "apply", "drop"])
def test_pending_rows_are_written_first_and_the_report_says_how_much_that_changed(
    tmp_path, pending
):
    model = by_rows(tiny_llama(), pending=pending, rounding="nearest")
    fill_b(model, 0.05, seed=2)
    states = sites(model)
    before = {path: state.dequantize() for path, state in states.items()}
    waiting = sum(int(state.pending().any(1).sum()) for state in states.values())
    report = export(model, tmp_path)
    assert report.flushed.rows == waiting > 300
    assert not any(state.pending().any() for state in states.values())
    out = {path: state.applied.shape[0] for path, state in states.items()}
    moved = [(s.dequantize() - before[p])[: out[p]] for p, s in states.items()]
    changed = sum(m.double().square().sum() for m in moved)
    total = sum(before[p][: out[p]].double().square().sum() for p in states)
    assert report.flushed.relative_change == pytest.approx(float((changed / total) ** 0.5))
    assert f"{waiting} pending rows in 14 layers" in str(report)
    assert "pending rows" not in str(export(model, tmp_path / "again"))
