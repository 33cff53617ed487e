"""Mixtures of experts that are published in FP8 with a scale per block: loaded, prequantized,
trained, resumed, exported.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.files.public_names import without_left_out
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.stacks import Fp8Stack
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests import zoo
from tests.fp8_mixtures import (
    SIZE,
    as_deepseek_publishes_v4,
    dense,
    lora,
    published,
    saved_by_transformers,
    tensors_in,
)
from tests.parameters import slow
from tests.refusals import Change, assert_refused, damaged, lose, put, put_byte
from tests.training import adam

pytestmark = pytest.mark.filterwarnings("ignore:.*one FP8 scale per block")
IDS = torch.arange(24).reshape(2, 12) % 37
SPEC = SiteSpec.from_config(FalqonConfig())
OPTIONS: dict[str, Any] = {"config": FalqonConfig(inner="eager")}
MORE = [slow("minimax_m2", "float"), slow("glm4_moe", "float"), slow("glm4_moe", "ue8m0")]


def bases(model: nn.Module) -> dict[str, Tensor]:
    """dq(W) of what is in FP8, by the model's own names, stacks as [E, out, in]."""
    found = {}
    for path, module in model.named_modules():
        name = path.replace(".base_layer", "").removeprefix("base_model.model.")
        if isinstance(module, Fp8Stack):
            found[name.removesuffix("_fp8")] = module.dequantized().float()
        elif isinstance(module, Fp8Linear):
            found[f"{name}.weight"] = module.base().dequantize()
    return found


def by_row(weight: Tensor) -> Tensor:
    """A weight or a stack cast with a scale per row."""
    flat = weight.reshape(-1, weight.shape[-1])
    return cast_base(flat, SPEC).dequantize().view(weight.shape)


def steps(call: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = call(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("family", "scales"),
    [
        slow("deepseek_v3", "ue8m0"),
        slow("qwen3_moe", "float"),
        slow("deepseek_v4", "ue8m0"),
        ("deepseek_v4", "mxfp4"),
        slow("qwen3", "float"),
        *MORE,
    ],
)
def test_it_is_loaded_trained_resumed_and_exported(family, scales, tmp_path):
    """DeepSeek V4 with experts in FP8 and, as it is published, in MXFP4 and under its own names."""
    folder = published(family, tmp_path, "ue8m0" if scales == "mxfp4" else scales)
    if scales == "mxfp4":
        folder = as_deepseek_publishes_v4(folder, tmp_path / "deepseek")
    torch.manual_seed(0)
    model = falqon_fx.load(folder, lora(family)).train()
    call, optimizer = torch.compile(model, backend="falqon", options=OPTIONS), adam(model)
    own = bases(model)
    stacks = [name for name in own if ".experts." in name]
    assert bool(stacks) is (family != "qwen3")  # which is no mixture
    for name, weight in dense(folder, own).items():
        assert torch.equal(own[name], by_row(weight)), name
    first = steps(call, optimizer, 4)
    falqon_fx.save_checkpoint(model, tmp_path / "kept", optimizer=optimizer)
    kept = [p.detach().clone() for p in model.parameters()]
    wanted = steps(call, optimizer, 2)
    assert wanted[-1] < first[0]
    falqon_fx.load_checkpoint(model, tmp_path / "kept", optimizer=optimizer)
    assert steps(call, optimizer, 2) == wanted
    other = falqon_fx.load(folder, lora(family))
    falqon_fx.load_checkpoint(other, tmp_path / "kept", optimizer=adam(other))
    assert all(map(torch.equal, other.parameters(), kept))
    assert all(torch.equal(weight, own[name]) for name, weight in bases(other).items())
    falqon_fx.save_fp8(other, tmp_path / "served", progress=False)
    again = bases(falqon_fx.load(tmp_path / "served", lora(family)))
    assert again.keys() >= set(stacks)
    moved = [name for name in stacks if not torch.equal(again[name], own[name])]
    assert moved == stacks  # by their adapters
    if family == "deepseek_v4":  # by the names that engines read, too
        ignore = json.loads((tmp_path / "served/config.json").read_text())["quantization_config"]
        left = {"self_attn.o_a_proj", "attn.wo_a", "mlp.gate", "ffn.gate"}
        assert {f"model.layers.0.{name}" for name in left} <= set(ignore["ignore"])
    read = transformers.CompressedTensorsConfig(dequantize=True)
    for name, weight in dense(tmp_path / "served", again, quantization_config=read).items():
        assert torch.equal(again[name], weight), name
    other.save_pretrained(tmp_path / "adapter")
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    parts = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").state_dict()
    trained = {name: p for name, p in other.named_parameters() if ".lora_" in name}
    assert all(torch.equal(parts[name], p) for name, p in trained.items())
    merged: Any = falqon_fx.merge_and_unload(other)
    merged.save_pretrained(tmp_path / "merged")
    names = dict(merged.named_parameters())
    for name, weight in dense(tmp_path / "merged", names).items():
        assert torch.equal(names[name].float(), weight), name


@pytest.mark.parametrize(
    ("family", "scales"), [slow("deepseek_v3", "ue8m0"), ("qwen3_moe", "float"), *MORE]
)
def test_prequantize_takes_what_load_does(family, scales, tmp_path):
    """Layers too small to gain, which have no adapter, are decoded."""
    folder, out = published(family, tmp_path, scales), tmp_path / "out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        falqon_fx.prequantize(folder, out, lora(family), progress=False)
    said = any("cast again here" in str(each.message) for each in caught)
    assert said is (scales == "float")
    wanted, model = bases(falqon_fx.load(folder, lora(family))), falqon_fx.load(out)
    found = bases(model)
    assert {name for name in wanted if "experts." in name} & found.keys()
    left = dict(model.named_parameters())
    for name, weight in dense(folder, wanted).items():
        if name in found:
            assert torch.equal(found[name], wanted[name]), name
        else:
            kept = left[f"base_model.model.{name}"]
            assert torch.equal(kept, weight.bfloat16()), name
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("names", "scales"), [slow("transformers", "float"), ("deepseek", "ue8m0")]
)
def test_deepseek_v4_is_taken_as_it_is_published(names, scales, tmp_path):
    """Weights in groups, which are no linear layers, are decoded; four bits are cast to FP8, which
    has all their values as long as the scales of a row differ by 2^13 at most.
    """
    folder = published("deepseek_v4", tmp_path, scales)
    if names == "deepseek":
        folder = as_deepseek_publishes_v4(folder, tmp_path / "deepseek")
    with warnings.catch_warnings():
        warnings.filterwarnings("error" if scales == "ue8m0" else "ignore", "falqon")
        model = falqon_fx.load(folder, lora("deepseek_v4"))
        falqon_fx.prequantize(folder, tmp_path / "out", lora("deepseek_v4"), progress=False)
    own, parts = bases(model), bases(falqon_fx.load(tmp_path / "out"))
    named = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    groups = "model.layers.1.self_attn.o_a_proj.weight"
    for name, weight in dense(folder, [*own, groups]).items():
        if name == groups:
            assert torch.equal(named[f"base_model.model.{name}"], weight.bfloat16())
            continue
        assert torch.equal(own[name], by_row(weight)), name
        assert torch.equal(parts.get(name, own[name]), own[name]), name
        if names == "deepseek" and ".experts." in name:
            assert name in parts
            assert torch.equal(own[name], weight), name
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in named.items() if "experts" in n and "lora_B" in n)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2"])
def test_what_transformers_has_cast_itself_is_taken(family, tmp_path):
    """It saves the weights of experts apart, and the scales of a stack in one tensor."""
    wanted = bases(falqon_fx.load(published(family, tmp_path, "ue8m0"), lora(family)))
    saved = tmp_path / "saved"
    assert any(name.endswith("experts.down_proj_scale_inv") for name in tensors_in(saved))
    falqon_fx.prequantize(saved, tmp_path / "out", lora(family), progress=False)
    for model in (falqon_fx.load(saved, lora(family)), falqon_fx.load(tmp_path / "out")):
        found = bases(model)
        assert [name for name in found if "experts." in name]
        assert all(torch.equal(base, wanted[name]) for name, base in found.items())


def test_stacks_that_are_kept_in_one_tensor_are_taken(tmp_path):
    family = "minimax_m3_vl_text"
    folder = saved_by_transformers(family, tmp_path, "ue8m0")
    tensors = tensors_in(folder)
    whole = sorted(n for n, t in tensors.items() if t.dim() == 3 and t.dtype == E4M3)
    assert whole
    falqon_fx.prequantize(folder, tmp_path / "out", lora(family), progress=False)
    for model in (falqon_fx.load(folder, lora(family)), falqon_fx.load(tmp_path / "out")):
        own = {name: base for name, base in bases(model).items() if ".experts." in name}
        for theirs, name in zip(whole, sorted(own), strict=True):
            scale = tensors[f"{theirs}_scale_inv"].float()
            scale = scale.repeat_interleave(SIZE[0], 1).repeat_interleave(SIZE[1], 2)
            assert torch.equal(own[name], by_row(tensors[theirs].float() * scale)), name
        model(input_ids=IDS, labels=IDS).loss.backward()


def test_the_text_model_of_a_larger_one_is_taken(tmp_path):
    """Qwen3.5 is published with its vision tower, a word more in the names of its text model."""
    torch.manual_seed(0)
    model: Any = zoo.build("qwen3_5_moe_text").bfloat16()
    model.save_pretrained(tmp_path)
    tensors = {}
    for name, tensor in tensors_in(tmp_path).items():
        theirs = name.replace("model.", "model.language_model.")
        tensors[theirs] = tensor.to(E4M3) if ".experts." in name else tensor
        if ".experts." in name:
            size = [-(-n // of_block) for n, of_block in zip(tensor.shape, SIZE, strict=True)]
            tensors[f"{theirs}_scale_inv"] = torch.randint(-3, 3, size).exp2()
    tensors |= {"mtp.fc.weight": torch.ones(2, 2), "model.visual.norm.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((tmp_path / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [*SIZE]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    given = lora("qwen3_5_moe_text")
    falqon_fx.prequantize(tmp_path, tmp_path / "out", given, progress=False)
    for found in (falqon_fx.load(tmp_path, given), falqon_fx.load(tmp_path / "out")):
        stacks = {name: base for name, base in bases(found).items() if ".experts." in name}
        assert stacks
        for name, weight in dense(tmp_path, stacks).items():
            assert torch.equal(stacks[name], by_row(weight)), name


class Stack(nn.Module):
    """What transformers leaves out of models of two sizes that were published."""

    _keys_to_ignore_on_load_unexpected = (r"layers\.1.*", r"layers\.2.*")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))


def test_a_layer_that_the_model_has_is_never_left_out():
    index = {f"layers.{i}.weight": "a.safetensors" for i in range(3)}
    index["layers.0.rotary_emb.inv_freq"] = "a.safetensors"
    assert [*without_left_out(Stack(), index)] == ["layers.0.weight", "layers.1.weight"]


# -- damaged ---------------------------------------------------------------------------------------

EXPERT = "model.layers.0.mlp.experts.2.up_proj"
OF_STACK = "model.layers.0.mlp.experts.down_proj_scale_inv"


# Of which layout, what is done to it, whose weight it is, and what is said of it.
DAMAGES: dict[str, tuple[str, Change, str, str]] = {
    "NaN scale": (
        "published",
        put_byte(f"{EXPERT}.weight_scale_inv", 0xFF),
        EXPERT,
        r"1 of its \d+ scales in .* are NaN",
    ),
    "no scale": ("published", lose(f"{EXPERT}.weight_scale_inv"), EXPERT, "holds no scale for it"),
    "no weight": (
        "published",
        lose(f"{EXPERT}.weight"),
        "experts",
        rf"no such layer|has no tensor '{EXPERT}\.weight'",
    ),
    "another shape": (
        "published",
        put(f"{EXPERT}.weight", lambda t: t[:, :32]),
        EXPERT,
        "as its scales, and blocks of 8 x 16",
    ),
    "INT8 beside it": (
        "published",
        put(f"{EXPERT}.weight", lambda t: t.float().char()),
        EXPERT,
        "has it in INT8, and model.* in FP8",
    ),
    "NaN in the scales of a stack": (
        "saved",
        put_byte(OF_STACK, 0xFF),
        r"experts(\.\d)?\.down_proj",  # an expert's, or the tensor of the stack
        r"\d of its \d+ scales in .* are NaN",
    ),
    "fewer scales of a stack": (
        "saved",
        put(OF_STACK, lambda t: t[:, 1:]),
        r"experts\.0\.down_proj",
        "as its scales, and blocks of 8 x 16",
    ),
    "twice the scales of a stack": (
        "saved",
        put(OF_STACK, lambda t: t.repeat(1, 2, 1)),
        r"experts\.0\.down_proj",
        "as its scales, and blocks of 8 x 16",
    ),
    "scales of fewer experts": (
        "saved",
        put(OF_STACK, lambda t: t[1:]),
        "experts",
        "not those of 4 experts",
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("qwen3_moe")
    published("qwen3_moe", folder, "ue8m0")
    return folder


def of_qwen() -> peft.LoraConfig:
    return lora("qwen3_moe")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_expert_is_refused_by_name(source, tmp_path, damage):
    layout, change, site, told = DAMAGES[damage]
    assert_refused(damaged(source / layout, tmp_path / "bad", change), site, told, lora=of_qwen)


def test_a_damaged_code_of_an_expert_is_refused_by_name(source, tmp_path):
    folder = damaged(source / "published", tmp_path / "bad", put_byte(f"{EXPERT}.weight", 0x7F))
    told = "1 of its FP8 bytes"
    assert_refused(folder, EXPERT, told, lora=of_qwen, in_codes=True)


IN_FOUR = "layers.0.ffn.experts.2.w3"
FOUR_BIT_DAMAGES: dict[str, tuple[Change, str]] = {
    "NaN scale": (put_byte(f"{IN_FOUR}.scale", 0xFF), r"1 of its \d+ scales in .* are NaN"),
    "no scale": (lose(f"{IN_FOUR}.scale"), "holds no scale for it"),
    "fewer scales": (
        put(f"{IN_FOUR}.scale", lambda t: t[:, :1]),
        " as its scales, and blocks of 1 x 32",
    ),
    "fewer codes": (
        put(f"{IN_FOUR}.weight", lambda t: t[:, :16]),
        " as its scales, and blocks of 1 x 32",
    ),
}


@pytest.mark.slow
def test_damaged_experts_in_four_bits_are_refused_by_name(tmp_path):
    folder = published("deepseek_v4", tmp_path, "ue8m0")
    whole = as_deepseek_publishes_v4(folder, tmp_path / "whole")
    for name, (change, told) in FOUR_BIT_DAMAGES.items():
        bad = damaged(whole, tmp_path / name / "bad", change)
        assert_refused(bad, IN_FOUR, told, lora=lambda: lora("deepseek_v4"))
