"""What goes into other programs. Where one is not installed, a stand-in has the part of its
interface that its version on PyPI has: Axolotl 0.19.0, LLaMA-Factory 0.9.5, ms-swift 4.6.0;
of OneTrainer, which is not there, that of its commit 23df3832e8.
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import torchtune
import transformers
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchtune.models.llama2 import lora_llama2

import falqon_fx
from falqon_fx.integrations.transformers import FalqonCallback
from tests.models import Net, tiny_llama
from tests.pages import blocks
from tests.scripts import load

SCRIPTS = Path(__file__).parents[2] / "examples" / "integrations"
SITES = 7

StandIn = Callable[..., types.ModuleType]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    def make(name: str, **attributes: Any) -> types.ModuleType:
        parts = name.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[: i + 1])
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        vars(sys.modules[name]).update(attributes)
        return sys.modules[name]

    return make


def trains(callbacks: list[Any], folder: Path) -> None:
    """A trainer with these callbacks trains the adapters of a model, and no more than them."""
    model = tiny_llama(layers=1)
    ids = torch.randint(0, 64, (4, 10))
    args = transformers.TrainingArguments(
        str(folder), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, args, train_dataset=data, callbacks=callbacks).train()
    assert len(falqon_fx.adapters(model)) == SITES


def test_axolotl_gets_the_callback_from_its_yaml(stand_in, monkeypatch, tmp_path):
    stand_in("axolotl.integrations.base", BasePlugin=object)
    monkeypatch.delitem(sys.modules, "falqon_fx.integrations.axolotl", raising=False)
    module = importlib.import_module("falqon_fx.integrations.axolotl")
    plugin = module.FalqonPlugin()
    path, _, name = plugin.get_input_args().rpartition(".")
    known = getattr(importlib.import_module(path), name)
    wanted = {"prepare": True, "config": {"inner": "eager", "granularity": "tensor"}}
    cfg = types.SimpleNamespace(falqon=known(falqon=wanted).falqon)
    (callback,) = plugin.add_callbacks_pre_trainer(cfg, None)
    assert callback.prepare
    assert callback.config.granularity == "tensor"
    assert cfg.falqon == wanted
    trains([callback], tmp_path)
    (bare,) = plugin.add_callbacks_pre_trainer(types.SimpleNamespace(falqon=known().falqon), None)
    assert bare.config == falqon_fx.FalqonConfig()


def test_ms_swift_gets_the_callback_by_name(stand_in):
    known: dict[str, Any] = {"lisa": object}
    stand_in("swift.callbacks", callbacks_map=known)
    load(SCRIPTS / "swift_plugin.py")
    assert isinstance(known["falqon"](None, None), FalqonCallback)


def test_llama_factory_gets_the_callback(stand_in):
    calls: list[Any] = []

    def run_exp(args: Any = None, callbacks: Any = None) -> None:
        calls.extend(callbacks)

    stand_in("llamafactory.train.tuner", run_exp=run_exp)
    source = (SCRIPTS / "llamafactory_train.py").read_text()
    exec(compile(source, "llamafactory_train.py", "exec"), {"__name__": "__main__"})
    (callback,) = calls
    assert isinstance(callback, FalqonCallback)


@pytest.mark.slow  # its variable has no place for options, so Inductor compiles
def test_torchtune_takes_the_backend_from_its_variable(monkeypatch, graphs):
    """Layer by layer, as its recipes do with ``compile=True``. The package around this file wants a
    torchao older than the one at hand.
    """
    compile_model = load(Path(torchtune.__file__).parent / "training" / "_compile.py").compile_model
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "falqon")
    model = lora_llama2(
        ["q_proj", "v_proj"], apply_lora_to_mlp=True, vocab_size=64, num_layers=2, num_heads=4,
        num_kv_heads=2, embed_dim=32, intermediate_dim=48, max_seq_len=16, lora_rank=4,
        lora_alpha=8.0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    compile_model(model, verbose=False)
    model(torch.randint(0, 64, (2, 8))).sum().backward()
    assert [len(graph.sites) for graph in graphs][-1] == 5
    assert len(falqon_fx.adapters(model)) == 10


class OneTrainersLoRA(nn.Module):
    """Its LoRAModule, as far as a linear layer goes: outside of the model, alpha as a buffer."""

    def __init__(self, prefix: str, orig_module: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self._orig_module = rank, [orig_module]  # a list is not registered
        self.dropout = nn.Dropout(0)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.lora_down = nn.Linear(orig_module.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, orig_module.out_features, bias=False)

    def hook_to_module(self) -> None:
        self.orig_forward = self._orig_module[0].forward
        self._orig_module[0].forward = self.forward  # type: ignore[assignment,method-assign]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.orig_forward(x) + self.delta_forward(x, *args, **kwargs)

    def delta_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.lora_up(self.dropout(self.lora_down(x))) * (self.alpha / self.rank)


class OneTrainersCheckpoint(nn.Module):
    """Its CheckpointLayer around a block."""

    def __init__(self, orig_module: nn.Module) -> None:
        super().__init__()
        self.checkpoint, self.dummy = orig_module, torch.zeros(1, requires_grad=True)

    def _run(self, dummy: torch.Tensor, *args: Any) -> Any:
        return self.checkpoint(*args)

    def forward(self, *args: Any) -> Any:
        run = torch.utils.checkpoint.checkpoint
        return run(self._run, self.dummy, *args, use_reentrant=False)


@pytest.mark.slow  # it has no place for options, so Inductor compiles
def test_onetrainer_trains_loras_on_falqon(stand_in, monkeypatch, graphs):
    """In the order of its GenericTrainer: blocks are compiled, then LoRAs hooked in. The gradients
    are those of autograd to the errors of FP8: of E4M3 in x, W and A (2.6% each, root mean square)
    and of E5M2 in dL/dO (5.3%), so 7% a layer and 14% through four, a cosine of 0.990; 20% are
    allowed.
    """
    module = stand_in("modules.module.LoRAModule", LoRAModule=OneTrainersLoRA)
    layers = stand_in("modules.util.checkpointing_util", CheckpointLayer=OneTrainersCheckpoint)
    monkeypatch.setattr(OneTrainersCheckpoint, "compile", nn.Module.compile)  # put back behind it
    monkeypatch.setattr(sys, "path", [*sys.path])

    def gradients(lora: Any, compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(2)]
        net = nn.Sequential(*map(layers.CheckpointLayer, blocks)).requires_grad_(False)
        if compiled:
            for layer in net:
                layer.compile(fullgraph=True)
        of = [lora(f"{i}.{j}", blocks[i][j], 4, 8.0) for i in range(2) for j in (0, 2)]
        for one in of:
            nn.init.normal_(one.lora_up.weight, std=0.1)
            one.hook_to_module()
        net(torch.randn(8, 64)).square().mean().backward()
        return [p.grad for one in of for p in one.parameters()]

    found: list[torch.Tensor] = []

    def train(path: str, run_name: str) -> None:
        assert (path, run_name) == ("scripts/train.py", "__main__")
        found.extend(gradients(module.LoRAModule, compiled=True))

    monkeypatch.setattr(runpy, "run_path", train)
    source = (SCRIPTS / "onetrainer_train.py").read_text()
    exec(compile(source, "onetrainer_train.py", "exec"), {"__name__": "__main__"})
    assert [[site.adapters for site in graph.sites] for graph in graphs] == [[1, 1], [1, 1]]
    assert not any(graph.rejected for graph in graphs)
    for grad, wanted in zip(found, gradients(OneTrainersLoRA, compiled=False), strict=True):
        assert F.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > 0.98


@pytest.mark.slow
def test_diffusers_trains_and_saves_a_lora(monkeypatch, tmp_path):
    script = load(SCRIPTS / "image_lora.py")
    monkeypatch.setattr(sys, "argv", ["image_lora.py", "--out", str(tmp_path)])
    losses = script.main()
    assert sum(losses[-5:]) < sum(losses[:5])
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    for_comfyui = files.pop("comfyui.safetensors")
    (saved,) = files.values()
    assert saved
    for name, tensor in saved.items():
        path, part = re.fullmatch(r"unet\.(.*)\.lora\.(up|down)\.weight", name).groups()
        kohyas = f"lora_unet_{path.replace('.', '_')}"
        assert torch.equal(for_comfyui.pop(f"{kohyas}.lora_{part}.weight"), tensor)
        if part == "down":
            assert for_comfyui.pop(f"{kohyas}.alpha") == len(tensor)
    assert not for_comfyui


def assert_within_half_a_step(
    codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> None:
    """Of E4M3: 2^-4 of a normal number, 2^-10 among the smallest."""
    assert (codes.dtype, scale.dtype, scale.dim()) == (torch.float8_e4m3fn, torch.float32, 0)
    error = (codes.float() * scale - weight).abs()
    assert (error <= (weight.abs() * 2**-4).clamp(min=float(scale) * 2**-10)).all()


def test_comfyuis_form_has_a_scale_a_layer(tmp_path):
    model = Net()
    with torch.no_grad():
        model.up.weight[0, 0] = 3.0  # its scale is none of the others'
    layers = load(SCRIPTS / "comfyui.py").write_comfyui(model, tmp_path / "net.safetensors")
    assert layers == ["up", "plain", "down"]
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as saved:
        about = json.loads(saved.metadata()["_quantization_metadata"])
        assert about == {
            "format_version": "1.0",
            "layers": {path: {"format": "float8_e4m3fn"} for path in layers},
        }
        for path in layers:
            codes, scale = (saved.get_tensor(f"{path}.{n}") for n in ("weight", "weight_scale"))
            assert_within_half_a_step(codes, scale, model.get_submodule(path).weight)
        assert torch.equal(saved.get_tensor("up.bias"), model.up.bias)


def of_its_authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A Z-Image of diffusers as its authors' file has it: other names, and q, k and v in one."""
    renamed = {
        "to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm",
        "all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder",
    }  # fmt: skip
    found: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state.items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        found.setdefault(re.sub(r"to_[qkv]\b", "qkv", name), []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in found.items()}


TINY: dict[str, Any] = {
    "dim": 64, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "n_refiner_layers": 1,
    "cap_feat_dim": 96, "axes_dims": [8, 12, 12],
}  # fmt: skip


def test_comfyui_gets_the_names_of_its_own_file(tmp_path):
    """And no values of it. Under diffusers' names ComfyUI would read codes without their scales."""
    write = load(SCRIPTS / "comfyui.py").write_comfyui
    model = ZImageTransformer2DModel(**TINY)
    wanted, of_another = (
        of_its_authors(one.state_dict())
        for one in (model, ZImageTransformer2DModel(**{**TINY, "dim": 128, "n_heads": 4}))
    )
    base, other, file = (tmp_path / name for name in ("base", "other", "file"))
    checkpoint = {f"model.diffusion_model.{n}": torch.zeros_like(t) for n, t in wanted.items()}
    save_file({**checkpoint, "first_stage_model.weight": torch.zeros(3)}, base)
    save_file(of_another, other)
    with pytest.raises(ValueError, match="original="):
        write(model, file)
    with pytest.raises(ValueError, match="128 rows for the 64 of"):
        write(model, file, original=other)

    layers = write(model, file, original=base)
    saved = load_file(file)
    assert {"layers.0.attention.qkv", "cap_embedder.1", "final_layer.linear"} <= {*layers}
    for path in layers:
        codes, scale = saved.pop(f"{path}.weight"), saved.pop(f"{path}.weight_scale")
        assert_within_half_a_step(codes, scale, wanted.pop(f"{path}.weight"))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


def test_an_adapter_is_merged_for_comfyui_as_the_page_says(tmp_path, monkeypatch):
    """Into the base as it was loaded: its weights move by B · A, of which FP8 keeps all but half a
    step.
    """
    monkeypatch.chdir(tmp_path)
    model = ZImageTransformer2DModel(**TINY)
    before = of_its_authors(model.state_dict())
    save_file(before, "z_image_turbo_bf16.safetensors")
    trained = copy.deepcopy(model)
    trained.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]))
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    layers = get_peft_model_state_dict(trained)
    ZImagePipeline.save_lora_weights("lora", transformer_lora_layers=layers)
    write = load(SCRIPTS / "comfyui.py").write_comfyui
    (code,) = [c for c in blocks(SCRIPTS.parents[1] / "docs/use.md") if "write_comfyui" in c]
    exec(code, {"base": model, "write_comfyui": write})

    saved, path = load_file("model_fp8.safetensors"), "layers.0.attention.qkv"
    factors = [layers[f"layers.0.attention.to_q.lora_{part}.weight"] for part in "BA"]
    merged = before[f"{path}.weight"].clone()
    merged[:64] += factors[0] @ factors[1]
    codes, scale = saved[f"{path}.weight"], saved[f"{path}.weight_scale"]
    assert_within_half_a_step(codes, scale, merged)
