"""The backend as a whole: inner compilers, updates per step, what is kept for backward, fusion."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import falqon_fx
from falqon_fx.merged import allocate
from falqon_fx.spec import SiteSpec
from falqon_fx.update import NONFINITE, STEP, proxy_update_
from tests import tolerances as tol
from tests.emulation import cast, emulate
from tests.models import LoraLinear, Relu, Stack, fill_b, lora_b, tiny_llama, tiny_mlp, train

PUBLIC_CODE = {
    "granularity": "tensor",
    "scale": "amax",
    "pending": "drop",
    "rounding": "nearest",
    "topk": 10,
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: nn.Module, inner: str = "eager", **options: object) -> nn.Module:
    return torch.compile(model, backend="falqon", options={"inner": inner, **options})


def adam(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lora_b(model), lr=1e-2, **options)


def steps(model: nn.Module) -> list[int]:
    """How many updates each site has seen."""
    return [int(state.counters[STEP]) for state in falqon_fx.adapters(model).values()]


def writes(model: nn.Module) -> list[int]:
    """How many rows each site has written."""
    return [int(state.writes.sum()) for state in falqon_fx.adapters(model).values()]


def weights(model: nn.Module) -> list[Tensor]:
    """Everything that training changes: B, and the FP8 bytes, scale, applied of every site."""
    state = [state.tensors for state in falqon_fx.adapters(model).values()]
    live = [t.view(torch.uint8) if t.element_size() == 1 else t for s in state for t in s]
    return [t.detach().clone() for t in (*lora_b(model), *live)]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# -- inner compilers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, PUBLIC_CODE)],
    ids=["float32", "bfloat16", "public code"],
)
def test_aot_eager_trains_bit_for_bit_as_eager(dtype, options):
    model, x = Relu(dtype=dtype), torch.randn(4, 6, 32).to(dtype)
    result = {}
    for inner in ("eager", "aot_eager"):
        own = copy.deepcopy(model)
        losses = train(compiled(own, inner, **options), adam(own), x, steps=20)
        result[inner] = (losses, weights(own))
    assert result["eager"][0] == result["aot_eager"][0]
    assert all_equal(result["eager"][1], result["aot_eager"][1])
    assert result["eager"][0][-1] < result["eager"][0][0]


def test_inductor_trains_bit_for_bit_as_eager_where_only_gemms_and_exact_ops_run():
    """Inductor calls the same GEMMs; max, add, multiply and the FP8 cast are IEEE operations that
    it may not contract. So no rounding is left to differ, in bfloat16 either.
    """
    model, x = Relu(dtype=torch.bfloat16), torch.randn(4, 6, 32).bfloat16()
    result = []
    for inner in ("eager", "inductor"):
        own = copy.deepcopy(model)
        result.append((train(compiled(own, inner), adam(own), x, steps=20), weights(own)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


def test_the_sizes_of_a_prepared_weight_are_fixed_for_the_compiler():
    """Symbols that AOTAutograd gave to them had no source: with one scale a weight, compiling for
    evaluation failed in a guard on such a symbol.
    """
    model, x = tiny_mlp().bfloat16(), torch.randn(4, 32).bfloat16()
    falqon_fx.prepare(model, falqon_fx.FalqonConfig(**PUBLIC_CODE), progress=False)
    with torch.no_grad():
        assert compiled(model, "inductor", **PUBLIC_CODE)(x).isfinite().all()


@pytest.mark.parametrize("options", [{}, PUBLIC_CODE], ids=["default", "public code"])
def test_a_rewritten_llama_equals_an_eager_emulation_of_the_same_quantized_ops(options):
    """The emulation (tests/emulation.py) is written with torch's own FP8 casts and takes the same
    steps in the same order, so it is equal bit for bit: logits, loss, and dL/dB of all 14 sites.
    (Siblings add up their parts of dL/dx in one buffer: another order.)
    """
    model, ids = tiny_llama(), torch.randint(0, 64, (2, 9))
    fill_b(model)
    backend = compiled(model, siblings=False, **options)
    output = backend(input_ids=ids, labels=ids)
    output.loss.backward()
    states = falqon_fx.adapters(model)
    assert len(states) == 14

    twin = emulate(copy.deepcopy(model), states)
    twin.zero_grad()
    expected = twin(input_ids=ids, labels=ids)
    expected.loss.backward()
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    for b, twin_b in zip(lora_b(model), lora_b(twin), strict=True):
        assert b.grad.abs().max() > 0
        assert torch.equal(b.grad, twin_b.grad)


def test_the_same_seed_gives_the_same_weights_after_50_steps():
    """Stochastic rounding included, which the default has."""
    result = []
    for seed in (0, 0, 1):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Stack(), torch.randn(4, 6, 32)
        train(compiled(model, "aot_eager", seed=seed), adam(model), x, steps=50)
        result.append(weights(model))
    assert all_equal(result[0], result[1])
    assert not all_equal(result[0], result[2])


# -- updates ---------------------------------------------------------------------------------------


OPTIMIZERS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "compiled"])
def test_each_optimizer_step_is_written_once_by_adamw(kind):
    model, x = Relu(), torch.randn(4, 6, 32)
    backend, optimizer = compiled(model, topk=5), adam(model, **OPTIMIZERS.get(kind, {}))
    step = torch.compile(optimizer.step, backend="aot_eager") if kind == "compiled" else None
    backend(x)
    assert steps(model) == [0, 0]
    for n in range(1, 4):
        backend(x).square().mean().backward()
        (step or optimizer.step)()
        optimizer.zero_grad()
        backend(x)
        assert steps(model) == [n, n]
        assert writes(model) == [5 * n, 5 * n]


def test_a_write_through_data_is_seen():
    model, x = Relu(), torch.randn(4, 6, 32)
    backend = compiled(model, topk="all", pending="hold", rounding="nearest")
    before = backend(x)
    for b in lora_b(model):
        b.data.copy_(torch.randn_like(b))
    after = backend(x)
    assert steps(model) == [1, 1]
    assert not torch.equal(before, after)
    for state in falqon_fx.adapters(model).values():
        assert torch.equal(state.applied, state.lora_b())
    backend(x)
    assert steps(model) == [1, 1]


def test_a_replaced_data_tensor_is_seen():
    model, x = Relu(), torch.randn(4, 6, 32)
    backend = compiled(model)
    backend(x)
    for b in lora_b(model):
        b.data = torch.randn_like(b)
    backend(x)
    assert steps(model) == [1, 1]


def test_a_step_that_gradscaler_skips_writes_nothing():
    model, x = Relu(), torch.randn(4, 6, 32)
    backend, optimizer = compiled(model), adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for n, factor in enumerate((1.0, float("inf"), 1.0)):
        scaler.scale(backend(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = weights(model)
        backend(x)
        assert steps(model) == [(1, 1, 2)[n]] * 2
        assert all_equal(before, weights(model)) == (n == 1)
    assert scaler.get_scale() == 2.0**9


def test_gradient_accumulation_and_evaluation_write_once():
    model, x = Relu(), torch.randn(4, 6, 32)
    backend, optimizer = compiled(model), adam(model)
    for n in range(3):
        for part in x.split(2):
            backend(part).square().mean().backward()
            model.eval()
            with torch.no_grad():
                backend(x)
            model.train()
            assert steps(model) == [n, n]
        optimizer.step()
        optimizer.zero_grad()


def test_accumulated_gradients_are_the_sum_of_the_parts():
    model, x = Relu(), torch.randn(4, 6, 32)
    backend, single = compiled(model), []
    for part in x.split(2):
        model.zero_grad()
        backend(part).square().mean().backward()
        single.append([b.grad for b in lora_b(model)])
    model.zero_grad()
    for part in x.split(2):
        backend(part).square().mean().backward()
    assert all_equal([b.grad for b in lora_b(model)], [p + q for p, q in zip(*single)])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_checkpoint_recomputation_writes_nothing_and_changes_nothing(inner, reentrant):
    plain, x = Stack(), torch.randn(4, 6, 32)
    saving = copy.deepcopy(plain)
    saving.call = lambda block, x: checkpoint(block, x, use_reentrant=reentrant)
    result = []
    for model in (plain, saving):
        losses = train(compiled(model, inner), adam(model), x.clone().requires_grad_(), steps=5)
        assert steps(model) == [4] * 4
        result.append((losses, weights(model)))
    assert result[0][0] == result[1][0]
    assert all_equal(result[0][1], result[1][1])


def test_a_step_between_forward_and_backward_raises_as_in_the_original():
    x = torch.randn(4, 6, 32)
    for wrap in (lambda m: m, compiled):
        model = Relu()
        fill_b(model)
        backend = wrap(model)
        loss = backend(x).square().mean()
        with torch.no_grad():
            lora_b(model)[1].add_(1.0)
        backend(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_two_forwards_before_two_backwards():
    model, x = Relu(), torch.randn(4, 6, 32)
    fill_b(model)
    backend = compiled(model)
    single = []
    for part in x.split(2):
        model.zero_grad()
        backend(part).square().mean().backward()
        single.append([b.grad for b in lora_b(model)])
    model.zero_grad()
    losses = [backend(part).square().mean() for part in x.split(2)]
    for loss in losses:
        loss.backward()
    assert all_equal([b.grad for b in lora_b(model)], [p + q for p, q in zip(*single)])


def test_nan_in_b_is_not_written_and_warned_of_once_one_step_late():
    model, x = Relu(), torch.randn(4, 6, 32)
    backend = compiled(model, topk="all", pending="hold")
    backend(x)
    good = weights(model)
    with torch.no_grad():
        for b in lora_b(model):
            b.normal_()
        lora_b(model)[0][3] = float("nan")
        lora_b(model)[0][7, 1] = float("inf")
    backend(x)
    with pytest.warns(UserWarning, match="2 rows of lora_B of up held NaN or Inf") as seen:
        backend(x)
        with torch.no_grad():
            lora_b(model)[0][4] = float("nan")
        for _ in range(3):
            backend(x)
    assert len(seen) == 1
    up, down = falqon_fx.adapters(model).values()
    assert up.nonfinite_rows == up.counters[NONFINITE] == 2 + 3
    assert down.nonfinite_rows == 0
    assert up.weight.float().isfinite().all()
    rows = torch.arange(48)
    kept = torch.isin(rows, torch.tensor([3, 7]))
    before = good[2].view(-1, 32)[:48]
    now = up.code[:48]
    assert torch.equal(now[kept], before[kept])
    assert up.writes[kept].eq(0).all()
    assert up.writes[~kept].ge(1).all()
    assert down.writes.eq(1).all()


# -- gradients and memory --------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_only_b_gets_a_gradient(inner):
    model = tiny_mlp()
    compiled(model, inner)(torch.randn(2, 32)).sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {name for name, _ in model.named_parameters() if "lora_B" in name}


@pytest.fixture(scope="module")
def fused():
    """RMSNorm → site in bfloat16 under Inductor: code, saved tensors, output. One compile for all
    tests on it.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.RMSNorm(64, eps=1e-6), LoraLinear(64, 96, dtype=torch.bfloat16))
    model = layers.bfloat16().requires_grad_(False)
    model[1].lora_B.weight.requires_grad_(True)
    x = torch.randn(48, 64).bfloat16().requires_grad_()
    saved: list[Tensor] = []

    def run() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            output = compiled(model, "inductor")(x)
        output.float().sum().backward()
        return output.detach()

    output, code = run_and_get_code(run)
    return SimpleNamespace(model=model, x=x.detach(), output=output, code=code, saved=saved)


def test_no_wide_copy_of_the_weight_is_kept_for_backward(fused):
    kept = [(t.dtype, t.numel()) for t in fused.saved]
    assert (torch.float8_e4m3fn, (96 + 4) * 64) in kept
    wide = [n for dtype, n in kept if dtype != torch.float8_e4m3fn]
    assert max(wide) < 96 * 64, kept


def norm_kernel(code: str) -> tuple[int, str]:
    """How many bfloat16 buffers the kernel of the norm writes, and its body."""
    kernels = re.findall(r"cpp_pybinding\(\[(.*?)\], r\'\'\'(.*?)\'\'\'", code, re.DOTALL)
    ((pointers, body),) = [(pointers, body) for pointers, body in kernels if "sqrt" in body]
    assert "const at::Float8_e4m3fn*" in pointers
    return pointers.count("'at::BFloat16*'"), body


def test_the_activation_cast_stands_in_the_norms_kernel(fused):
    """One kernel holds both. It writes three bfloat16 buffers: the amax of each row of x, its FP8
    values, marked by the copysign that ends the cast, and W'. The norm's output would be a fourth.
    """
    written, body = norm_kernel(fused.code[0])
    assert "copysign" in body
    assert written == 3


def test_a_norm_that_something_else_reads_too_is_written(fused):
    """What the test above would see, were the cast a kernel of its own."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.site = fused.model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.norm(x)
            return x, self.site(x)

    torch._dynamo.reset()
    _, code = run_and_get_code(lambda: compiled(Both(), "inductor")(fused.x))
    written, _ = norm_kernel(next(c for c in code if "rsqrt" in c))
    assert written == 4


def test_the_step_has_no_host_sync(fused):
    for code in fused.code:
        assert "_local_scalar_dense" not in code
        assert "item()" not in code


def test_a_fused_cast_differs_from_an_unfused_one_by_the_rounding_to_bfloat16_between(fused):
    """Unfused, the norm's output x is rounded to bfloat16 before its cast. Either way the cast sees
    a value within eps of the exact x: one rounding to bfloat16, and in float32 the 64 sums of the
    mean and at most 8 operations around. The cast is monotone: both results lie in the interval
    between the casts of the ends, and the products differ by its width times |W| at most. Then
    each output passes K float32 additions and one rounding to bfloat16.
    """
    unfused = compiled(fused.model, "eager")(fused.x).double()
    (state,) = falqon_fx.adapters(fused.model).values()
    wide = fused.x.double()
    exact = wide * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()  # the norm's weight is 1
    eps = tol.UNIT_ROUNDOFF[torch.bfloat16] + 2 * tol.gamma(64 + 8)
    ends = [cast((exact * (1 + e)).float(), torch.float8_e4m3fn, True, True) for e in (-eps, eps)]
    assert torch.equal(ends[0][1], ends[1][1])  # no amax lies that close to a power of two
    low, high = (codes.double() * scale for codes, scale in ends)
    weight = state.dequantize()[:96].double()
    size = torch.maximum(low.abs(), high.abs()) @ weight.abs().t()
    bound = (high - low).abs() @ weight.abs().t() + 2 * tol.gamma(64) * size
    tol.assert_within(
        fused.output, unfused, tol.rounded_bound(size, bound, torch.bfloat16) + size * 2**-8
    )


@pytest.mark.parametrize("options", [{}, PUBLIC_CODE], ids=["default", "public code"])
def test_away_from_the_cpu_the_update_reads_nothing_back(options):
    """Meta tensors have no values: whatever asks for one raises. (On CPU, where looking is free,
    the update does look.)
    """
    spec, device = SiteSpec.from_config(falqon_fx.FalqonConfig(**options)), torch.device("meta")
    state = allocate(48, 32, 4, torch.bfloat16, 2.0, spec, device)
    base = torch.empty(48, 32, dtype=torch.bfloat16, device=device)
    a, b = torch.empty(4, 32, device=device), torch.empty(48, 4, device=device)
    proxy_update_(*([tensor] for tensor in state.tensors), [b], [a], [base], [2.0], str(spec))
    with pytest.raises(RuntimeError, match="meta"):
        bool(state.counters.any())
