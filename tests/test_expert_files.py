"""Stacked experts in files: exports, folders of `prequantize`, FP8 checkpoints of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from falqon_fx.files.expert_parts import own_names, parts_of, rearranged, stacks_of
from falqon_fx.integrations.peft import trace_param_wrappers
from falqon_fx.model.stacks import Fp8Stack
from falqon_fx.site.base import Base
from tests import zoo
from tests.emulation import E4M3, cast
from tests.models import fill_b
from tests.versions import needs_fsdp2_of_integers

pytest.importorskip("compressed_tensors")

BLOCK = "model.layers.0.mlp"
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], "target_parameters": STACKS}
IDS = torch.arange(24).reshape(2, 12) % 37
EXPERTS, INNER, HIDDEN = 4, 48, 64


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint of several files and their index, in bfloat16."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, vocab_size=40,
        head_dim=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_experts_per_tok=2, intermediate_size=64, use_cache=False, dtype="bfloat16",
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("source")
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


def adapted(source: Path, b_size: float = 0.05) -> Any:
    """PEFT's adapters on q_proj and all experts."""
    dtype, experts = torch.bfloat16, "grouped_mm"
    whole: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    whole.set_experts_implementation(experts)
    model: Any = peft.get_peft_model(whole, peft.LoraConfig(**LORA))
    if b_size:
        fill_b(model, b_size)
    trace_param_wrappers(model)
    return model


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def rows_of(model: Any) -> dict[str, Tensor]:
    """W + s · B · A of each stack by PEFT's own sum, float32 [E, out, in]."""
    found = {}
    for module in model.modules():
        if name := getattr(module, "parameter_name", None):
            weight = module.get_param().float()
            delta = torch.stack([_delta(module, e) for e in range(EXPERTS)])
            found[name] = weight + delta
    return found


def _delta(wrapper: Any, expert: int) -> Tensor:
    """PEFT's sum of one expert, in float32: columns of lora_B have the experts fastest."""
    a, b = (getattr(wrapper, part)["default"].weight.float() for part in ("lora_A", "lora_B"))
    rank = a.shape[0] // EXPERTS
    own = b.view(b.shape[0], rank, EXPERTS)[:, :, expert]
    delta: Tensor = wrapper.scaling["default"] * own @ a[expert * rank : (expert + 1) * rank]
    return delta.detach()


def parts(stacks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the names of public checkpoints, written down here once."""
    found: dict[str, Tensor] = {}
    for e in range(EXPERTS):
        gate, up = stacks["gate_up_proj"][e].chunk(2)
        own = {"gate_proj": gate, "up_proj": up, "down_proj": stacks["down_proj"][e]}
        found |= {f"{BLOCK}.experts.{e}.{name}": w for name, w in own.items()}
    return found


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "at_hand",
    [
        "prepared",
        "base",
        pytest.param("compiled", marks=pytest.mark.slow),
        pytest.param("sharded", marks=needs_fsdp2_of_integers),
    ],
)
def test_an_export_has_each_expert_as_engines_read_it(source, tmp_path, mesh, at_hand):
    model = adapted(source)
    expected = rows_of(model)
    if at_hand == "compiled":
        config: Any = {"config": FalqonConfig(inner="eager")}
        torch.compile(model, backend="falqon", options=config)(input_ids=IDS)
    else:
        falqon_fx.prepare(model, progress=False)
        expected = expected if at_hand == "base" else rows_of(model)
    if at_hand == "sharded":
        fully_shard(model, mesh=mesh)
    base = source if at_hand == "base" else None
    report = falqon_fx.save_fp8(model, tmp_path / "out", base=base, progress=False)
    kinds = {report.cast_from[f"model.layers.0.{name}"] for name in STACKS}
    assert kinds == {"base weight" if at_hand in ("base", "compiled") else "FP8 weight"}
    assert f"{BLOCK}.gate" in report.dense
    found = tensors_in(tmp_path / "out")
    for path, weight in parts(expected).items():
        code, scale = cast(weight, E4M3, True, True)
        ours = found[f"{path}.weight"], found[f"{path}.weight_scale"]
        assert (ours[0].dtype, ours[1].shape) == (E4M3, (len(weight), 1))
        assert torch.equal(ours[0].float(), code.float())
        assert torch.equal(ours[1], scale)
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert f"{BLOCK}.gate" in settings["ignore"]
    assert not any("experts" in name for name in settings["ignore"])


def test_transformers_loads_the_experts_exactly(source, tmp_path):
    model = adapted(source)
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=config
    )
    found, experts = tensors_in(tmp_path / "out"), loaded.get_submodule(f"{BLOCK}.experts")
    stacks = {name: getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    for path, weight in parts(stacks).items():
        exact = found[f"{path}.weight"].float() * found[f"{path}.weight_scale"]
        assert torch.equal(weight.float(), exact)  # scales are powers of two
    assert loaded(input_ids=IDS).logits.isfinite().all()


def test_an_expert_without_a_trained_adapter_keeps_its_bytes(source, tmp_path):
    model = adapted(source, b_size=0)
    falqon_fx.prepare(model, progress=False)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "parameter_name", None):
                module.lora_B["default"].weight[:, 2::EXPERTS] = 0.05  # of expert 2 alone
    prepared = {n: m for n, m in model.named_modules() if isinstance(m, Fp8Stack)}
    report = falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    assert set(report.cast_from.values()) == {"FP8 weight", "unchanged"}  # q_proj has none
    bytes_of = {
        name.rpartition(".")[2].removesuffix("_fp8"): m.code.view(m.experts, -1, m.in_features)
        for name, m in prepared.items()
    }
    found = tensors_in(tmp_path / "out")
    for path, code in parts(bytes_of).items():
        same = torch.equal(found[f"{path}.weight"].view(torch.uint8), code)
        assert same == (".experts.2." not in path)


def test_what_is_loaded_from_an_export_trains(source, tmp_path):
    """Its bytes are the base, whole stacks again, and the model goes into one more step."""
    model = adapted(source)
    falqon_fx.prepare(model, progress=False)
    falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    loaded: Any = falqon_fx.load(tmp_path / "out", peft.LoraConfig(**LORA))
    stacks = {n.rpartition(".")[2]: m for n, m in loaded.named_modules() if isinstance(m, Fp8Stack)}
    found = tensors_in(tmp_path / "out")
    values = {name.removesuffix("_fp8"): m.dequantized() for name, m in stacks.items()}
    for path, weight in parts(values).items():
        assert torch.equal(
            weight.float(), found[f"{path}.weight"].float() * found[f"{path}.weight_scale"]
        )
    loaded(input_ids=IDS, labels=IDS).loss.backward()
    grads = [p.grad for n, p in loaded.named_parameters() if "experts" in n and "lora_B" in n]
    assert len(grads) == 2
    assert all(g is not None and g.any() for g in grads)


def test_prequantize_makes_what_prepare_does(source, tmp_path):
    model = adapted(source, b_size=0)
    falqon_fx.prepare(model, progress=False)
    lora = peft.LoraConfig(**LORA)
    report = falqon_fx.prequantize(source, tmp_path / "out", lora, progress=False)
    loaded: Any = falqon_fx.load(tmp_path / "out")
    theirs = {n: m for n, m in model.named_modules() if isinstance(m, Fp8Stack)}
    ours = {n: m for n, m in loaded.named_modules() if isinstance(m, Fp8Stack)}
    assert report.layers == len(theirs) + 2  # q_proj and o_proj; k and v are too small to gain
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n].code, theirs[n].code) for n in ours)
    assert all(torch.equal(ours[n].scale, theirs[n].scale) for n in ours)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def in_blocks(source: Path, folder: Path, size: int = 16) -> None:
    """The checkpoint as DeepSeek and Qwen publish theirs: FP8, one scale per block of experts'
    weights, here powers of two.
    """
    tensors, config = tensors_in(source), json.loads((source / "config.json").read_text())
    for name in [n for n in tensors if ".experts." in n]:
        weight = tensors.pop(name).float()
        out, features = weight.shape
        blocks = weight.view(out // size, size, features // size, size).transpose(1, 2)
        scale = torch.exp2(torch.log2(blocks.abs().amax((2, 3)) / 448).ceil())
        code = (blocks / scale[..., None, None]).to(E4M3).transpose(1, 2).reshape(out, features)
        tensors |= {name: code.contiguous(), name + "_scale_inv": scale}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [size, size]}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_experts_with_a_scale_per_block_are_read(source, tmp_path):
    """By `load`, which leaves dense what is dense, and by `prequantize`."""
    in_blocks(source, tmp_path / "blocks")
    found, lora = tensors_in(tmp_path / "blocks"), peft.LoraConfig(**LORA)
    falqon_fx.prequantize(tmp_path / "blocks", tmp_path / "out", lora, progress=False)
    values = []
    for model in (falqon_fx.load(tmp_path / "blocks", lora), falqon_fx.load(tmp_path / "out")):
        stacks = {
            n.rpartition(".")[2]: m for n, m in model.named_modules() if isinstance(m, Fp8Stack)
        }
        values.append({name.removesuffix("_fp8"): m.base() for name, m in stacks.items()})
    for name, base in values[0].items():
        # `load` keeps the bytes of what has the same scale in all blocks.
        assert torch.equal(base.dequantize(), values[1][name].dequantize())
    dense = {name: _stacked(base) for name, base in values[0].items()}
    for path, weight in parts(dense).items():
        scale = found[f"{path}.weight_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
        # Exact but for what becomes subnormal under the largest scale of its row (2^-9 of it / 2).
        largest = scale.amax(1, keepdim=True)
        assert (
            (weight - found[f"{path}.weight"].float() * scale).abs() <= largest * 2.0**-10
        ).all()


def _stacked(base: Base) -> Tensor:
    return base.dequantize().view(EXPERTS, -1, base.code.shape[1])


def test_a_checkpoint_that_lacks_an_expert_is_refused(source, tmp_path):
    tensors = tensors_in(source)
    del tensors[f"{BLOCK}.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(FalqonError, match=r"experts\.3\.up_proj"):
        falqon_fx.prequantize(tmp_path, tmp_path / "out", peft.LoraConfig(**LORA), progress=False)


def whole_stacks(kind: str) -> tuple[Any, list[str]]:
    """A model of which no engine has an FP8 form for the experts, and their names."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": 1, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
    config = getattr(transformers, kind)(**sizes, use_cache=False, dtype="bfloat16")
    config._experts_implementation = "grouped_mm"
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stacks = [n for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n]
    assert len(stacks) == 2
    return model, stacks


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("GptOssConfig", "[E, in, out]"),
        pytest.param("GraniteMoeConfig", "in one tensor", marks=pytest.mark.slow),
    ],
)
def test_experts_that_no_engine_reads_in_fp8_are_dense_by_name(kind, why, tmp_path):
    """Beside attention in FP8, with their adapters merged; transformers loads both. Without any
    other layer in FP8 there is nothing to write.
    """
    model, stacks = whole_stacks(kind)
    targets = [".".join(name.split(".")[-2:]) for name in stacks]
    lora = {"r": 4, "target_modules": ["q_proj"], "target_parameters": targets}
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**lora))
    fill_b(adapted, 0.05)
    trace_param_wrappers(adapted)
    falqon_fx.prepare(adapted, progress=False)
    report = falqon_fx.save_fp8(adapted, tmp_path / "out", progress=False)
    experts = stacks[0].rpartition(".")[0]
    assert why in report.dense[experts]
    assert any(path.endswith("q_proj") for path in report.layers)
    assert not any("experts" in path for path in report.layers)
    expected = falqon_fx.merge_and_unload(adapted)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, quantization_config=config
    )
    for name in stacks:
        assert torch.equal(loaded.get_parameter(name), expected.get_parameter(name)), name


def test_a_model_of_which_nothing_could_be_in_fp8_is_refused(tmp_path):
    model, stacks = whole_stacks("GptOssConfig")
    falqon_fx.prepare(model, FalqonConfig(include=("*experts*",)), progress=False)
    with pytest.raises(FalqonError, match=r"\[E, in, out\].*merge_and_unload") as caught:
        falqon_fx.save_fp8(model, tmp_path / "out", progress=False)
    assert stacks[0].rpartition(".")[0] in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "family", ["lara_mini", pytest.param("kimi_linear", marks=pytest.mark.slow)]
)
def test_rows_that_checkpoints_have_in_other_tensors_find_their_place(family, tmp_path):
    """Three convolutions in the place of one, one projection in the place of four."""
    model: Any = zoo.build(family)
    model.save_pretrained(tmp_path)
    tensors, whole = load_file(tmp_path / "model.safetensors"), model.state_dict()
    groups = rearranged(model)
    assert groups
    for group in groups:
        few = dict(tensors)
        del few[next(iter(group.theirs))]
        assert group.placed(few) == {}
        assert len(few) == len(tensors) - 1
        for name, tensor in group.placed(tensors).items():
            assert torch.equal(tensor, whole[name]), name
        assert tensors.keys().isdisjoint(group.theirs)


def test_stacks_that_checkpoints_keep_whole_have_no_parts():
    """A name that transformers has no conversion for; of the others, every row once."""
    with torch.device("meta"):
        config = transformers.Qwen3MoeConfig(num_hidden_layers=1, num_experts=2, vocab_size=8)
        model = transformers.AutoModelForCausalLM.from_config(config)
    sizes = stacks_of(model)
    found = parts_of(model, sizes | {"other.stack": (3, 5)})
    assert set(found) == set(sizes)
    for name, (experts, out) in sizes.items():
        assert sum(part.last - part.first for part in found[name]) == experts * out
    names = own_names(model)
    assert names[f"{BLOCK}.gate.weight"] == f"{BLOCK}.gate.weight"
    assert not any("experts" in name for name in names)
