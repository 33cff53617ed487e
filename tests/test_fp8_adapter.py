"""adapter_dtype="fp8": t, b and D' in FP8, against float64 and against adapters in bfloat16."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.ops.fp8_adapter import balance, clamped
from falqon_fx.report.repro import arguments, check
from falqon_fx.site.base import cast_base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.lowered import decoded, hat, on_this_cpu, run
from tests.lowered_fp8 import expected, in_fp8, x_scale
from tests.models import LoraLinear, fill_b, lora_b, tiny_llama, tiny_mlp
from tests.sites import randn
from tests.spellings import Passes
from tests.strategies import Case, Layer, Lora, cases
from tests.test_training import STEPS, Loop, plainly, regression, student, teacher_of
from tests.tolerances import Approx

F32 = torch.float32


@given(cases())
def test_results_equal_float64_on_the_same_quantized_operands(case):
    case = in_fp8(case)
    assume(case.adapters and case.x.numel())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = run(case)
    assume(not any(clamped.of(lora.lora_b) for lora in case.adapters))
    wanted = expected(case, actual["out_a"], on_this_cpu(case.out_dtype))
    assert actual.keys() == wanted.keys() & {*case.leaves(), *actual}
    for name, result in actual.items():
        shape, of = result.shape, wanted[name]
        Approx(of.value.reshape(shape), of.bound.reshape(shape)).assert_holds(result)


# -- how exact it is, and what does not fit --------------------------------------------------------


def heavy_tailed(rows: int, columns: int, seed: int) -> Tensor:
    """As activations and weights are: rows and single elements that stand out."""
    return randn(rows, columns, seed=seed) * (1.5 * randn(rows, columns, seed=seed + 1)).exp()


def one_layer(size: float, out: int = 256, features: int = 512, rank: int = 32) -> Case:
    """x · Wᵀ with an adapter whose part is ``size`` of that of W."""
    spec = SiteSpec("row", "pow2", "e5m2", adapter="fp8")
    x, weight = heavy_tailed(96, features, 0), heavy_tailed(out, features, 2) * 0.02
    lora_a, lora_b = randn(rank, features, seed=4) / 16, heavy_tailed(out, rank, 5)
    part = (x @ lora_a.t() @ lora_b.t()).norm() / (x @ weight.t()).norm()
    lora = Lora(lora_a, lora_b * (size / part), 1.0)
    layer = Layer(weight, cast_base(weight, spec), None, [lora], randn(96, out, seed=7))
    return Case(x, [layer], F32, spec)


def parts_of(case: Case) -> tuple[Tensor, Tensor]:
    """The adapter's part of O as it is computed, and before t and b are cast, float64."""
    (layer,), (lora,) = case.layers, case.adapters
    ((code, a_scale, b8, alpha),) = case.casts
    _, out_a, *_ = torch.ops.falqon.merged_linear(*case.arguments())
    factor = b8.float().double() * layer.base.scale.double() / alpha.double()
    exact = hat(case.x, E4M3, case.spec).value @ decoded(code, a_scale).value.t()
    return out_a.double() @ factor.t(), exact @ (lora.lora_b.double() * lora.scaling).t()


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.1])
def test_the_part_of_an_adapter_is_as_exact_as_that_of_the_base(size):
    """In E4M3 the error of a rounding is even up to 2⁻⁴ of a power of two: by root mean square 2.6%
    of numbers spread over an octave, and 3.7% of a product of two. A sixth of t and b below the
    normal range (the exponential tails of these) and one sample allow for half as much again.
    """
    case = one_layer(size)
    found, exact = parts_of(case)
    assert clamped.of(case.adapters[0].lora_b) == 0
    assert (found - exact).norm() / exact.norm() < 1.5 * 0.037


def test_what_is_too_large_is_clamped_counted_and_said():
    """An adapter of the size of the base, with rows of B that stand out."""
    case = one_layer(1.0)
    lora_b = case.adapters[0].lora_b
    lora_b[::50] *= 30.0
    with pytest.warns(UserWarning, match=r"B \[256, 32\].* clamps some of it") as caught:
        parts_of(case)
    assert len(caught) == 1
    ((code, a_scale, _, alpha),) = case.casts
    (layer,) = case.layers
    b = (lora_b / layer.base.scale * alpha).abs() > 464
    read = hat(case.x, E4M3, case.spec).value @ decoded(code, a_scale).value.t()
    t = (read / (x_scale(case) * alpha)).abs() > 464
    assert clamped.of(lora_b) == int(b.sum() + t.sum()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        parts_of(case)
    assert clamped.of(lora_b) == int(b.sum() + 2 * t.sum())  # b was cast before


def test_alpha_shares_the_range():
    """Both have the same distance from where they are clamped, t with a room of 32."""
    typical, largest = torch.tensor([1.0, 3e4, 2.0]), torch.tensor([1e-3, 1e4, 0.0])
    alpha = balance(typical, largest)
    assert torch.equal(alpha.log2().round(), alpha.log2())
    of_t, of_b = 448 / (32 * typical / alpha), 448 / (largest * alpha)
    # A power of two is at most half an octave from the wanted number.
    assert abs((of_t / of_b)[0].log2()) <= 1.0
    assert 1 <= of_b[1] < 2  # too large for both: b fits, t has the rest
    assert 1 <= of_t[2] < 2  # B is zero


# -- in models -------------------------------------------------------------------------------------


def compiled(model: nn.Module, inner: str = "eager", **options: Any) -> Any:
    return torch.compile(
        model, backend="falqon", options={"inner": inner, "adapter_dtype": "fp8", **options}
    )


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])
def test_a_llama_trains_alike_under_eager_and_aot_eager(prepared):
    """Dropout, siblings, checkpoints and frozen layers among them, bit for bit. (Inductor computes
    norms and attention in another order: for it see test_backend.py.)
    """
    base = tiny_llama(target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.25)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    fill_b(base, 0.002)
    ids = torch.randint(0, 64, (2, 12))
    results = []
    for inner in ("eager", "aot_eager"):
        torch._dynamo.reset()
        model = copy.deepcopy(base).train()
        if prepared:
            falqon_fx.prepare(model, FalqonConfig(adapter_dtype="fp8"), progress=False)
        call = compiled(model, inner)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        torch.manual_seed(0)
        for _ in range(3):
            call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in trained])
        sites = falqon_fx.adapters(model)
        assert len(sites) == 6
        assert all(site.saturated == 0 for site in sites.values())
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_hundreds_of_steps_end_where_bfloat16_adapters_do():
    """Both on the same FP8 base. The adapter to be learned is a tenth of the base, and its casts
    are off by as large a part of it as those of the base. So they add a hundredth of what the base
    loses, and without the noise of the data the test loss is within 1.1.
    """
    start = student()
    teacher = teacher_of(start, same_a=False)
    for b in lora_b(teacher):
        b.data /= 4
    data, test = regression(teacher, STEPS), regression(teacher, 8, noise=0.0, seed=8)
    x, clean = (torch.cat(column) for column in zip(*test))
    found = {}
    for kind in ("bfloat16", "fp8"):
        model = copy.deepcopy(start)
        call = compiled(model, adapter_dtype=kind)
        for _ in plainly(Loop(call, model, data, 0.02)):
            pass
        found[kind] = model
    assert all(site.saturated == 0 for site in falqon_fx.adapters(found["fp8"]).values())

    def test_loss(model: nn.Module, kind: str) -> float:
        with torch.no_grad():
            return (compiled(model, adapter_dtype=kind)(x) - clean).square().mean().item()

    within = test_loss(found["fp8"], "fp8")
    assert within < test_loss(start, "fp8") / 5
    assert within <= 1.1 * test_loss(found["bfloat16"], "bfloat16")


def test_the_count_is_that_of_the_site():
    model = tiny_mlp()
    fill_b(model, 0.02)
    call, x = compiled(model), torch.randn(5, 32)
    call(x)
    first, second = falqon_fx.adapters(model).values()
    assert (first.saturated, second.saturated) == (0, 0)
    with torch.no_grad():
        b = model.base_model.model[0].lora_B["default"].weight
        b.fill_(0.01)
        b[3] = 1e6
    said = r"part of base_model\.model\.0\.lora_B\.default\.weight .* clamps some of it"
    with pytest.warns(UserWarning, match=said):
        call(x)
    assert first.saturated > 0
    assert second.saturated == 0


def test_each_base_of_a_shared_adapter_has_a_b_in_its_own_units():
    """One A and B on two weights of different scale."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = LoraLinear(64, 48), LoraLinear(64, 48)
            self.other.lora_A, self.other.lora_B = self.one.lora_A, self.one.lora_B
            self.other.base_layer.weight.data *= 100.0

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.other(x)

    model, x, passes = Two(), randn(5, 64), Passes(adapter_dtype="fp8")
    fill_b(model, 0.02)
    found = passes.run(model, x)
    (casts,) = passes.results[0].gm.graph.find_nodes(
        op="call_function", target=torch.ops.falqon.proxy_update.default
    )
    lora_a, lora_b, scaling, base_scale, *_ = casts.args
    assert len(lora_a) == len(lora_b) == len(scaling) == len(base_scale) == 2
    assert lora_b[0].target == lora_b[1].target
    assert base_scale[0] is not base_scale[1]
    torch._dynamo.reset()
    apart = copy.deepcopy(model)
    apart.other.lora_A, apart.other.lora_B = map(
        copy.deepcopy, (apart.one.lora_A, apart.one.lora_B)
    )
    assert torch.equal(found, Passes(adapter_dtype="fp8").run(apart, x))


def test_where_it_is_not_there_it_says_so():
    with pytest.raises(FalqonConfigError, match='not there for update="rows"'):
        FalqonConfig(adapter_dtype="fp8", update="rows")

    class Plain(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            shapes = (480, 640), (rank, 640), (480, rank)
            self.base, self.a, self.b = (nn.Parameter(torch.empty(shape)) for shape in shapes)
            self.base.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.base) + F.linear(F.linear(x, self.a), self.b)

    (site,) = falqon_fx.explain(
        LoraLinear(64, 48), torch.randn(5, 64), config=FalqonConfig(adapter_dtype="fp8")
    ).sites
    with pytest.raises(FalqonError, match="can't be rebuilt yet"):
        check(**arguments(site))
    refused = pytest.raises(FalqonError, match=r'ranks up to 128.*adapter_dtype="bfloat16"')
    config = FalqonConfig(adapter_dtype="fp8")
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), refused:
        falqon_fx.rewrite(torch.fx.symbolic_trace(Plain(129)), [torch.empty(5, 640)], config)
