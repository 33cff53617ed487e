"""`load_checkpoint` refuses what does not fit before it changes anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.storage import DamagedFileError
from tests.models import fill_b, lora_b, tiny_llama, tiny_mlp
from tests.runs import PREPARED, ROWS, UPDATES, Run, base_in_half


def refused(model: nn.Module, folder: Path, **arguments: object) -> str:
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(FalqonError) as caught:
        falqon_fx.load_checkpoint(model, folder, **arguments)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    return str(caught.value)


@UPDATES
def test_another_base_weight_is_refused(tmp_path, update):
    first = Run(False, update=update)
    first.steps(0, 1)
    first.save(tmp_path)
    text = refused(Run(False, seed=1, update=update).model, tmp_path)
    assert "base_model.model.0.base_layer.weight" in text
    assert "not those that" in text


def test_another_base_weight_is_refused_where_it_is_freed(tmp_path):
    """By the bytes of its cast; those of another config are others too."""
    first = Run(False)
    first.steps(0, 1)
    first.save(tmp_path)
    for other in (Run(True, seed=1), Run(True, granularity="tensor")):
        text = refused(other.model, tmp_path)
        assert "base_model.model.0.base_layer.weight" in text
        assert "Prepare the same base model, with the config" in text
    Run(True).load(tmp_path)


def test_base_weights_that_are_in_fp8_are_not_in_the_file(tmp_path):
    """Nor twice where `prepare` freed them: the checkpoint holds A, B, biases and the FP8 bytes."""
    for prepared, weights in ((False, set()), (True, {"code", "scale", "digest"})):
        run, folder = Run(prepared), tmp_path / str(prepared)
        run.steps(0, 1)
        report = falqon_fx.save_checkpoint(run.model, folder, rng=False)
        (file,) = json.loads((folder / MANIFEST).read_text())["files"].values()
        expected = {
            f"base_model.model.{layer}.{name}"
            for layer in (0, 2)
            for name in ("lora_A.default.weight", "lora_B.default.weight", "base_layer.bias",
                         *(f"base_layer.{weight}" for weight in weights))
        }  # fmt: skip
        assert set(file["tensors"]) == expected
        assert report.sites == 2


def test_a_weight_that_was_written_since_its_cast_is_in_the_file(tmp_path):
    first, other = Run(False), Run(False)
    first.steps(0, 1)
    weight = first.model.base_model.model[0].base_layer.weight
    with torch.no_grad():
        weight += 1.0
    first.save(tmp_path)
    other.load(tmp_path)
    assert torch.equal(other.model.base_model.model[0].base_layer.weight, weight)


def test_bytes_that_were_averaged_are_not_saved(tmp_path):
    run = Run(True)
    with torch.no_grad():
        run.model.base_model.model[2].base_layer.code += 1
    with pytest.raises(FalqonError, match=r"base_model\.model\.2: the bytes of its FP8 base"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("saved", ["adapter", "rows"])
@PREPARED
def test_a_prepared_model_of_the_other_update_is_refused(tmp_path, prepared, saved):
    other = {"adapter": "rows", "rows": "adapter"}[saved]
    first = Run(prepared, update=saved)
    first.steps(0, 1)
    first.save(tmp_path)
    text = refused(Run(True, update=other).model, tmp_path)
    assert f'training with update="{saved}", prepare() made it for update="{other}"' in text
    assert "Call falqon_fx.restore(model) first" in text


@UPDATES
@PREPARED
def test_another_shape_is_refused(tmp_path, update, prepared):
    first = Run(prepared, update=update)
    first.steps(0, 1)
    first.save(tmp_path)
    torch.manual_seed(0)
    other = Run(prepared, model=tiny_mlp(r=8), update=update)
    assert "lora_A" in refused(other.model, tmp_path)


@UPDATES
@PREPARED
def test_another_dtype_of_a_base_weight_is_refused(tmp_path, update, prepared):
    """`applied` would be rounded, or the layer become one of another dtype."""
    Run(True, update=update).save(tmp_path)
    model = base_in_half(tiny_mlp(lora_dropout=0.0))
    text = refused(Run(prepared, model=model, update=update).model, tmp_path)
    assert "has float32 [48, 32], the model float16 [48, 32]" in text


def test_another_dtype_of_a_base_weight_that_is_not_freed_is_refused(tmp_path):
    first = Run(False)
    first.steps(0, 1)
    first.save(tmp_path)
    model = base_in_half(tiny_mlp(lora_dropout=0.0))
    text = refused(Run(False, model=model).model, tmp_path)
    assert "has float32 [48, 32], the model float16 [48, 32]" in text


def test_another_model_is_refused(tmp_path):
    first = Run(True)
    first.save(tmp_path)
    assert "but not in the model" in refused(tiny_llama(), tmp_path)


def test_a_checkpoint_without_an_optimizer_says_so(tmp_path):
    model = tiny_mlp()
    falqon_fx.save_checkpoint(model, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert "it holds no optimizer" in refused(model, tmp_path, optimizer=optimizer)


@pytest.mark.parametrize("saved", [1, 2])
def test_an_optimizer_with_other_groups_is_refused_before_anything_is_changed(tmp_path, saved):
    model = tiny_mlp()
    b = lora_b(model)
    one, two = torch.optim.AdamW(b), torch.optim.AdamW([{"params": b[:1]}, {"params": b[1:]}])
    optimizers = {1: one, 2: two}
    falqon_fx.save_checkpoint(model, tmp_path, optimizer=optimizers[saved])
    fill_b(model, 0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FalqonError, match=r"optimizer: its groups have"):
        falqon_fx.load_checkpoint(model, tmp_path, optimizer=optimizers[3 - saved])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_optimizer_is_refused_before_anything_is_changed(tmp_path):
    model = tiny_mlp()
    b = lora_b(model)
    falqon_fx.save_checkpoint(model, tmp_path, optimizer=torch.optim.AdamW(b))
    text = refused(model, tmp_path, optimizer=torch.optim.SGD(b, 0.1))
    assert "optimizer: it has the options ['dampening', 'momentum', 'nesterov'" in text
    scheduled = torch.optim.AdamW(b)
    torch.optim.lr_scheduler.ConstantLR(scheduled)  # adds an option to the groups
    falqon_fx.load_checkpoint(model, tmp_path, optimizer=scheduled)
    falqon_fx.save_checkpoint(model, tmp_path, optimizer=scheduled)
    falqon_fx.load_checkpoint(model, tmp_path, optimizer=torch.optim.AdamW(b))


def test_with_rows_compiling_with_other_options_after_loading_is_refused(tmp_path):
    first = Run(False, **ROWS)
    first.steps(0, 2)
    first.save(tmp_path)
    other = Run(False, **{**ROWS, "topk": 7})
    other.load(tmp_path)
    with pytest.raises(Exception, match="Compile with the options of the checkpoint") as caught:
        other.steps(2, 3)
    assert "topk=5" in str(caught.value)
    falqon_fx.restore(other.model)  # the remedy
    other.steps(2, 3)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FalqonError, match=r"there is no checkpoint\.json in it"):
        falqon_fx.load_checkpoint(tiny_mlp(), tmp_path)


@pytest.mark.parametrize("number", [2, 4])
def test_another_format_is_refused_with_the_remedy(tmp_path, number):
    falqon_fx.save_checkpoint(tiny_mlp(), tmp_path)
    file = tmp_path / MANIFEST
    rewrite_format(file, f"falqon_fx.checkpoint.{number}")
    text = refused(tiny_mlp(), tmp_path)
    assert f"{file}: its format is 'falqon_fx.checkpoint.{number}'" in text
    assert "reads 'falqon_fx.checkpoint.3'" in text
    assert "model.save_pretrained" in text
    rewrite_format(file, "something")
    with pytest.raises(DamagedFileError, match=r"its format is not 'falqon_fx\.checkpoint\.3'"):
        falqon_fx.load_checkpoint(tiny_mlp(), tmp_path)


def rewrite_format(file: Path, name: str) -> None:
    """As another falqon-fx would have written it, with a right checksum."""
    content = json.loads(file.read_text())
    del content["checksum"]
    storage.write_manifest(file, {**content, "format": name})
