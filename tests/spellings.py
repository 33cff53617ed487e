"""base(x) + s · B(A(x)), written by hand in the many ways that people write it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from falqon_fx import FalqonConfig, RewriteResult, rewrite
from tests import tolerances as tol
from tests.sites import randn

# How x · Wᵀ is written, where s is applied, how the two are added.
LINEARS = ("module", "functional", "matmul", "mm", "addmm", "einsum")
SCALES = ("absent", "x", "a", "b", "left", "divide", "multiply_", "alpha")
ADDS = ("base + adapter", "adapter + base", "+=", "torch.add", ".add", ".add_", "addmm")


@dataclass(frozen=True)
class Spelling:
    """The choices that make up one hand-written LoRA layer, and its sizes."""

    base: str = "module"
    adapter: str = "module"
    scale: str = "b"
    add: str = "base + adapter"
    scaling: float = 2.0
    bias: bool = False
    lora_bias: bool = False
    dropout: str = "none"
    leading: tuple[int, ...] = (5,)
    out: int = 20
    features: int = 24
    rank: int = 4
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32


class HandWritten(nn.Module):
    """One layer of LoRA in a given spelling; W is frozen."""

    def __init__(self, spelling: Spelling, seed: int = 0) -> None:
        super().__init__()
        s = self.spelling = spelling
        self.base = nn.Linear(s.features, s.out, bias=s.bias, dtype=s.dtype)
        self.lora_a = nn.Linear(s.features, s.rank, bias=False, dtype=s.adapter_dtype)
        self.lora_b = nn.Linear(s.rank, s.out, bias=s.lora_bias, dtype=s.adapter_dtype)
        self.dropout = {"module": nn.Dropout(0.0), "identity": nn.Identity()}.get(s.dropout)
        self.base.requires_grad_(False)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=seed + i))

    def forward(self, x: Tensor) -> Tensor:
        s = self.spelling
        mixed = s.dtype != s.adapter_dtype
        inner = x.to(self.lora_a.weight.dtype) if mixed else x
        if s.dropout == "functional":
            inner = F.dropout(inner, 0.0, training=True)
        elif self.dropout is not None:
            inner = self.dropout(inner)
        if s.scale == "x":
            inner = inner * s.scaling
        down = self.linear(s.adapter, inner, self.lora_a)
        if s.scale == "a":
            down = s.scaling * down
        base = self.linear(s.base, x, self.base)
        if s.add == "addmm":
            return torch.addmm(base, down, self.lora_b.weight.t(), alpha=self.left)
        up = self.linear(s.adapter, down, self.lora_b)
        if s.scale == "b":
            up = up * s.scaling
        elif s.scale == "left":
            up = torch.mul(s.scaling, up) if isinstance(up, fx.Proxy) else s.scaling * up
        elif s.scale == "divide":
            up = up / (1 / s.scaling)
        elif s.scale == "multiply_":
            up = up.mul_(s.scaling)
        total = self.sum(base, up)
        return total.to(x.dtype) if mixed else total

    @property
    def left(self) -> float:
        """What the add itself has to scale by."""
        return self.spelling.scaling if self.spelling.scale == "alpha" else 1.0

    def linear(self, how: str, x: Tensor, layer: nn.Linear) -> Tensor:
        if how == "module":
            return layer(x)
        if how == "functional":
            return F.linear(x, layer.weight, layer.bias)
        if how == "addmm" and layer.bias is not None:
            return torch.addmm(layer.bias, x, layer.weight.t())
        if how == "einsum":
            product = torch.einsum("...i,oi->...o", x, layer.weight)
        elif how == "mm":
            product = torch.matmul(x, layer.weight.transpose(0, 1))
        else:
            product = x @ layer.weight.T
        return product if layer.bias is None else product + layer.bias

    def sum(self, base: Tensor, up: Tensor) -> Tensor:
        how = self.spelling.add
        if self.spelling.scale == "alpha":
            if how == ".add_":
                return base.add_(up, alpha=self.left)
            return torch.add(base, up, alpha=self.left)
        if how == "+=":
            base += up
            return base
        if how == "adapter + base":
            return up + base
        if how == "torch.add":
            return torch.add(input=base, other=up) if self.spelling.bias else torch.add(base, up)
        if how == ".add":
            return base.add(up)
        return base.add_(up) if how == ".add_" else base + up


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    """Every spelling that runs: addmm takes one dtype and x [n, in], and scales by alpha alone."""
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    dtype, adapter_dtype = draw(dtypes), draw(dtypes)
    add = draw(st.sampled_from(ADDS))
    base, adapter = draw(st.sampled_from(LINEARS)), draw(st.sampled_from(LINEARS))
    scale = draw(st.sampled_from(SCALES))
    lora_bias = draw(st.booleans())
    if add == "addmm":
        adapter_dtype, lora_bias = dtype, False
        scale = scale if scale in ("absent", "x", "a", "alpha") else "alpha"
    flat = "addmm" in (base, adapter, add)
    leading = [(1,), (5,), (8,)] if flat else [(5,), (2, 3), (2, 2, 2), (0,)]
    return Spelling(
        base=base,
        adapter=adapter,
        scale=scale,
        add=add,
        scaling=1.0 if scale == "absent" else draw(st.sampled_from([1.0, 2.0, 0.25, 3.0, -0.7, 4])),
        bias=draw(st.booleans()),
        lora_bias=lora_bias,
        dropout=draw(st.sampled_from(["none", "functional", "module", "identity"])),
        leading=draw(st.sampled_from(leading)),
        out=draw(st.integers(1, 24)),
        features=draw(st.integers(1, 40)),
        rank=draw(st.integers(1, 9)),
        dtype=dtype,
        adapter_dtype=adapter_dtype,
    )


def targets(gm: fx.GraphModule) -> Counter[str]:
    """How often each operation stands in a graph, checkpoint bodies included."""
    count: Counter[str] = Counter()
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            calls = (n for n in module.graph.nodes if n.op.startswith("call"))
            count.update(
                n.target if isinstance(n.target, str) else n.target.__name__ for n in calls
            )
    return count


class Passes:
    """A torch.compile backend that runs the passes alone and keeps what they made of each graph."""

    def __init__(self, **options: Any) -> None:
        self.config = FalqonConfig(**options)
        self.given: list[fx.GraphModule] = []
        self.before: list[Counter[str]] = []
        self.results: list[RewriteResult] = []

    def __deepcopy__(self, memo: Any) -> Passes:
        """Lightning, once imported, copies the arguments of each torch.compile."""
        return self

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> RewriteResult:
        self.given.append(gm)
        self.before.append(targets(gm))
        self.results.append(rewrite(gm, inputs, self.config))
        return self.results[-1]

    @property
    def sites(self) -> list[Any]:
        return [site for result in self.results for site in result.report.sites]

    @property
    def rejected(self) -> list[Any]:
        return [item for result in self.results for item in result.report.rejected]

    @property
    def left(self) -> list[Any]:
        return [item for result in self.results for item in result.report.left]

    @property
    def after(self) -> list[Counter[str]]:
        return [targets(result.gm) for result in self.results]

    def run(self, model: nn.Module, *args: Any) -> Any:
        torch._dynamo.reset()
        return torch.compile(model, backend=self)(*args)


class Masked(nn.Module):
    """A dropout whose numbers are drawn already."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def dropped(x: Tensor) -> Tensor:
    """What the first dropout with p = 0.5 after `draw` multiplies x by: 0 or 2."""
    draw()
    return F.dropout(torch.ones_like(x), 0.5)


def draw() -> None:
    """Begin to draw the random numbers of `dropped`."""
    torch.manual_seed(3)


def in_float64(model: nn.Module, mask: Tensor | None = None) -> nn.Module:
    """The original with its roundings taken away, and its dropout, but for a ``mask`` that is
    given.
    """
    exact = copy.deepcopy(model).double()
    for name, module in list(exact.named_modules()):
        if isinstance(module, nn.Dropout):
            off = mask is None or module.p == 0
            exact.set_submodule(name, nn.Identity() if off else Masked(mask.double()))
    return exact


def check_site(
    run: Any, model: nn.Module, x: Tensor, parameters: tol.Parameters, seed: int = 9
) -> None:
    """``run(x)`` and its gradients of x, A and B of a rewritten layer against the original in
    float64; a frozen A or B gets none.
    """
    exact, wide = in_float64(model, parameters.mask), x.detach().double().requires_grad_()
    x = x.detach().requires_grad_()
    draw()
    y, expected = run(x), exact(wide)
    assert y.shape == expected.shape
    grad = randn(*y.shape, seed=seed).to(y.dtype)
    y.backward(grad)
    expected.backward(grad.double())
    bound = tol.site_bounds(x.detach(), grad, parameters)
    tol.assert_within(y, expected, bound.y.reshape(y.shape))
    tol.assert_within(x.grad, wide.grad, bound.grad_x.reshape(x.shape))
    names = {id(p): name for name, p in model.named_parameters()}
    for adapter, bounds in zip(parameters.adapters, bound.adapters, strict=True):
        for parameter, of in zip(adapter[:2], bounds, strict=True):
            if parameter.requires_grad:
                wanted = exact.get_parameter(names[id(parameter)]).grad
                tol.assert_within(parameter.grad, wanted, of)
            else:
                assert parameter.grad is None
