"""A small model with adapters and what a calibration of it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site.numerics import E5M2, INT8
from falqon_fx.site.spec import SiteSpec
from tests.sites import cast, randn

EAGER = FalqonConfig(inner="eager")
IN, MIDDLE, OUT, RANK, CHANNELS = 64, 96, 80, 8, 5


class Model(nn.Module):
    """q and k read the same x; ``plain`` has no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(IN, MIDDLE), nn.Linear(IN, OUT)
        self.plain, self.o = nn.Linear(MIDDLE, MIDDLE, bias=False), nn.Linear(MIDDLE, IN)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        y = self.o(torch.relu(self.plain(torch.relu(self.q(x)))))
        return y + self.k(x).mean(-1, keepdim=True)


def adapted(**lora: Any) -> nn.Module:
    torch.manual_seed(0)
    lora = {"r": 4, "target_modules": ["q", "k", "o"], **lora}
    model = peft.get_peft_model(Model(), peft.LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def inputs(count: int = 3, tokens: int = 40) -> list[Tensor]:
    """x whose channels differ in size, as those of language models do."""
    sizes = randn(IN, seed=9).exp()
    return [randn(tokens, IN, seed=i) * sizes for i in range(count)]


def calibrated(config: FalqonConfig = EAGER, **asked: Any) -> nn.Module:
    model = adapted()
    asked = {"compensate": RANK, "outliers": CHANNELS, **asked}
    falqon_fx.prepare(model, config, calibration=inputs(), progress=False, **asked)
    return model


@dataclass
class OneLayer:
    """A calibrated layer alone, in training mode, and what it reads."""

    config: FalqonConfig
    rank: int = RANK
    channels: int = CHANNELS
    bias: bool = True
    adapter: bool = True
    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.spec = SiteSpec.from_config(self.config)
        torch.manual_seed(self.seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(IN, OUT, self.bias)).requires_grad_(False)
        if self.adapter:
            lora = peft.LoraConfig(r=4, target_modules=["0"], lora_dropout=self.dropout)
            self.model = peft.get_peft_model(self.model, lora)
            nn.init.normal_(self.lora.lora_B.default.weight, std=0.05)
        self.x = randn(30, IN, seed=self.seed) * randn(IN, seed=self.seed + 1).exp()
        asked = {"compensate": self.rank, "outliers": self.channels}
        falqon_fx.prepare(self.model, self.config, calibration=[self.x], progress=False, **asked)

    @property
    def lora(self) -> Any:
        model: Any = self.model
        return model.base_model.model[0]

    @property
    def layer(self) -> Fp8Linear:
        (layer,) = (m for m in self.model.modules() if isinstance(m, Fp8Linear))
        return layer

    def run(self, **options: Any) -> tuple[Tensor, Tensor]:
        """The compiled output and dL/dx for `grad`."""
        torch._dynamo.reset()
        config = FalqonConfig(**{**vars(self.config), **options})
        call = torch.compile(self.model, backend="falqon", options=dict[str, Any](config=config))
        x = self.x.clone().requires_grad_()
        y = call(x)
        y.backward(self.grad)
        assert x.grad is not None
        return y.detach(), x.grad

    @property
    def grad(self) -> Tensor:
        return randn(len(self.x), OUT, seed=self.seed + 2)

    def low(self) -> list[tuple[Tensor, Tensor]]:
        """(Â [r, in], s · B [out, r]) of the compensation and of the adapter, float64."""
        found = []
        if self.layer.error_a is not None and self.layer.error_b is not None:
            a, b = self.layer.error_a.detach().float(), self.layer.error_b.detach().double()
            found.append((cast(a, self.spec.operand, self.spec), b))
        if self.adapter:
            a, b = (m.default.weight.detach() for m in (self.lora.lora_A, self.lora.lora_B))
            found.append(
                (cast(a, self.spec.operand, self.spec), b.double() * self.lora.scaling["default"])
            )
        return found

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """x̂; e, the cast error of x in S, and zeros elsewhere; and what of e the adapters read: in
        INT8, where x̂ has zeros in S unless there is no adapter at all, all of it.
        """
        operand, channels = self.spec.operand, self.layer.channels
        apart = operand == INT8 and bool(self.low())
        x, picked = self.x, [] if channels is None else channels.tolist()
        left = x.index_fill(1, torch.tensor(picked, dtype=torch.int64), 0.0) if apart else x
        read = cast(left, operand, self.spec)
        error = torch.zeros_like(read)
        error[:, picked] = (x.double() - read)[:, picked]
        return read, error, error * apart

    def expected(self) -> tuple[Tensor, Tensor]:
        """x̂·Ŵᵀ + Σ x̂·Âᵀ·bᵀ + e·W_Sᵀ + bias, and the same of absolute values, float64. In INT8 the
        adapters read x̂ + e.
        """
        layer, (read, error, of_a) = self.layer, self.read()
        weight = layer.base().dequantize().double()
        wanted, gauge = read @ weight.t(), read.abs() @ weight.abs().t()
        for a, b in self.low():
            wanted = wanted + (read + of_a) @ a.t() @ b.t()
            gauge = gauge + (read + of_a).abs() @ a.abs().t() @ b.abs().t()
        if layer.channels is not None and layer.columns is not None:
            error = error[:, layer.channels.long()]
            columns = layer.columns.detach().double()
            wanted, gauge = wanted + error @ columns.t(), gauge + error.abs() @ columns.abs().t()
        if layer.bias is not None:
            bias = layer.bias.detach().double()
            wanted, gauge = wanted + bias, gauge + bias.abs()
        return wanted, gauge

    def expected_gradient(self) -> tuple[Tensor, Tensor]:
        """dL/dx = q(dO ⊙ s_W)·Ŵ + Σ (dO·b)·Â (INT8: without q), and the same of absolute values."""
        base, grad = self.layer.base(), self.grad
        by_row = self.spec.base_per_row  # NVFP4 has one scale, which the cast leaves alone
        back = grad.double()
        if self.spec.base != "int8":
            back = cast(grad * base.scale.t() if by_row else grad, E5M2, self.spec)
            back = back / base.scale.double().t() if by_row else back
        weight = base.dequantize().double()
        wanted, gauge = back @ weight, back.abs() @ weight.abs()
        for a, b in self.low():
            wanted = wanted + grad.double() @ b @ a
            gauge = gauge + grad.double().abs() @ b.abs() @ a.abs()
        return wanted, gauge
