"""The models of `benchmarks/gpu.py`: real transformers layers with random weights, and every way to
train LoRA on them that is compared.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_measure import Clock, captured
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import falqon_fx
from falqon_fx._compat import scaled_mm
from falqon_fx.model.prepared_linear import PreparedLinear

E4M3 = torch.float8_e4m3fn
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as its config.json has them."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int
    qkv_bias: bool = False

    @property
    def sites(self) -> list[tuple[int, int]]:
        """[out, in] of a layer's linears, in the order of `SITES`."""
        h, i, kv = self.hidden, self.inner, self.hidden // self.heads * self.kv_heads
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]

    def layer_flops(self, tokens: int, length: int) -> tuple[float, float]:
        """(linears, attention): forward and dL/dx of a layer; of a causal mask's pairs, half.

        Attention's backward is five products to forward's two; W is frozen, so has no gradient.
        """
        linears = sum(out * features for out, features in self.sites)
        return 4.0 * tokens * linears, 7.0 * tokens * length * self.hidden

    def head_flops(self, tokens: int) -> float:
        return 4.0 * tokens * self.hidden * self.vocabulary


SHAPES = {
    "tiny": Shape(64, 96, 4, 2, 2, 128),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32, 128256),
    "qwen-2.5-7b": Shape(3584, 18944, 28, 4, 28, 152064, qkv_bias=True),
}


@dataclass(frozen=True)
class Contender:
    """One way to train.

    ``base`` is what holds the frozen weights: "bf16", "nf4" (bitsandbytes), "fp8" (`Fp8Linear`
    below), "fp8linear" (transformers' FP8Linear with one scale per tensor), "torchao" (float8
    training: bf16 weights cast in each step) or "falqon" (cast by `prepare`).
    """

    base: str
    backend: str  # eager, inductor or falqon
    bf16_adapter: bool = True
    train_a: bool = True
    options: tuple[tuple[str, Any], ...] = ()


IN_K, BEHIND, NVFP4 = "falqon, adapter in K", "falqon, adapter behind", "falqon, nvfp4"
SCALED_MM = ("kernel", "scaled_mm")
CONTENDERS = {
    "falqon": Contender("falqon", "falqon", bf16_adapter=False),
    IN_K: Contender("falqon", "falqon", False, True, (("adapter_dtype", "fp8"),)),
    BEHIND: Contender("falqon", "falqon", False, True, (("adapter_dtype", "bfloat16"),)),
    NVFP4: Contender("falqon", "falqon", False, True, (("base_dtype", "nvfp4"),)),
    "falqon, A frozen": Contender("falqon", "falqon", bf16_adapter=False, train_a=False),
    "falqon, bf16 adapter": Contender("falqon", "falqon"),
    "falqon, rows": Contender("falqon", "falqon", False, False, (("update", "rows"),)),
    "falqon, kernel=scaled_mm": Contender("falqon", "falqon", False, options=(SCALED_MM,)),
    "falqon, tensorwise": Contender("falqon", "falqon", False, True, (("granularity", "tensor"),)),
    "falqon, reduce-overhead": Contender(
        "falqon", "falqon", False, True, (("mode", "reduce-overhead"),)
    ),
    "peft": Contender("bf16", "eager"),
    "peft, fp32 adapter": Contender("bf16", "eager", bf16_adapter=False),
    "peft + inductor": Contender("bf16", "inductor"),
    "peft + inductor, fp32 adapter": Contender("bf16", "inductor", bf16_adapter=False),
    "peft + inductor, A frozen": Contender("bf16", "inductor", train_a=False),
    # Inductor's mode "reduce-overhead" by its option: a compilation takes a mode or options.
    "peft + inductor, reduce-overhead": Contender(
        "bf16", "inductor", options=(("triton.cudagraphs", True),)
    ),
    "fp8 + lora": Contender("fp8", "inductor"),
    "fp8linear + lora": Contender("fp8linear", "inductor"),
    "torchao + lora": Contender("torchao", "inductor"),
    "nf4": Contender("nf4", "eager", bf16_adapter=False),
    "nf4 + inductor": Contender("nf4", "inductor"),
}


class Unavailable(Exception):
    """A contender that this machine can't run, with the reason."""


def build(contender: Contender, shape: Shape, layers: int, rank: int, device: str) -> PeftModel:
    """A model of ``layers`` layers, LoRA on all of their linears.

    Raises `Unavailable` where a package that it needs is missing.
    """
    kind = Qwen2Config if shape.qkv_bias else LlamaConfig
    config = kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=layers,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    change = _BASES.get(contender.base)
    if change is not None:
        change(model, device)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(SITES), task_type="CAUSAL_LM")
    peft = get_peft_model(model, lora, autocast_adapter_dtype=not contender.bf16_adapter)
    peft.to(device)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            if contender.bf16_adapter:
                parameter.data = parameter.data.bfloat16()
            parameter.requires_grad_(contender.train_a or "lora_A" not in name)
    if contender.base == "falqon":
        falqon_fx.prepare(peft, falqon_fx.FalqonConfig(**dict(contender.options)))
    return peft.train()


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of each linear that gets an adapter."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in SITES and isinstance(child, nn.Linear):
                yield parent, name, child


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # some packages fail in other ways than by being absent
        raise Unavailable(f"{package}: {error}") from error


def _to_nf4(model: Any, device: str) -> None:
    bnb = _need("bitsandbytes")
    for parent, name, linear in _linears(model):
        layer = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        setattr(parent, name, layer.to(device))
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layer for them


class _Fp8Product(torch.autograd.Function):
    """x · Wᵀ with W in FP8, x and dL/dO cast a row each; the products are the library's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        q, q_scale = _cast_rows(x.flatten(0, -2), E4M3)
        y = scaled_mm(q, weight.t(), q_scale, scale.t(), out_dtype=x.dtype, use_fast_accum=True)
        rows: Tensor = y.unflatten(0, x.shape[:-1])
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        q, q_scale = _cast_rows(grad.flatten(0, -2) * scale.t(), torch.float8_e5m2)
        turned = weight.view(torch.uint8).t().contiguous().view(E4M3)  # [in, out]
        one = torch.ones(1, turned.shape[0], device=grad.device)
        x = scaled_mm(q, turned.t(), q_scale, one, out_dtype=grad.dtype, use_fast_accum=True)
        return x.unflatten(0, grad.shape[:-1]), None, None


def _cast_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(dtype).max
    return (wide / scale).to(dtype), scale


class Fp8Linear(nn.Linear):
    """A frozen FP8 linear with one scale per row, as plain as it can be: LoRA goes beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = _cast_rows(linear.weight.data, E4M3)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Fp8Product.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def _to_fp8(model: Any, device: str) -> None:
    for parent, name, linear in _linears(model):
        setattr(parent, name, Fp8Linear(linear))


def _to_fp8linear(model: Any, device: str) -> None:
    module = _need("transformers.integrations.finegrained_fp8")
    for parent, name, linear in _linears(model):
        layer = module.FP8Linear(
            linear.in_features, linear.out_features, None, has_bias=linear.bias is not None
        ).to(device)
        scale = linear.weight.abs().amax().float() / 448
        layer.weight = nn.Parameter(
            (linear.weight / scale).to(torch.float8_e4m3fn), requires_grad=False
        )
        layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
        layer.bias = linear.bias
        setattr(parent, name, layer)


def _to_torchao(model: Any, device: str) -> None:
    float8 = _need("torchao.float8")
    wanted = {id(linear) for *_, linear in _linears(model)}
    float8.convert_to_float8_training(model, module_filter_fn=lambda m, name: id(m) in wanted)


_BASES: dict[str, Callable[[Any, str], None]] = {
    "nf4": _to_nf4,
    "fp8": _to_fp8,
    "fp8linear": _to_fp8linear,
    "torchao": _to_torchao,
}


def linear_bytes(model: nn.Module) -> int:
    """Bytes of the layers that `prepare` made: W in FP8 and its scales, or what "rows" keeps."""
    found = [m for m in model.modules() if isinstance(m, PreparedLinear)]
    parameters = [p for m in found for name, p in m.named_parameters() if name != "bias"]
    return sum(p.nbytes for p in parameters)


# ---------------------------------------------------------------- a training step


@dataclass(frozen=True)
class Phases:
    """Seconds of one training step."""

    forward: float
    backward: float
    optimizer: float

    @property
    def whole(self) -> float:
        return self.forward + self.backward + self.optimizer


class Trainer:
    """Steps on fixed random tokens. Each decoder layer is compiled by itself, and so are the final
    norm, head and loss; all layers share their code.
    """

    def __init__(
        self,
        model: PeftModel,
        contender: Contender,
        tokens: tuple[int, int],
        clock: Clock,
        attention: SDPBackend,
    ) -> None:
        whole = model.get_base_model()
        self.body, self.head = whole.model, whole.lm_head
        self.layers: Sequence[nn.Module] = list(self.body.layers)
        self.clock, self.attention = clock, attention
        self.checkpointing = False
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, self.head.out_features, tokens, generator=generator)
        self.ids = ids.to(clock.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=clock.gpu)
        self.loss = self.loss_of
        if contender.backend == "eager":
            return
        self.loss = torch.compile(self.loss_of, dynamic=False)
        options = {"options": dict(contender.options)} if contender.options else {}
        for layer in self.layers:
            layer.compile(backend=contender.backend, dynamic=False, **options)

    def loss_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Cross entropy of the next token."""
        logits = self.head(self.body.norm(hidden))[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def forward(self) -> Tensor:
        """The loss."""
        hidden = self.body.embed_tokens(self.ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        angles = self.body.rotary_emb(hidden, positions)
        for layer in self.layers:

            def run(x: Tensor, layer: nn.Module = layer) -> Tensor:
                given = layer(x, attention_mask=None, position_embeddings=angles)
                y: Tensor = given[0] if isinstance(given, tuple) else given
                return y

            hidden = (
                checkpoint(run, hidden, use_reentrant=False) if self.checkpointing else run(hidden)
            )
        return self.loss(hidden, self.ids)

    def step(self) -> Phases:
        with sdpa_kernel(self.attention):
            start = self.clock.mark()
            loss = self.forward()
            middle = self.clock.mark()
            loss.backward()
        self.last_loss = loss.detach()
        end = self.clock.mark()
        self.optimizer.step()
        self.optimizer.zero_grad()
        done = self.clock.mark()
        marks = (start, middle, end, done)
        return Phases(*(self.clock.seconds(a, b) for a, b in itertools.pairwise(marks)))

    def graphed(self) -> Callable[[], None]:
        """Forward and backward as a CUDA graph, to be replayed.

        Raises RuntimeError where they can't be captured.
        """

        def run() -> None:
            with sdpa_kernel(self.attention):
                self.forward().backward()

        self.optimizer.zero_grad(set_to_none=False)
        return captured(run).replay


@contextlib.contextmanager
def some_layers(trainer: Trainer, count: int) -> Iterator[None]:
    """The trainer with its first layers alone: what a layer costs is the difference."""
    layers = trainer.layers
    trainer.layers = layers[:count]
    try:
        yield
    finally:
        trainer.layers = layers


def attention_backend(shape: Shape, device: str) -> SDPBackend:
    """The first of cuDNN's, flash attention, the memory-efficient and the plain one that runs: the
    fastest on an H100 (https://arxiv.org/abs/2407.08608), for every contender.
    """
    size = shape.hidden // shape.heads
    q, k, v = (
        torch.randn(1, heads, 128, size, device=device).bfloat16().requires_grad_()
        for heads in (shape.heads, shape.heads, shape.heads)
    )
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
            return backend
    return SDPBackend.MATH
