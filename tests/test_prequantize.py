"""Models that never exist in dense form: `prequantize`, `load`, and FP8 checkpoints of others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from pydantic import TypeAdapter
from torch import nn

import falqon_fx
from falqon_fx import (
    ExportReport,
    FalqonConfig,
    FalqonConfigError,
    FalqonError,
    PrequantizeReport,
)
from falqon_fx.files import atomic
from falqon_fx.files.disk import lock
from falqon_fx.files.loading import MANIFEST
from falqon_fx.files.storage import DamagedFileError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from falqon_fx_cli.main import main
from tests.models import fill_b
from tests.parameters import each_pair, slow
from tests.test_checkpoint import rewrite_format

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

IDS = torch.arange(12).view(2, 6)
BF16 = torch.bfloat16
ROWS = FalqonConfig(update="rows", init="svd")


def dense_model(tied: bool = False, dtype: torch.dtype = BF16, **options) -> nn.Module:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False, **options,
    }  # fmt: skip
    config = transformers.LlamaConfig(tie_word_embeddings=tied, **shape)
    return transformers.LlamaForCausalLM(config).to(dtype)


WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}  # enough to gain


def folder_of(model: nn.Module, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})


def prequantize(source: Path, out: Path, config=None, *, workers: int = 1, **options):
    return falqon_fx.prequantize(
        source, out, lora(**options), config, workers=workers, progress=False
    )


# -- prequantize and load --------------------------------------------------------------------------


@each_pair(
    tied={"untied": False, "tied": True},
    scale=["pow2", "amax"],
    granularity=["row", "tensor"],
    update=["adapter", "rows"],
)
def test_it_is_prepare_bit_for_bit(tmp_path, update, granularity, scale, tied):
    """The same bytes, scales, counters and A as `prepare` makes from the whole model in memory."""
    config = FalqonConfig(update=update, init="svd", granularity=granularity, scale=scale)
    source = folder_of(dense_model(tied), tmp_path / "dense", "20KB")
    report = prequantize(source, tmp_path / "out", config)
    assert report.layers == 14
    assert_is_prepare(tmp_path, config)


@pytest.mark.parametrize("update", ["adapter", "rows"])
@pytest.mark.parametrize("frozen", ["fp8", "leave"])
def test_it_casts_the_layers_without_an_adapter_that_prepare_casts(tmp_path, update, frozen):
    config = FalqonConfig(update=update, init="svd", frozen=frozen)
    source = folder_of(dense_model(**WIDE), tmp_path / "dense")
    targets = ["q_proj", "v_proj"]
    report = prequantize(source, tmp_path / "out", config, target_modules=targets)
    assert report.layers == (14 if frozen == "fp8" else 4)
    loaded = assert_is_prepare(tmp_path, config, target_modules=targets)
    kinds = [type(module) for module in loaded.modules()]
    adapted = Fp8Linear if update == "adapter" else MergedBaseLinear
    assert kinds.count(MergedBaseLinear) == (4 if update == "rows" else 0)
    assert kinds.count(Fp8Linear) == report.layers - kinds.count(MergedBaseLinear)
    assert type(loaded.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is adapted
    assert type(loaded.base_model.model.lm_head) is nn.Linear


def assert_is_prepare(folder: Path, config: FalqonConfig, **options) -> nn.Module:
    """The model loaded from ``out`` is the one from ``dense``, prepared."""
    loaded = falqon_fx.load(folder / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=BF16)
    expected = peft.get_peft_model(dense, lora(**options))
    falqon_fx.prepare(expected, config, progress=False)
    kinds = dict(expected.named_modules())
    for path, module in loaded.named_modules():
        assert type(module) is type(kinds[path])
        if isinstance(module, Fp8Linear | MergedBaseLinear):
            assert module.extra_repr() == kinds[path].extra_repr()
            assert (module.path, module.dtype) == (kinds[path].path, kinds[path].dtype)
    named = dict(expected.named_parameters())
    assert named.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == named[name].dtype
        assert parameter.requires_grad == named[name].requires_grad
        assert torch.equal(parameter, named[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected.eval()(IDS).logits)
    return loaded


def test_a_write_into_a_loaded_weight_names_its_layer(tmp_path):
    prequantize(folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out")
    model = falqon_fx.load(tmp_path / "out")
    with pytest.raises(FalqonError, match="would be lost") as refused:
        model.merge_adapter()
    assert refused.value.site == next(iter(falqon_fx.adapters(model)))


@pytest.mark.parametrize("update", ["adapter", "rows"])
def test_the_loaded_model_trains(tmp_path, update):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", FalqonConfig(update=update, init="svd"))
    model = falqon_fx.load(tmp_path / "out").train()
    config = FalqonConfig(update=update, inner="eager")
    if update == "rows":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 0.02)
    losses = []
    for _ in range(6):
        loss = compiled(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        written = update == "rows" and name.endswith((".code", ".writes", ".applied"))
        if parameter.requires_grad or written:
            assert not torch.equal(parameter, before[name]), name
        elif update == "adapter":
            assert torch.equal(parameter, before[name]), name
    # Nothing was written into the files.
    again = dict(falqon_fx.load(tmp_path / "out").named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_same_files(tmp_path, workers):
    source = folder_of(dense_model(attention_bias=True), tmp_path / "dense")
    prequantize(source, tmp_path / "one")
    prequantize(source, tmp_path / "out", workers=workers)
    one, out = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
                for f in (tmp_path / "one", tmp_path / "out"))  # fmt: skip
    assert one.keys() == out.keys()
    assert all(one[n] == out[n] for n in one if n.suffix == ".safetensors")
    model = falqon_fx.load(tmp_path / "out")
    assert model(IDS).logits.isfinite().all()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.bias is not None


@pytest.mark.parametrize("config", [None, ROWS], ids=["adapter", "rows"])
def test_a_checkpoint_loads_into_mapped_files_and_leaves_them_as_they_are(tmp_path, config):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", config)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    model = falqon_fx.load(tmp_path / "out")
    fill_b(model, 0.1)
    falqon_fx.flush(model)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    mapped = falqon_fx.load(tmp_path / "out")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=BF16)
    expected = dict(model.named_parameters())
    for target in (mapped, peft.get_peft_model(dense, lora())):
        falqon_fx.load_checkpoint(target, tmp_path / "trained")
        assert dict(target.named_parameters()).keys() == expected.keys()
        for name, parameter in target.named_parameters():
            assert torch.equal(parameter, expected[name]), name
    assert all(path.read_bytes() == whole for path, whole in files.items())


def test_layers_left_out_stay_dense(tmp_path):
    dense = dense_model()
    source = folder_of(dense, tmp_path / "dense")
    report = prequantize(source, tmp_path / "out", FalqonConfig(exclude=("*mlp*",)))
    assert report.layers == 8
    model = falqon_fx.load(tmp_path / "out")
    up = model.base_model.model.model.layers[1].mlp.up_proj
    assert type(up.base_layer) is nn.Linear
    assert torch.equal(up.base_layer.weight, dense.model.layers[1].mlp.up_proj.weight)
    assert up.lora_A.default.weight.any()
    assert not up.lora_B.default.weight.any()


KILL = """
import sys, time; sys.path.insert(0, {root!r})
import falqon_fx.files.prequantize
p = sys.modules["falqon_fx.files.prequantize"]
convert = p._convert
def slowly(*arguments):
    print("one", flush=True)
    time.sleep(0.02)
    return convert(*arguments)
p._convert = slowly
from pathlib import Path
from tests.test_prequantize import prequantize
prequantize(Path({source!r}), Path({out!r}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_ended(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    out = tmp_path / "out"
    prequantize(source, tmp_path / "whole")
    code = KILL.format(root=str(Path(__file__).parents[1]), source=str(source), out=str(out))
    writer = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(6):
        assert writer.stdout.readline() == b"one\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not out.exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.partial/weights").iterdir()}
    assert 0 < len(done) < 15
    report = prequantize(source, out)
    assert 0 < report.resumed < 14
    assert "from an earlier run" in str(report)
    for path, when in done.items():
        assert (out / "weights" / path.name).stat().st_mtime_ns == when
    for path in (tmp_path / "whole/weights").iterdir():
        assert path.read_bytes() == (out / "weights" / path.name).read_bytes()
    assert not (tmp_path / "out.partial").exists()
    falqon_fx.load(out)


@pytest.mark.parametrize("where", ["plan", "manifest", "rename_into_place"])
def test_a_run_cut_at_its_start_or_end_goes_on(tmp_path, monkeypatch, where):
    """Before there is a plan, before there is a manifest, and before the folder has its name."""
    source = folder_of(dense_model(), tmp_path / "dense")
    out = tmp_path / "out"
    module = sys.modules["falqon_fx.files.prequantize"]
    cut = {
        "plan": (module.json, "dumps"),
        "manifest": (module.storage, "write_manifest"),
        "rename_into_place": (atomic, "rename_into_place"),
    }

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*cut[where], stop)
        with pytest.raises(KeyboardInterrupt):
            prequantize(source, out)
    assert not out.exists()
    report = prequantize(source, out)
    assert report.resumed == (0 if where == "plan" else report.layers)
    assert not {"records", "writing", "plan.json"} & {path.name for path in out.iterdir()}
    assert not (tmp_path / "out.partial").exists()
    falqon_fx.load(out)


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    (tmp_path / "out.partial").mkdir()
    with (
        lock(tmp_path / "out.partial"),
        pytest.raises(FalqonError, match="another process is writing"),
    ):
        prequantize(source, tmp_path / "out")


def test_a_partial_folder_of_something_else_is_left_alone(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/mine").touch()
    with pytest.raises(FalqonError, match="of another run"):
        prequantize(source, tmp_path / "out")
    assert (tmp_path / "out.partial/mine").exists()


def test_a_partial_folder_of_other_options_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    dense = dense_model()
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    bad = folder_of(dense, tmp_path / "bad")
    with pytest.raises(FalqonError, match="NaN or Inf"):
        prequantize(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FalqonError, match="of another run"):
        prequantize(source, tmp_path / "out", r=8)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(FalqonError, match="exists already"):
        prequantize(tmp_path, tmp_path / "out")


def test_a_folder_of_an_older_format_is_refused_with_the_remedy(tmp_path):
    prequantize(folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out")
    rewrite_format(tmp_path / "out" / MANIFEST, "falqon_fx.prequantized.1")
    with pytest.raises(FalqonError, match=r"its format is 'falqon_fx\.prequantized\.1'.* Call "):
        falqon_fx.load(tmp_path / "out")


def test_an_adapter_that_starts_from_the_dense_weight_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", use_dora=True)
    with pytest.raises(FalqonError, match=r"lora_magnitude_vector.*: it starts from the dense"):
        falqon_fx.load(tmp_path / "out")


def test_an_adapter_config_that_names_code_to_import_is_refused(tmp_path, monkeypatch):
    prequantize(folder_of(dense_model(), tmp_path / "dense"), tmp_path / "out")
    (tmp_path / "code/megatron").mkdir(parents=True)
    (tmp_path / "code/megatron/__init__.py").touch()
    module = tmp_path / "code/megatron/core.py"
    module.write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path / "code")
    config = tmp_path / "out/adapter_config.json"
    content = json.loads(config.read_text())
    content |= {"megatron_config": {"any": 1}, "megatron_core": "megatron.core"}
    config.write_text(json.dumps(content))
    with pytest.raises(FalqonError, match="Megatron's layers"):
        falqon_fx.load(tmp_path / "out", verify=False)


def test_adapters_outside_of_the_files_start_as_peft_starts_them(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out", target_modules=["q_proj", "embed_tokens"])
    inner = falqon_fx.load(tmp_path / "out").base_model.model.model
    assert not inner.embed_tokens.lora_embedding_A.default.any()
    assert 0.8 < inner.embed_tokens.lora_embedding_B.default.std() < 1.2  # normal, of 128 numbers
    assert inner.embed_tokens.lora_embedding_B.default.requires_grad
    assert not inner.layers[0].self_attn.q_proj.lora_B.default.weight.any()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FalqonError, match=r"there is no config\.json in it"):
        prequantize(tmp_path, tmp_path / "out")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FalqonError, match="there are no safetensors in it"):
        prequantize(tmp_path, tmp_path / "out")


def sharded(folder: Path) -> Path:
    """A checkpoint of two files or more with an index."""
    folder_of(dense_model(), folder, "20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_a_tensor_in_two_files_is_refused_unless_an_index_says_which(tmp_path):
    source = sharded(tmp_path / "dense")
    prequantize(source, tmp_path / "whole")
    first, *_, last = sorted(source.glob("*.safetensors"))
    shutil.copyfile(first, source / "old.safetensors")
    prequantize(source, tmp_path / "indexed")  # does not look into the file
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(FalqonError, match=rf"{first.name} and old\.safetensors both hold it"):
        prequantize(source, tmp_path / "out")


def test_an_index_that_is_wrong_is_refused(tmp_path):
    source = sharded(tmp_path / "dense")
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name, right = next(iter(index["weight_map"].items()))
    for wrong, said in (
        (next(f for f in index["weight_map"].values() if f != right), "says that .* holds it"),
        ("gone.safetensors", "names gone.safetensors, which is missing"),
    ):
        changed = {**index["weight_map"], name: wrong}
        file.write_text(json.dumps({**index, "weight_map": changed}))
        with pytest.raises(FalqonError, match=said):
            prequantize(source, tmp_path / "out")


def test_a_source_whose_header_would_be_huge_is_refused(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    (file,) = source.glob("*.safetensors")
    whole = bytearray(file.read_bytes())
    whole[:8] = (1 << 62).to_bytes(8, "little")
    file.write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"model\.safetensors: it is not a safetensors file"):
        prequantize(source, tmp_path / "out")


def test_a_truncated_source_is_named(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    exported(tmp_path / "fp8")
    for folder, function in (
        (source, lambda: prequantize(source, tmp_path / "out")),
        (tmp_path / "fp8", lambda: falqon_fx.load(tmp_path / "fp8")),
    ):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(DamagedFileError, match=r"model\.safetensors: it is not a whole"):
            function()


def test_a_full_disk_keeps_what_is_done(tmp_path):
    """A process whose files may not pass 7000 bytes, which is less than the largest."""
    source = folder_of(dense_model(), tmp_path / "dense")
    code = f"""
import resource, signal, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import falqon_fx
from pathlib import Path
from tests.test_prequantize import prequantize
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))
try:
    prequantize(Path({str(source)!r}), Path({str(tmp_path / "out")!r}))
except falqon_fx.FalqonError as error:
    print(error)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    assert not (tmp_path / "out").exists()
    prequantize(source, tmp_path / "out")
    falqon_fx.load(tmp_path / "out")


def test_a_damaged_weight_is_named(tmp_path):
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out")
    (file,) = (tmp_path / "out/weights").glob("*.layers.0.mlp.up_proj.safetensors")
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 4
    file.write_bytes(whole)
    with pytest.raises(DamagedFileError, match=r"layers\.0\.mlp\.up_proj.*checksum of tensor"):
        falqon_fx.load(tmp_path / "out")
    falqon_fx.load(tmp_path / "out", verify=False)


def test_no_dense_weight_is_made_while_loading(tmp_path):
    """The FP8 parameters are the mapped files themselves."""
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "out")
    model = falqon_fx.load(tmp_path / "out")
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    assert len(layers) == 14
    for layer in layers:
        for tensor in (layer.code, layer.scale, layer.digest):
            assert not tensor.untyped_storage().resizable()  # memory that torch did not allocate


# -- FP8 checkpoints of others ---------------------------------------------------------------------


def exported(
    folder: Path,
    form: str = "compressed-tensors",
    dtype: torch.dtype = BF16,
    **options,
) -> nn.Module:
    """An FP8 checkpoint in ``folder``, as of others, and the model that it was written from."""
    if form == "fp8":
        options["granularity"] = "tensor"
    model = peft.get_peft_model(dense_model(dtype=dtype), lora())
    fill_b(model, 0.1)
    falqon_fx.prepare(model, FalqonConfig(**options), progress=False)
    falqon_fx.save_fp8(model, folder, form=form, progress=False)
    (folder / "falqon.json").unlink()
    return model


@pytest.mark.parametrize("form", ["compressed-tensors", "fp8"])
@pytest.mark.parametrize("scale", ["pow2", "amax"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]], ids=["all", "q_proj"])
def test_fp8_weights_are_taken_as_they_are(tmp_path, form, scale, targets):
    exported(tmp_path / "fp8", form, scale=scale)
    tensors = safetensors.load_file(tmp_path / "fp8/model.safetensors")
    model = falqon_fx.load(tmp_path / "fp8", lora(target_modules=targets))
    end = "weight_scale" if form == "compressed-tensors" else "weight_scale_inv"
    count = 0
    for path, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            name = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            weight, out = tensors[f"{name}.weight"], module.out_features
            assert weight.dtype == E4M3
            assert torch.equal(module.code, weight.view(torch.uint8))
            given = tensors[f"{name}.{end}"]
            expected = given if form == "compressed-tensors" else given[0, 0].expand(out, 1)
            assert torch.equal(module.base().scale, expected)
            assert f"{scale} " in module.spec_text
            assert (module.dtype, module.path) == (BF16, f"base_model.model.{name}")
            adapted = targets == "all-linear" or "q_proj" in path
            assert path.endswith(".base_layer") is adapted
            count += 1
    assert count == 14
    assert len(falqon_fx.adapters(model)) == (14 if targets == "all-linear" else 2)


def test_an_index_says_which_file_holds_an_fp8_weight(tmp_path):
    """Others of the name, in files that are left from before, are not looked at."""
    exported(tmp_path / "fp8")
    (file,) = (tmp_path / "fp8").glob("*.safetensors")
    tensors = safetensors.load_file(file)
    norm = "model.norm.weight"
    index = dict.fromkeys(tensors, "a.safetensors") | {norm: "b.safetensors"}
    first = {name: t for name, t in tensors.items() if name != norm}
    safetensors.save_file(first | {norm: tensors[norm] + 1}, file.with_name("a.safetensors"))
    stale = {name: torch.zeros_like(t) for name, t in first.items()}
    safetensors.save_file(stale | {norm: tensors[norm]}, file.with_name("b.safetensors"))
    file.unlink()
    written = tmp_path / "fp8/model.safetensors.index.json"
    written.write_text(json.dumps({"weight_map": index}))
    model = falqon_fx.load(tmp_path / "fp8", lora())
    assert torch.equal(model.get_parameter(f"base_model.model.{norm}"), tensors[norm])
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}.base_layer")
    assert torch.equal(layer.code, tensors[f"{name}.weight"].view(torch.uint8))
    written.write_text(json.dumps({"weight_map": {**index, "more": "b.safetensors"}}))
    with pytest.raises(FalqonError, match=r"more: .* says that b\.safetensors holds it"):
        falqon_fx.load(tmp_path / "fp8", lora())


@pytest.mark.parametrize("scheme", ["FP8", "FP8_DYNAMIC"], ids=["tensor", "channel"])
def test_what_compressed_tensors_wrote_is_taken_as_it_is(tmp_path, scheme):
    """Scales a tensor with static activations, and scales a row, from the real package; in bf16."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization

    model = dense_model()
    group = quantization.preset_name_to_scheme(scheme, ["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], quantization_status="frozen"
    )
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            amax = module.weight.abs().amax(None if scheme == "FP8" else 1, keepdim=True)
            module.weight_scale.data.copy_((amax / 448).reshape(module.weight_scale.shape))
    compressor = compressed_tensors.ModelCompressor.from_pretrained_model(
        model, quantization_format="float-quantized"
    )
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    assert_taken_as_it_is(tmp_path, ".weight_scale")


def test_the_fp8_form_with_a_scale_a_tensor_is_taken_as_it_is(tmp_path):
    """As AutoFP8 wrote it: scalars in float32, activations with a static scale."""
    model = dense_model()
    settings = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    model.config.quantization_config = settings
    model.config.save_pretrained(tmp_path)
    tensors = dict(model.state_dict())
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            scale = module.weight.abs().amax().float() / 448
            tensors[f"{path}.weight"] = (module.weight.float() / scale).to(E4M3)
            tensors[f"{path}.weight_scale"] = scale
            tensors[f"{path}.input_scale"] = torch.tensor(0.01)
    safetensors.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_taken_as_it_is(tmp_path, ".weight_scale")


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.output_scale",)])
def test_scales_of_a_cache_are_left_out_with_a_warning(tmp_path, names):
    exported(tmp_path / "fp8")
    file = tmp_path / "fp8/model.safetensors"
    tensors = safetensors.load_file(file)
    tensors |= {f"model.layers.{i}.self_attn.{n}": torch.ones(1) for i in (0, 1) for n in names}
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=f"holds {2 * len(names)} scales of an FP8 cache"):
        model = falqon_fx.load(tmp_path / "fp8", lora())
    assert len(falqon_fx.adapters(model)) == 14


def assert_taken_as_it_is(folder: Path, end: str) -> None:
    tensors = safetensors.load_file(folder / "model.safetensors")
    states = falqon_fx.adapters(falqon_fx.load(folder, lora()))
    assert len(states) == 14
    for path, state in states.items():
        name = path.removeprefix("base_model.model.")
        weight, scale = tensors[f"{name}.weight"], tensors[name + end].float()
        assert torch.equal(state.weight.view(torch.uint8), weight.view(torch.uint8))
        assert torch.equal(state.scale, scale.reshape(-1, 1).expand(len(weight), 1))


def test_an_fp8_model_computes_what_transformers_does(tmp_path):
    exported(tmp_path / "fp8", dtype=torch.float32)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.float32, quantization_config=config
    )
    model = falqon_fx.load(tmp_path / "fp8", lora(target_modules=["q_proj"]))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("scale", ["pow2", slow("amax")])
def test_an_fp8_model_trains_and_is_exported_again(tmp_path, scale):
    """The base stays what it was; a layer's bytes change where its adapter was trained."""
    exported(tmp_path / "fp8", scale=scale)
    targets = {"target_modules": ["q_proj", "down_proj"]}
    model = falqon_fx.load(tmp_path / "fp8", lora(**targets)).train()
    options = {"config": FalqonConfig(inner="eager", scale=scale)}
    compiled = torch.compile(model, backend="falqon", options=options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    for _ in range(3):
        compiled(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = safetensors.load_file(tmp_path / "fp8/model.safetensors")
    report = falqon_fx.save_fp8(model, tmp_path / "again", progress=False)
    after = safetensors.load_file(tmp_path / "again/model.safetensors")
    sites = falqon_fx.adapters(model)
    assert len(sites) == 4
    plan = SiteSpec.from_config(FalqonConfig(scale=scale))
    for path, source in report.cast_from.items():
        name, site = f"{path}.weight", sites.get(f"base_model.model.{path}")
        old, new = (found[name].view(torch.uint8) for found in (before, after))
        assert source == ("unchanged" if site is None else "FP8 weight")
        if site is None:
            assert torch.equal(new, old)
            continue
        assert torch.equal(site.weight.view(torch.uint8), old)
        ((a, b, scaling),) = site.adapters
        expected = cast_base(site.base() + (b @ a).detach() * scaling, plan)
        assert torch.equal(new, expected.code)
        assert torch.equal(after[f"{name}_scale"], expected.scale)
        assert not torch.equal(new, old)


def test_rows_of_others_are_not_written(tmp_path):
    exported(tmp_path / "fp8")
    with pytest.raises(FalqonConfigError, match="'rows' would write into the weights of"):
        falqon_fx.load(tmp_path / "fp8", lora(), FalqonConfig(update="rows"))


def test_a_dense_checkpoint_is_not_loaded_as_fp8(tmp_path):
    folder_of(dense_model(), tmp_path / "dense")
    with pytest.raises(FalqonError, match=r"Call falqon_fx\.prequantize on it"):
        falqon_fx.load(tmp_path / "dense")


def test_other_quantizations_are_refused(tmp_path):
    exported(tmp_path / "fp8")
    file = tmp_path / "fp8/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    file.write_text(json.dumps(config))
    with pytest.raises(FalqonError, match="4 bits of type 'float'"):
        falqon_fx.load(tmp_path / "fp8")


# -- command line ----------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return main(arguments)


def test_prequantize_and_export_on_the_command_line(tmp_path, capsys):
    source = folder_of(dense_model(), tmp_path / "dense")
    assert run("prequantize", str(source), str(tmp_path / "json"), "--json") == 0
    made = TypeAdapter(PrequantizeReport).validate_json(capsys.readouterr().out)
    assert (made.directory, made.layers) == (tmp_path / "json", 14)
    out, serving = tmp_path / "out", tmp_path / "serving"
    assert (
        run("prequantize", str(source), str(out), "--rank", "4", "--workers", "2", "--quiet") == 0
    )
    assert "14 layers in FP8" in capsys.readouterr().out
    model = falqon_fx.load(out)
    fill_b(model, 0.05)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    arguments = ["--checkpoint", str(tmp_path / "trained"), "--quiet"]
    assert run("export", str(out), str(serving), *arguments) == 0
    printed = capsys.readouterr().out
    assert "14 layers in FP8" in printed
    assert "14 were cast a second time" in printed
    falqon_fx.save_fp8(model, tmp_path / "expected", progress=False)
    assert read(serving) == read(tmp_path / "expected")
    arguments = ["--base", str(source), *arguments]
    assert run("export", str(out), str(tmp_path / "once"), *arguments, "--json") == 0
    report = TypeAdapter(ExportReport).validate_json(capsys.readouterr().out)
    assert list(report.cast_from.values()) == ["base weight"] * 14
    assert read(tmp_path / "once") != read(serving)


def read(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("prepared", [slow(False, id="unprepared"), True])
def test_export_of_a_checkpoint_over_the_dense_model_on_the_command_line(
    tmp_path, capsys, prepared
):
    """Cast from the folder's base weights, whether the checkpoint has FP8 ones or not."""
    source = folder_of(dense_model(), tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=BF16)
    model = peft.get_peft_model(dense, lora())
    model.save_pretrained(tmp_path / "adapter")
    config = FalqonConfig(inner="eager")
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    torch.compile(model, backend="falqon", options=dict[str, Any](config=config))(IDS)
    fill_b(model, 0.05)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    falqon_fx.save_fp8(model, tmp_path / "expected", base=source, progress=False)
    arguments = ["--adapter", str(tmp_path / "adapter"), "--quiet"]
    arguments += ["--checkpoint", str(tmp_path / "trained")]
    assert run("export", str(source), str(tmp_path / "out"), *arguments) == 0
    assert "14 were cast from their base weights" in capsys.readouterr().out
    assert read(tmp_path / "out") == read(tmp_path / "expected")


@pytest.mark.parametrize("form", ["compressed-tensors", "fp8"])
def test_export_of_a_peft_adapter_on_the_command_line(tmp_path, capsys, form):
    dense = dense_model()
    source = folder_of(dense, tmp_path / "dense")
    model = peft.get_peft_model(dense, lora())
    fill_b(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ("--adapter", str(tmp_path / "adapter"), "--form", form, "--quiet")
    assert run("export", str(source), str(tmp_path / "out"), *arguments) == 0
    printed = capsys.readouterr().out
    assert f"14 layers in FP8 ({form})" in printed
    assert "14 were cast from their base weights" in printed
    assert run("export", str(source), str(tmp_path / "other")) == 1
    assert "--adapter: is missing" in capsys.readouterr().err


def trained_folders(tmp_path: Path) -> tuple[Path, Path]:
    """A prequantized model, and the adapter that was trained on it, with a tokenizer of its own."""
    source = folder_of(dense_model(), tmp_path / "dense")
    (source / "tokenizer.json").write_text("{}")
    prequantize(source, tmp_path / "fp8")
    model = falqon_fx.load(tmp_path / "fp8")
    fill_b(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    falqon_fx.save_fp8(model, tmp_path / "expected", progress=False)
    return tmp_path / "fp8", tmp_path / "adapter"


def test_export_of_an_adapter_that_was_trained_on_a_prequantized_model(tmp_path, capsys):
    """It is used, and the tokenizer is written: the adapter's, where it has one."""
    fp8, adapter = trained_folders(tmp_path)
    words = ["--adapter", str(adapter), "--quiet"]
    assert run("export", str(fp8), str(tmp_path / "out"), *words) == 0
    assert "without training" not in capsys.readouterr().out
    assert read(tmp_path / "out") == read(tmp_path / "expected")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    (adapter / "tokenizer.json").write_text('{"added_tokens": []}')
    assert run("export", str(fp8), str(tmp_path / "again"), *words, "--json") == 0
    report = TypeAdapter(ExportReport).validate_json(capsys.readouterr().out)
    assert "tokenizer.json" in report.files
    assert "added_tokens" in (tmp_path / "again/tokenizer.json").read_text()
    assert run("export", str(fp8), str(tmp_path / "untrained"), "--quiet") == 0
    assert "this is the model without training" in capsys.readouterr().out


def test_export_refuses_an_adapter_that_it_would_ignore(tmp_path, capsys):
    """Wholly, or some of its tensors. PEFT says nothing, or warns."""
    fp8, adapter = trained_folders(tmp_path)
    file = adapter / "adapter_model.safetensors"
    whole = safetensors.load_file(file)
    dense, out = tmp_path / "dense", tmp_path / "out"

    def refused(model: Path, *words: str) -> str:
        assert run("export", str(model), str(out), *words, "--quiet") in (1, 2)
        assert not out.exists()
        return " ".join(capsys.readouterr().err.split())

    assert "'does-not-exist' does not exist" in refused(fp8, "--adapter", "does-not-exist")
    assert "its config can't be read" in refused(fp8, "--adapter", str(dense))
    first = next(iter(whole))
    for model in (fp8, dense):
        safetensors.save_file({n: t for n, t in whole.items() if n != first}, file)
        said = refused(model, "--adapter", str(adapter))
        assert f"1 LoRA tensors are in it or in the model alone, first {first}" in said
        safetensors.save_file(
            {n.replace("layers.1.", "layers.7."): t for n, t in whole.items()}, file
        )
        assert "LoRA tensors are in it or in the model alone" in refused(
            model, "--adapter", str(adapter)
        )
        safetensors.save_file({n: t[:, :5].contiguous() for n, t in whole.items()}, file)
        assert "it doesn't fit" in refused(model, "--adapter", str(adapter))
        file.unlink()
        assert "it has neither adapter_model.safetensors" in refused(
            model, "--adapter", str(adapter)
        )


def test_export_checks_its_words_before_it_loads_a_model(tmp_path, capsys, monkeypatch):
    fp8, adapter = trained_folders(tmp_path)
    monkeypatch.setattr("falqon_fx_cli.export.Export._trained_model", None)
    (tmp_path / "empty").mkdir()
    for words, said in (
        ([str(fp8), str(tmp_path / "dense")], "exists already"),
        ([str(fp8), "out", "--max-shard-size", "large"], "is no size of a file"),
        ([str(tmp_path / "empty"), "out"], "it has no config.json"),
        ([str(fp8), "out", "--base", str(tmp_path / "empty")], "it has no config.json"),
        ([str(fp8), "out", "--checkpoint", str(tmp_path / "empty")], "there is no checkpoint.json"),
        ([str(tmp_path / "dense"), "out"], "--adapter: is missing"),
    ):
        assert run("export", *words, "--json") == 1
        found = capsys.readouterr()
        assert said in found.err
        assert said in json.loads(found.out)["error"]
    model = falqon_fx.load(fp8)
    falqon_fx.save_checkpoint(model, tmp_path / "trained")
    words = ["--adapter", str(adapter), "--checkpoint", str(tmp_path / "trained")]
    assert run("export", str(fp8), "out", *words) == 1
    assert "brings its own adapter" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["terminal", "pipe", "quiet"])
def test_export_shows_its_progress_on_a_terminal_alone(tmp_path, capsys, where):
    """And leaves the report there, not the bar."""
    source = folder_of(dense_model(), tmp_path / "dense")
    prequantize(source, tmp_path / "fp8")
    arguments = ["--max-shard-size", "10KB", *(["--quiet"] if where == "quiet" else [])]
    rich.reconfigure(force_terminal=where != "pipe", force_interactive=where != "pipe", width=80)
    try:
        assert run("export", str(tmp_path / "fp8"), str(tmp_path / "out"), *arguments) == 0
    finally:
        rich.reconfigure()
    printed = capsys.readouterr()
    assert ("exporting" in printed.out) is (where == "terminal")
    assert "14 layers in FP8" in printed.out
    assert "exporting" not in printed.err
    if where == "terminal":
        steps = re.findall(r"([\d.]+)/([\d.]+) kB", printed.out)
        assert steps[-1][0] == steps[-1][1] == max(whole for _, whole in steps)
