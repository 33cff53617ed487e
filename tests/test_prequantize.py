"""Models that never exist in dense form: `prequantize`, `load`, and FP8 checkpoints of others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import (
    FalqonConfig,
    FalqonError,
)
from falqon_fx.files import atomic
from falqon_fx.files.disk import lock
from falqon_fx.files.loading import MANIFEST
from falqon_fx.files.storage import DamagedFileError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.rows.prepared import MergedBaseLinear
from tests.models import fill_b
from tests.parameters import each_pair
from tests.test_checkpoint_refusals import rewrite_format

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
