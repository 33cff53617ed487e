"""Files with right checksums and wrong contents, as whoever wrote them could have made them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.checkpoint import MANIFEST
from tests.attack import harness
from tests.attack.checkpoints import fp8_of_others
from tests.attack.crafted import FILES, INDEX, model_and_optimizer, quietly
from tests.models import tiny_mlp

UPDATES = pytest.mark.parametrize("update", ["adapter", "rows"])


# -- sizes, dtypes and values of tensors, checksums right ------------------------------------------


@contextmanager
def rewritten(folder: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
    """The tensors and the manifest of a checkpoint, written anew with right checksums."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (file,) = folder.glob("tensors-*")
    tensors = load_file(file)
    yield tensors, manifest
    manifest["files"] = {file.name: storage.write_tensors(file, tensors)}
    harness.resealed(folder / MANIFEST, manifest)


def larger(t: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1)] * 4096).contiguous()


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "larger": larger,
    "more rows": lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]),
    "empty": lambda t: t.reshape(-1)[:0].clone(),
    "of another width": lambda t: t.to(torch.float64),
    "of another dimension": lambda t: t[None].clone(),
}
OF_LAYER = {
    "adapter": ("code", "scale", "digest"),
    "rows": ("code", "scale", "applied", "counters", "writes", "origin"),
}


@UPDATES
@pytest.mark.parametrize("loaded_is_prepared", [True, False], ids=["prepared", "plain"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_tensor_of_another_size_is_refused_by_its_layer(
    tmp_path, update, loaded_is_prepared, how
):
    """Every tensor of a prepared layer, the adapters', and the optimizer's, one at a time."""
    saved, optimizer = model_and_optimizer(update)
    falqon_fx.save_checkpoint(saved, tmp_path / "whole", optimizer=optimizer)
    layer = "base_model.model.0.base_layer"
    names = [f"{layer}.{name}" for name in OF_LAYER[update]]
    names += ["base_model.model.0.lora_A.default.weight"]
    if how != "of another width":  # which an optimizer casts to its parameter's
        names += [f".training.optimizer.state.0.{name}" for name in ("exp_avg", "exp_avg_sq")]

    def attack(name: str) -> harness.Verdict:
        folder = harness.copy_of(tmp_path / "whole", tmp_path / "changed")
        with rewritten(folder) as (tensors, _):
            tensors[name] = CHANGES[how](tensors[name])
        model, other = model_and_optimizer(update, 1, loaded_is_prepared)
        state = functools.partial(lambda: harness.contents(model, other.state_dict()))
        load = functools.partial(falqon_fx.load_checkpoint, model, folder, optimizer=other)
        return harness.verdict(load, state, "no state is right")

    found = harness.verdicts([functools.partial(attack, name) for name in names])
    assert found == ["refused"] * len(names), dict(zip(names, found))


@UPDATES
def test_a_state_outside_of_modules_is_of_the_sizes_of_its_weight(tmp_path, update):
    if update == "adapter":
        pytest.skip("it has none")
    torch.manual_seed(0)
    model = tiny_mlp()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    compiled = torch.compile(model, backend="falqon", options={"update": "rows", "inner": "eager"})
    compiled(torch.randn(4, 32)).sum().backward()
    falqon_fx.save_checkpoint(model, tmp_path / "whole")
    with rewritten(tmp_path / "whole") as (tensors, _):
        names = [name for name in tensors if name.startswith(".sites.")]
    assert len(names) == 12
    for name in names:
        for how in ("larger", "more rows", "of another width"):
            folder = harness.copy_of(tmp_path / "whole", tmp_path / "changed")
            with rewritten(folder) as (tensors, _):
                tensors[name] = CHANGES[how](tensors[name])
            before = harness.contents(model)
            with pytest.raises(FalqonError, match="base_layer"):
                falqon_fx.load_checkpoint(model, folder)
            assert harness.contents(model) == before


@pytest.mark.parametrize("key", ["lora_a", "lora_b", "weight"])
def test_a_state_outside_of_modules_is_of_parameters(tmp_path, key):
    """A buffer of the right size is none of the three."""
    torch.manual_seed(0)
    model = tiny_mlp()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    compiled = torch.compile(model, backend="falqon", options={"update": "rows", "inner": "eager"})
    compiled(torch.randn(4, 32)).sum().backward()
    falqon_fx.save_checkpoint(model, tmp_path)
    with rewritten(tmp_path) as (tensors, manifest):
        site = next(site for site in manifest["sites"] if "state" in site)
        path, _, last = site[key].rpartition(".")
        given = model.get_parameter(site[key]).detach().clone()
        site[key] = f"{path}.twin"
        tensors[site[key]] = given
        if key == "weight":
            tensors[f"{path}.{last}"] = given.clone()
    model.get_submodule(path).register_buffer("twin", given.clone())
    before = harness.contents(model)
    with pytest.raises(FalqonError, match=r"twin: .* a matrix there, the model none"):
        falqon_fx.load_checkpoint(model, tmp_path)
    assert harness.contents(model) == before


VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bytes .* NaN": lambda code, scale: code[3].fill_(0x7F),
    "1 of its FP8 bytes .* NaN": lambda code, scale: code[0, :1].fill_(0xFF),
    "scales .* NaN": lambda code, scale: scale[2].fill_(math.nan),
    "scales .* Inf": lambda code, scale: scale[2].fill_(math.inf),
    "scales .* zero": lambda code, scale: scale[2].fill_(0.0),
    "scales .* negative": lambda code, scale: scale[2].fill_(-1.0),
}


@UPDATES
@pytest.mark.parametrize("problem", VALUES)
def test_a_checkpoint_whose_weights_are_no_numbers_is_refused(tmp_path, update, problem):
    saved, _ = model_and_optimizer(update)
    falqon_fx.save_checkpoint(saved, tmp_path)
    with rewritten(tmp_path) as (tensors, _):
        layer = "base_model.model.0.base_layer"
        VALUES[problem](tensors[f"{layer}.code"], tensors[f"{layer}.scale"].view(torch.float32))
    model, _ = model_and_optimizer(update, 1)
    before = harness.contents(model)
    with pytest.raises(FalqonError, match=problem) as caught:
        falqon_fx.load_checkpoint(model, tmp_path)
    assert caught.value.site == layer
    assert harness.contents(model) == before


@pytest.mark.parametrize("problem", VALUES)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_a_base_of_others_that_is_no_numbers_is_refused(tmp_path, problem, granularity):
    torch.manual_seed(0)
    folder = fp8_of_others(tmp_path)
    (file,) = folder.glob("*.safetensors")
    tensors, name = load_file(file), "model.layers.0.mlp.up_proj"
    scale = tensors[f"{name}.weight_scale"]
    if granularity == "tensor":
        scale = scale[:3].clone()
    VALUES[problem](tensors[f"{name}.weight"].view(torch.uint8), scale)
    tensors[f"{name}.weight_scale"] = scale[2].clone() if granularity == "tensor" else scale
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FalqonError, match=problem) as caught:
        falqon_fx.load(folder)
    assert caught.value.site.startswith(f"base_model.model.{name}")


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("how", [*CHANGES, "integers"])
def test_a_tensor_of_others_of_another_size_is_refused(tmp_path, name, how):
    if (name, how) == ("model.norm.weight", "of another width"):
        pytest.skip("a norm in float64 is one")
    folder = fp8_of_others(tmp_path)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    changes = CHANGES | {"integers": lambda t: t.float().to(torch.int8)}
    tensors[name] = changes[how](tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FalqonError):
        falqon_fx.load(folder)


@pytest.mark.parametrize("name", ["code", "base_layer.digest"])
def test_a_tensor_beside_an_fp8_weight_does_not_take_its_place(tmp_path, name):
    """It would come after the weight was compared with its scale and looked at for NaN."""
    folder = fp8_of_others(tmp_path)
    layer = "model.layers.0.mlp.up_proj"
    own = falqon_fx.load(folder).get_submodule(f"base_model.model.{layer}.base_layer").state_dict()
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{layer}.{name}"] = own[name.rpartition(".")[2]].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FalqonError, match="has it twice, as FP8 weight and beside it"):
        falqon_fx.load(folder)


@UPDATES
def test_a_state_dict_of_other_sizes_leaves_a_prepared_layer_as_it_was(update):
    """torch itself would write the tensors that fit before it raises for the others."""
    model, _ = model_and_optimizer(update)
    layer = model.base_model.model[0].base_layer
    for how, change in CHANGES.items():
        for assign in (False, True):
            state = {name: t.clone() + 1 for name, t in layer.state_dict().items()}
            state["scale"] = change(state["scale"])
            before = harness.contents(layer)
            with pytest.raises(FalqonError, match="its scale is"):
                layer.load_state_dict(state, assign=assign)
            assert harness.contents(layer) == before, how


@UPDATES
def test_a_part_of_an_fp8_weight_is_no_state(update):
    model, _ = model_and_optimizer(update)
    layer = model.base_model.model[0].base_layer
    before = harness.contents(layer)
    for name in layer.STATE:
        state = {name: layer.state_dict()[name] + 1}
        with pytest.raises(FalqonError, match="a part of its FP8 weight"):
            layer.load_state_dict(state, strict=False)
        assert harness.contents(layer) == before
    layer.load_state_dict({}, strict=False)


# -- what a parser chokes on -----------------------------------------------------------------------


DEEP = "[" * 100_000 + "]" * 100_000
RAW = {
    "deep": DEEP.encode(),
    "deep object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "a long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "nothing": b"",
    "null": b"null",
    "text": b'"a"',
}


@pytest.mark.parametrize("content", RAW.values(), ids=RAW)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("adapter", MANIFEST), *FILES, ("dense", INDEX), ("dense", "config.json")],
)
def test_what_is_no_such_file_is_refused_by_its_name(folders, kind, name, content):
    model, _ = model_and_optimizer()
    calls: dict[str, Callable[[], Any]] = {
        "adapter": lambda: falqon_fx.load_checkpoint(model, folders / kind),
        "dense": lambda: falqon_fx.prequantize(folders / kind, folders / "no", progress=False),
    }
    call = calls.get(kind, lambda: falqon_fx.load(folders / kind))
    with harness.damaged(folders / kind / name, content), pytest.raises(FalqonError) as caught:
        quietly(call)
    assert name in str(caught.value)
    assert not (folders / "no").exists()


def test_a_config_of_more_layers_than_tensors_is_refused_before_they_are_made(folders):
    """Of a checkpoint of others, whose config.json has no checksum."""
    folder = folders / "fp8"
    assert not (folder / "falqon.json").exists()
    file = folder / "config.json"
    for name, value in (("num_hidden_layers", 10**9), ("head_dim", 10**12)):
        content = json.loads(file.read_text()) | {name: value}
        with (
            harness.damaged(file, json.dumps(content).encode()),
            pytest.raises(FalqonError, match=f"it says {name}={value}"),
        ):
            falqon_fx.load(folder)
