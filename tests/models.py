"""Small models with LoRA, hand-written and from PEFT, that several test files share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64  # what a frozen layer needs to run in FP8


class Net(nn.Module):
    """Two layers that get adapters and a frozen one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.plain = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.plain(torch.relu(self.up(x)))))


class LoraLinear(nn.Module):
    """base(x) + scaling · B(A(x)) with PEFT's parameter names, adapters in float32 like PEFT's."""

    def __init__(
        self,
        features: int,
        out: int,
        rank: int = 4,
        *,
        scaling: float = 2.0,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base_layer = nn.Linear(features, out, bias=bias, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Linear(features, rank, bias=False)
        self.lora_B = nn.Linear(rank, out, bias=False)
        self.scaling = scaling
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.lora_A.weight.dtype
        adapter = self.lora_B(self.lora_A(x if x.dtype == dtype else x.to(dtype)))
        return (self.base_layer(x) + adapter * self.scaling).to(x.dtype)


class Traceable(nn.Module):
    """`LoraLinear` as `symbolic_trace` can take it: no question about a value's dtype."""

    def __init__(self, layer: LoraLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return layer.base_layer(x) + layer.lora_B(layer.lora_A(x)) * layer.scaling


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))) with LoRA on both projections: two sites."""

    def __init__(self, width: int, hidden: int, **lora: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6, dtype=lora.get("dtype", torch.float32))
        self.norm.requires_grad_(False)
        self.up = LoraLinear(width, hidden, **lora)
        self.down = LoraLinear(hidden, width, **lora)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks in a row; ``call`` wraps each call of a block, as a checkpoint does."""

    def __init__(self, blocks: int = 2, width: int = 32, hidden: int = 48, **lora: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden, **lora) for _ in range(blocks))
        self.call: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def lora_b(model: nn.Module) -> list[nn.Parameter]:
    """The B of each site."""
    return [p for name, p in model.named_parameters() if "lora_B" in name]


def fill_b(model: nn.Module, size: float = 0.02, seed: int = 0) -> None:
    """Random B, as in an adapter that was trained before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for b in lora_b(model):
            b.copy_(torch.randn(b.shape, generator=generator) * size)


def freeze_a(model: nn.Module) -> nn.Module:
    """LoRA-FA, as update="rows" wants it."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={"inner": inner, **options})


def tiny_llama(dtype: torch.dtype = torch.float32, layers: int = 2, **lora: Any) -> nn.Module:
    """Layers of Llama with PEFT on every projection: 7 sites each. Seed it before."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        attn_implementation="eager",  # sdpa takes another path when traced
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    return model.train()


class Relu(nn.Module):
    """Two sites around a ReLU. Every op but the GEMMs is exact or one IEEE operation: compilers
    have no freedom in it.
    """

    def __init__(self, width: int = 32, hidden: int = 48, **lora: Any) -> None:
        super().__init__()
        self.up = LoraLinear(width, hidden, **lora)
        self.down = LoraLinear(hidden, width, **lora)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def made(kind: type[nn.Module] = Relu, update: str = "adapter", **options: Any) -> nn.Module:
    """A model, with A frozen where rows are written."""
    model = kind(**options)
    return freeze_a(model) if update == "rows" else model


def train(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, steps: int
) -> list[float]:
    """The losses of ``steps`` steps towards model(x) = x / 2."""
    losses = []
    for _ in range(steps):
        loss = (model(x) - x / 2).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tiny_mlp(**lora: Any) -> nn.Module:
    """PEFT on both layers of a small MLP. Seed it before."""
    import peft

    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32))
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"], **lora}
    return peft.get_peft_model(model, peft.LoraConfig(**options))
