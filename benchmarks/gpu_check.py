"""Correctness on the device, before anything is timed: every kernel that may run, against float64
on the operands that it really multiplies; casts, transposes and updates against the CPU, bit by
bit.

A failure raises AssertionError and ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import gpu_models
import torch
from gpu_measure import Clock
from gpu_models import CONTENDERS, SHAPES, Trainer
from torch import Tensor

from falqon_fx import FalqonConfig, MergedAdapter, cuda
from falqon_fx import update as reference
from falqon_fx.kernels import dispatch, stored
from falqon_fx.kernels.activation_cast import activation_cast
from falqon_fx.kernels.choice import Candidate, Refusal
from falqon_fx.kernels.gemm import Piece, Product
from falqon_fx.kernels.spec import ActivationCastSpec
from falqon_fx.merged import create
from falqon_fx.numerics import E4M3, E5M2, amax_to_scale, encode_fp8, round_to_fp8
from falqon_fx.products import cast_with_scale

# (tokens, out, in, rank)
SHAPES_CHECKED = ((256, 512, 1024, 16), (100, 1040, 272, 64), (1, 256, 4096, 8))
TINY = ((17, 48, 64, 16),)
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Checked:
    """The largest error of one kernel, in units of its bound (below 1); 0 where it is bit-equal."""

    what: str
    kernel: str
    shape: tuple[int, ...]
    worst: float


def fp8(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 4).to(dtype).to(device)


def positive(rows: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 1, generator=generator) + 0.1).to(device)


def random_bf16(rows: int, columns: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(BF16).to(device)


@dataclass(frozen=True)
class Exact:
    """A float64 result: a sum of products, each of ``terms`` terms at most.

    ``gauge`` is the sum of the magnitudes of all terms, ``partial`` that of the products.
    """

    value: Tensor
    gauge: Tensor
    partial: Tensor
    terms: int

    def __add__(self, other: Exact) -> Exact:
        return Exact(
            self.value + other.value,
            self.gauge + other.gauge,
            self.partial + other.partial,
            max(self.terms, other.terms),
        )

    def columns(self, part: slice) -> Exact:
        fields = (self.value[:, part], self.gauge[:, part], self.partial[:, part])
        return Exact(*fields, self.terms)

    @property
    def bound(self) -> Tensor:
        """How far a bfloat16 result may be off.

        Tensor cores add 32 products at a time, and keep at least 13 bits behind the leading one of
        the largest addend (as has been reported of Hopper's). Each of the 32 loses 2**-13 of that
        largest one, and each of the K/32 sums 2**-13 of what has been added up so far; both are
        below the gauge. Some candidates round to bfloat16 (2**-9) after each product and each
        addition, at most eight times, what is below the sum of the products' magnitudes.
        """
        steps = self.terms / 32 + 32
        return self.gauge * (steps * 2.0**-13) + self.partial * 2.0**-6


def product(q: Tensor, weight: Tensor, scales: Tensor | float = 1.0) -> Exact:
    """q · weightᵀ ⊙ scales."""
    a, b = q.double(), weight.double()
    value = a @ b.t() * scales
    return Exact(value, a.abs() @ b.abs().t() * scales, value.abs(), q.shape[1])


def constant(value: Tensor) -> Exact:
    """Something exact that is added."""
    wide = value.double()
    return Exact(wide, wide.abs(), wide.abs(), 1)


def run_all(
    what: str, shape: tuple[int, ...], contest: dispatch.Contest, exact: list[Exact]
) -> Iterator[Checked]:
    """Every candidate of a product; one that refuses says why."""
    for name, candidate in contest.candidates.items():
        results = _try(what, name, candidate)
        if results is None:
            continue
        assert len(results) == len(exact), f"{what} by {name}: {len(results)} results"
        errors = [
            ((y.double() - e.value).abs() / e.bound.clamp(min=1e-300)).max().item()
            for y, e in zip(results, exact, strict=True)
        ]
        worst = max(errors)
        assert worst < 1, f"{what} by {name}, {shape}: {worst:.2f} of the bound"
        yield Checked(what, name, shape, worst)


def _try(what: str, name: str, candidate: Candidate) -> list[Tensor] | None:
    try:
        results: list[Tensor] = candidate()
    except Refusal as error:
        # A candidate that is not for this card or this shape; what none takes, fails in `dispatch`.
        print(f"{what}: {name}: {str(error).splitlines()[0][:160]}", flush=True)
        return None
    return results


def check_products(device: str, options: dispatch.Options) -> Iterator[Checked]:
    """O and O_A, O with pending rows and bias, O_A alone, siblings, dL/dx of one and of several
    sites, dL/dB.
    """
    for shape in SHAPES_CHECKED if device == "cuda" else TINY:
        yield from _check_shape(shape, device, options)


def _check_shape(
    shape: tuple[int, int, int, int], device: str, options: dispatch.Options
) -> Iterator[Checked]:
    n, out, features, rank = shape
    q, q_scale = fp8(n, features, E4M3, device, 0), positive(n, device, 1)
    merged, scale = fp8(out + rank, features, E4M3, device, 2), positive(out + rank, device, 3)
    o, a = Piece(merged[:out], scale[:out]), Piece(merged[out:], scale[out:])
    scales = q_scale.double() * scale.double().t()
    both = product(q, merged, scales)
    exact_o, exact_a = both.columns(slice(out)), both.columns(slice(out, None))

    def contest(pieces: list[Piece], a_pieces: int) -> dispatch.Contest:
        return dispatch.forward(q, q_scale, pieces, a_pieces, BF16, BF16, options)

    yield from run_all("O, O_A", shape, contest([o, a], 1), [exact_o, exact_a])
    yield from run_all("O_A", shape, contest([a], 1), [exact_a])
    left, right = random_bf16(n, rank, device, 6), random_bf16(out, rank, device, 7)
    bias = random_bf16(1, out, device, 8)[0]
    added = product(left, right) + constant(bias[None])
    pending = replace(o, bias=bias, left=left, right=right)
    yield from run_all("O, pending, bias", shape, contest([pending], 0), [exact_o + added])
    views = dispatch.forward_strided(
        q, q_scale, [Piece(merged, scale)], [out], [right], [bias], BF16, BF16, options
    )
    for name, run in views.candidates.items():
        results = _try("[O | O_A], pending, bias", name, run)
        if results is not None:  # O by the O_A that it is made of, as it was rounded
            whole = exact_o + product(results[-1], right) + constant(bias[None])
            found = replace(views, candidates={name: lambda results=results: results})
            yield from run_all("[O | O_A], pending, bias", shape, found, [whole, exact_a])
    # The same weights twice, as siblings: the second O of fewer rows.
    few = out // 2
    part = Piece(merged[:few], scale[:few])
    exact_part, twice = exact_o.columns(slice(few)), product(q, *_twice(merged, scales, out))
    found = contest([o, part, a, a], 2)
    yield from run_all("O, O_A of siblings", shape, found, [exact_o, exact_part, twice])
    g, g_scale = fp8(n, out, E5M2, device, 4), positive(n, device, 5)
    h = fp8(n, few, E5M2, device, 9)
    one = Product(g, g_scale, merged[:out])
    two = Product(h, q_scale, merged[:few])
    exact_x = product(g, merged[:out].t(), g_scale.double())
    exact_two = exact_x + product(h, merged[:few].t(), q_scale.double())
    tail = random_bf16(features, rank, device, 10)
    for what, products, last, exact in (
        ("dL/dx", [one], None, exact_x),
        ("dL/dx, pending", [one], left, exact_x + product(left, tail)),
        ("dL/dx of siblings", [one, two], left, exact_two + product(left, tail)),
    ):
        ends = (last, None if last is None else tail)
        found = dispatch.grad_x(products, *ends, BF16, options)
        yield from run_all(what, shape, found, [exact])
    grad = random_bf16(n, out, device, 11)
    exact_b = product(grad.t(), left.t())
    found = dispatch.grad_b(grad, left, 1.0, torch.float32, "auto")
    yield from run_all("dL/dB", shape, found, [exact_b])
    of_all = torch.tensor(0.37, device=device)
    cast = cast_with_scale(grad.float().cpu(), of_all.cpu(), E5M2).double().to(device)
    equal = Exact(cast, torch.zeros_like(cast), torch.zeros_like(cast), 1)
    found = dispatch.cast_grad_b(grad, of_all, left, 1.0, torch.float32, E5M2, "auto")
    yield from run_all("q(dL/dO), dL/dB", shape, found, [equal, exact_b])


def check_inductor(device: str, options: dispatch.Options) -> Iterator[Checked]:
    """Inductor's templates, one scale for all: of one shape, for each shape takes it seconds."""
    n, out, features, _ = (SHAPES_CHECKED if device == "cuda" else TINY)[0]
    q, weight = fp8(n, features, E4M3, device, 0), fp8(out, features, E4M3, device, 1)
    grad, scale = fp8(n, out, E5M2, device, 2), torch.tensor(0.25, device=device)
    options = replace(options, kernel="inductor")
    for what, contest, exact in (
        (
            "O",
            dispatch.forward(q, scale, [Piece(weight, scale)], 0, BF16, BF16, options),
            product(q, weight, 0.0625),
        ),
        (
            "dL/dx",
            dispatch.grad_x([Product(grad, scale, weight)], None, None, BF16, options),
            product(grad, weight.t(), 0.25),
        ),
    ):
        named = {k: run for k, run in contest.candidates.items() if k.startswith("inductor")}
        yield from run_all(what, (n, out, features), replace(contest, candidates=named), [exact])


def _twice(merged: Tensor, scales: Tensor, out: int) -> tuple[Tensor, Tensor]:
    """A's rows below each other twice, and the scales of their products."""
    return torch.cat([merged[out:]] * 2), torch.cat([scales[:, out:]] * 2, dim=1)


def check_transpose(device: str) -> Checked:
    w = fp8(*((300, 272) if device == "cuda" else (40, 48)), E4M3, device, 0)
    turned = stored.transposed(w)
    assert torch.equal(turned.view(torch.uint8), w.view(torch.uint8).t()), "transpose"
    return Checked("Wᵀ", "transpose", tuple(w.shape), 0.0)


def check_activation_cast(device: str) -> Iterator[Checked]:
    """The kernels against the CPU's cast: equal bytes, equal scales."""
    shape = (333, 1024) if device == "cuda" else (9, 64)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for granularity in ("row", "tensor"):
        for mode in ("amax", "pow2"):
            spec = ActivationCastSpec.for_width(
                shape[1],
                input_dtype="bfloat16",
                granularity=granularity,
                scale=mode,
                cast="hardware" if device == "cuda" and _has_fp8() else "integer",
            )
            q, scale = activation_cast(x.to(device), spec)
            wide = x.float()
            amax = wide.abs().amax(1, keepdim=True) if granularity == "row" else wide.abs().amax()
            expected = amax_to_scale(amax, E4M3, mode)
            code = encode_fp8(round_to_fp8(wide * expected.reciprocal(), E4M3), E4M3)
            torch.testing.assert_close(scale.cpu(), expected, rtol=0, atol=0)
            torch.testing.assert_close(q.cpu().view(torch.uint8), code, rtol=0, atol=0)
            yield Checked("cast", spec.name, shape, 0.0)


def _has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


def make_state(out: int, features: int, rank: int) -> tuple[MergedAdapter, Tensor, Tensor, Tensor]:
    """A site whose sums are exact in float32: small multiples of powers of two."""
    generator = torch.Generator().manual_seed(out)

    def dyadic(rows: int, columns: int, most: int, step: float) -> Tensor:
        return torch.randint(-most, most + 1, (rows, columns), generator=generator) * step

    base, lora_a = dyadic(out, features, 16, 2.0**-3), dyadic(rank, features, 16, 2.0**-3)
    lora_b = dyadic(out, rank, 64, 2.0**-6)
    state = create("site", base, lora_a, lora_b, 2.0, FalqonConfig())
    lora_b += dyadic(out, rank, 16, 2.0**-8)
    return state, base, lora_a, lora_b


def check_update(device: str) -> Checked:
    """The update's kernels against the CPU op, random bits included."""
    shapes = ((512, 256, 16), (96, 1024, 16)) if device == "cuda" else ((48, 32, 16),)
    results = []
    for place in ("cpu", device):
        made = [make_state(*shape) for shape in shapes]
        states = [[t.to(place) for t in state.tensors] for state, *_ in made]
        columns = [[*column] for column in zip(*states, strict=True)]
        base, lora_a, lora_b = ([m[i].to(place) for m in made] for i in (1, 2, 3))
        # The first is the reference; a second run on "cpu" is the kernels, interpreted.
        run = cuda.proxy_update_ if results else reference.proxy_update_
        run(*columns, lora_b, lora_a, base, [2.0] * len(made), str(made[0][0].plan))
        results.append([t.cpu() for column in columns for t in column])
    if device == "cuda":  # B has not changed; and no value is read back on the host
        torch.cuda.set_sync_debug_mode("error")
        run(*columns, lora_b, lora_a, base, [2.0] * len(made), str(made[0][0].plan))
        torch.cuda.set_sync_debug_mode("default")
    for expected, actual in zip(*results, strict=True):
        same = expected.view(torch.uint8) == actual.view(torch.uint8)
        assert same.all(), f"{(~same).sum().item()} bytes of {tuple(expected.shape)} differ"
    return Checked("update", f"{len(shapes)} sites", shapes[0], 0.0)


def check_training(device: str) -> Checked:
    """Three eager steps of two tiny layers: the device's losses against the CPU's.

    Both run the same casts; products differ in summation order, at most some bfloat16 roundings in
    each layer.
    """
    losses = []
    contender = replace(CONTENDERS["falqon"], options=(("inner", "eager"),))
    for place in ("cpu", device):
        model = gpu_models.build(contender, SHAPES["tiny"], 2, 8, "cpu").to(place)
        attention = gpu_models.attention_backend(SHAPES["tiny"], place)
        trainer = Trainer(model, contender, (2, 16), Clock(place), attention)
        trainer.loss = trainer.loss_of
        found = []
        for _ in range(3):
            trainer.step()
            found.append(trainer.last_loss.item())
        losses.append(found)
        torch._dynamo.reset()
    worst = max(abs(a - b) / (8 * 2.0**-8 * abs(a)) for a, b in zip(*losses, strict=True))
    assert worst < 1, f"losses {losses}"  # false for NaN, too
    return Checked("three steps", "falqon", (2, 16), worst)


def all_checks(device: str, options: dispatch.Options | None = None) -> list[Checked]:
    checks: list[Callable[[], Checked]] = [
        lambda: check_transpose(device),
        lambda: check_update(device),
        lambda: check_training(device),
    ]
    options = options or dispatch.Options()
    found = [*check_activation_cast(device), *check_products(device, options)]
    found += check_inductor(device, options)
    return found + [check() for check in checks]
