"""`falqon_fx.cost.stacks`: FLOPs and bytes, counted a second time, on tensors."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.cost import cards
from falqon_fx.cost import model as cost
from falqon_fx.cost.stacks import STACKS, StackShape, symbolic_stack
from falqon_fx.kernels.cpu import experts as compiled
from falqon_fx.ops import experts_cpu, experts_lowering, lowering
from falqon_fx.ops.experts_lowering import Experts
from falqon_fx.report.kernels import source
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec
from falqon_fx_cli.main import main
from tests.stacks import Stack
from tests.test_prepared_experts import build

pytest.importorskip("peft")

H100 = cards.find("H100")
TOKENS, TOP, EXPERTS, OUT, IN, RANK = 24, 2, 4, 72, 64, 8
SHAPE = StackShape(TOKENS, IN, OUT, RANK, experts=EXPERTS, top=TOP, adapter_dtype="bfloat16")


class Counted(TorchDispatchMode):
    """FLOPs of products, and the bytes that they read and write, each from its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.each: Counter[str] = Counter()

    @property
    def flops(self) -> int:
        return self.each["flops"]

    @property
    def bytes(self) -> int:
        return self.each["bytes"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_grouped_mm", "bmm", "baddbmm"):
            left, right = args[1:3] if "baddbmm" in str(func) else args[:2]
            # [.., m, k] · [.., k, n], where k or m may be all experts' rows.
            outwards = left.dim() == right.dim() == 2
            shared, made = left.shape[-1], result[0] if outwards else result
            self.each["flops"] += 2 * made.numel() * shared
            tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
            self.each["bytes"] += sum(t.nbytes for t in tensors if t.dtype != torch.int32)
        return result


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """x, the row of it that each row of the product reads, and offsets: all experts have rows."""
    ids = torch.arange(TOKENS * TOP) % EXPERTS
    order = torch.argsort(ids, stable=True)
    offs = torch.bincount(ids, minlength=EXPERTS).cumsum(0).to(torch.int32)
    return torch.randn(TOKENS, IN).bfloat16(), order // TOP, offs


class CountedCalls:
    """The same of compiled code: the sizes of what it is handed and returns."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.flops = self.bytes = 0
        for name in ("forward", "backward", "outer"):
            patch.setattr(compiled, name, self._counted(getattr(compiled, name)))

    def _counted(self, call: Any) -> Any:
        def counted(x: Tensor, other: Any, rows: Any, *rest: Any, **more: Any) -> Tensor:
            made: Tensor = call(x, other, rows, *rest, **more)
            weights = other.stack if hasattr(other, "stack") else other
            self.flops += 2 * rows.count * _size(weights, x)
            given = [
                x,
                made,
                *([other] if weights is other else (other.stack, other.left, other.right)),
            ]
            if getattr(other, "left", None) is not None:
                self.flops += 2 * rows.count * _size(other.right, other.left)
            sums = [made] if made.dtype == torch.float32 and weights is not other else []
            self.bytes += sum(t.nbytes for t in [*given, *sums] if t is not None)
            return made

        return counted


def _size(weights: Tensor, x: Tensor) -> int:
    """Products of a row: of one expert's matrix, or of what is multiplied outwards."""
    return weights[0].numel() if weights.dim() == 3 else weights.shape[1] * x.shape[1]


@pytest.mark.parametrize("rank", [RANK, 0])
@pytest.mark.parametrize("train_a", [True, False])
def test_the_op_as_aten_does_what_is_counted(rank, train_a, monkeypatch):
    """In float32: the FLOPs of all products, and the bytes that they read and write."""
    monkeypatch.setattr(experts_cpu, "takes", lambda *given: False)
    shape = replace(SHAPE, rank=rank, train_a=train_a, dtype="float32", adapter_dtype="float32")
    seen = run(shape, torch.float32, lambda phase: Counted())
    check(STACKS["emulated"](shape), seen)


@pytest.mark.skipif(compiled.library() is None, reason="this CPU doesn't multiply bfloat16")
@pytest.mark.parametrize("rank", [RANK, 0])
@pytest.mark.parametrize("train_a", [True, False])
def test_the_op_in_compiled_code_does_what_is_counted(rank, train_a, monkeypatch):
    """In bfloat16; the GPU's variant has the same FLOPs."""
    shape = replace(SHAPE, rank=rank, train_a=train_a, wide="bfloat16")
    seen = run(shape, torch.bfloat16, lambda phase: _Calls(monkeypatch))
    check(STACKS["emulated"](shape), seen)
    for phase, found in seen.items():
        assert cost.flops(STACKS["merged"](shape), phase) == found.flops


class _Calls(CountedCalls):
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch.context()

    def __enter__(self) -> _Calls:
        super().__init__(self.patch.__enter__())
        return self

    def __exit__(self, *given: Any) -> None:
        self.patch.__exit__(*given)


def check(kernels: Any, seen: dict[str, Any]) -> None:
    for phase, found in seen.items():
        counted = [k for k in kernels if k.phase == phase and k.flops != 0]
        assert cost.flops(kernels, phase) == found.flops, phase
        assert sum(k.bytes for k in counted) == found.bytes, phase


def run(shape: StackShape, dtype: torch.dtype, counting: Any) -> dict[str, Any]:
    """What is counted of the op's lowering, forward and backward."""
    config = FalqonConfig()
    spec, rank = str(SiteSpec.from_config(config)), shape.rank
    x, rows, offs = inputs()
    base = cast_base(torch.randn(EXPERTS * OUT, IN), SiteSpec.from_config(config))
    of_a = [torch.randn(EXPERTS * rank, IN).to(dtype)] * bool(rank)
    of_b = [torch.randn(OUT, rank * EXPERTS).to(dtype)] * bool(rank)
    wide = dtype == torch.float32
    casts = lowering.proxy_update(of_a, of_b, [2.0] * len(of_a), [], wide, spec)
    a, a_scale, b = casts[0::3], casts[1::3], casts[2::3]
    way = offs, False, EXPERTS
    operands = (x.to(dtype), [rows], *way, base.weight, base.scale, a, a_scale, b, of_a, of_b)
    forward, backward = counting("forward"), counting("backward")
    with forward:
        last = [2.0] * len(of_a), shape.train_a and rank > 0, dtype, spec
        y, out_a, *kept = experts_lowering.lower_merged_experts(Experts(*operands, *last))
    with backward:
        d = [experts_lowering.lower_grad_out_a(y, *way, t, dtype, spec) for t in b]
        options = base.weight, base.scale, d, a, a_scale, dtype, spec
        experts_lowering.lower_grad_x(y, TOKENS, [rows], *way, *options)
        if rank:
            own = (d, kept) if shape.train_a else ([], [])
            said = 2.0, dtype, dtype, spec
            experts_lowering.lower_grads(y, [rows], *way, out_a, *own, *said)
    return {"forward": forward, "backward": backward}


def test_peft_does_what_is_counted():
    """Its own spelling, in eager mode; dL/dA and dL/dB by autograd."""
    model = Stack(EXPERTS, OUT, IN, RANK, dtype=torch.bfloat16, spelling="grouped")
    x, rows, offs = inputs()
    forward, backward = Counted(), Counted()
    x.requires_grad_()
    with forward:
        y = torch.nn.functional.grouped_mm(x[rows], model.adapted().transpose(1, 2), offs=offs)
    with backward:
        y.backward(torch.ones_like(y))
    check(STACKS["lora"](SHAPE), {"forward": forward, "backward": backward})


def test_split_products_do_what_is_counted():
    model = Stack(EXPERTS, OUT, IN, RANK, dtype=torch.bfloat16, spelling="grouped")
    x, rows, offs = inputs()
    multiply: Any = torch.nn.functional.grouped_mm
    left, right = model.factors()
    b = left.contiguous()  # as products of groups take it
    forward, backward = Counted(), Counted()
    x.requires_grad_()
    with forward:
        low = multiply(x[rows], right.mT, offs=offs)
        y = multiply(x[rows], model.weight.mT, offs=offs) + 0.5 * multiply(low, b.mT, offs=offs)
    with backward:
        y.backward(torch.ones_like(y))
    kernels = STACKS["split"](SHAPE)
    for phase, seen in (("forward", forward), ("backward", backward)):
        assert cost.flops(kernels, phase) == seen.flops


@pytest.mark.parametrize("name", STACKS)
def test_expressions_and_numbers_agree(name):
    open_shape, closed = symbolic_stack(), replace(SHAPE, adapter_dtype="float32")
    names = ("n", "features", "out", "rank", "experts", "top")
    values = {getattr(open_shape, name): getattr(closed, name) for name in names}
    formulas, numeric = STACKS[name](open_shape), STACKS[name](closed)
    for phase in ("forward", "backward", "update"):
        for measure in (cost.flops, cost.moved):
            expression = sympy.sympify(measure(formulas, phase))
            assert float(expression.subs(values)) == float(measure(numeric, phase))


def test_what_grows_with_experts():
    """The bytes of their weights: PEFT's sum, its read, dL/dW' and the two that read it; ours one
    a weight each way. Gathered rows are those of top tokens.
    """
    one, more = (replace(SHAPE, experts=e) for e in (EXPERTS, 2 * EXPERTS))
    flops = {
        name: cost.flops(STACKS[name](more)) - cost.flops(STACKS[name](one)) for name in STACKS
    }
    added = one.weights
    assert flops == {"lora": 3 * 2 * added * RANK, "split": 0, "merged": 0, "emulated": 0}
    adapters = cost.moved(STACKS["merged"](more)) - cost.moved(STACKS["merged"](one)) - 2 * added
    assert 0 < adapters < 100 * (one.of_a + one.of_b)
    big = StackShape(4096, 2048, 1536, 16, experts=128, top=8)
    for card in (H100, cards.find("B200")):
        at = replace(big, by_columns=card is not H100)
        times = {n: float(cost.seconds(STACKS[n](at), card)) for n in STACKS}
        assert times["merged"] < times["split"] < times["lora"]


def test_explain_predicts_stacks_and_the_page_shows_them():
    """Each stack a square in the map, with its kernel, times and bytes."""
    x, ids = torch.randn(12, 64).bfloat16(), torch.randint(0, 4, (12, 2))
    model, weights = build(), torch.rand(12, 2).bfloat16()
    report = falqon_fx.explain(model, x, ids, weights, config=FalqonConfig(card="H100"))
    sites = {site.path.rpartition(".")[2]: site for site in report.sites}
    up, down = sites["gate_up_proj"], sites["down_proj"]
    assert (up.gathered, down.gathered) == (24, 0)
    assert up.kernel == down.kernel == "scaled_grouped_mm"
    for site in (up, down):
        assert site.cost is not None
        shape = cost.shape_of(site, cards.find("H100"))
        assert isinstance(shape, StackShape)
        assert shape.rows == 24
        assert site.cost.moved_after == int(cost.moved(STACKS["merged"](shape)))
        assert site.cost.seconds_before > 0
    page = report.to_html()
    squares = re.findall(r'"name":\s*"(base_model\.model\.experts[^"]*)"', page)
    assert sorted(squares) == sorted(site.path for site in report.sites)
    assert "torch's grouped product" in page or "torch&#x27;s grouped product" in page
    ada = falqon_fx.explain(model, x, ids, weights, config=FalqonConfig(card="L40S"))
    assert {site.kernel.split("_e4m3")[0] for site in ada.sites} == {"triton:grouped_gemm"}
    assert all("def grouped_gemm" in source(site) for site in ada.sites)
    rejected = FalqonConfig(card="H100", min_gain=1000.0)
    assert not falqon_fx.explain(model, x, ids, weights, config=rejected).sites


STACK = ["--card", "H100", "--in", "2048", "--out", "1536", "--rank", "16", "--experts", "128"]


def test_the_command_knows_stacks(capsys):
    assert main(["cost", *STACK, "--top-k", "8", "--tokens", "4096"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "128 experts of 1536 x 2048" in shown
    assert "split" in shown
    assert main(["cost", *STACK, "--symbolic"]) == 0
    assert "E*in*out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "8"], "Add --experts"),
        (["--experts", "8", "--siblings", "2"], "as one stack"),
        (["--step", "--experts", "8"], "the model says it"),
        (["--experts", "8", "--base-dtype", "int8"], "stacked experts are not cast to INT8"),
        (["--step", "--base-dtype", "int8"], "each has a column"),
    ],
)
def test_what_cant_be_asked_of_stacks(words, message, capsys):
    assert main(["cost", "--card", "H100", *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_mixture_with_adapters_in_fp8_is_refused(capsys):
    words = ["--model", "qwen3-30b-a3b", "--adapter-dtype", "fp8"]
    assert main(["cost", "--step", "--card", "H100", *words]) == 1
    assert "stacked experts" in capsys.readouterr().err
