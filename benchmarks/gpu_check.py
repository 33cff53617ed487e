"""Correctness on the device: before anything is timed some of each kind (`smoke`), in the end every
kernel that may run (`rest`), against float64 on the operands that it really multiplies; casts,
transposes and updates against the CPU, bit by bit.

A failure raises AssertionError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gpu_models
import torch
from gpu_exact import Exact, constant, product
from gpu_measure import Clock
from gpu_models import BEHIND, CONTENDERS, IN_K, SHAPES, Trainer
from torch import Tensor

from falqon_fx import FalqonConfig, MergedAdapter
from falqon_fx.kernels.activation_cast.launch import activation_cast
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.fixed import NONE_FIXED, Fixed
from falqon_fx.kernels.gemm.launch import Piece, Product
from falqon_fx.kernels.products import adapters, dispatch
from falqon_fx.kernels.products.choice import Candidate, Refusal
from falqon_fx.kernels.products.contest import Contest, Options
from falqon_fx.kernels.transpose import kept as stored
from falqon_fx.ops import fp8_adapter, fp8_gpu, gpu, lowering
from falqon_fx.rows import cuda as rows_cuda
from falqon_fx.rows import update as reference
from falqon_fx.rows.state import create
from falqon_fx.site.numerics import E4M3, E5M2, amax_to_scale, encode_fp8, round_to_fp8
from falqon_fx.site.spec import SiteSpec

# (tokens, out, in, rank)
SHAPES_CHECKED = ((256, 512, 1024, 16), (100, 1040, 272, 64), (1, 256, 4096, 8))
TINY = ((17, 48, 64, 16),)
BF16 = torch.bfloat16
# (rows, columns, device, seed) -> W, and its values but for scales.
Draw = Callable[[int, int, str, int], tuple[Tensor, Tensor]]


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


def fp8_weight(rows: int, columns: int, device: str, seed: int) -> tuple[Tensor, Tensor]:
    weight = fp8(rows, columns, E4M3, device, seed)
    return weight, weight


def positive(rows: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 1, generator=generator) + 0.1).to(device)


def random_bf16(rows: int, columns: int, device: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(BF16).to(device)


def with_adapter(
    piece: Piece, tokens: int, rank: int, device: str, seed: int
) -> tuple[Piece, Exact]:
    """A layer with an adapter and a bias, and what these add to O."""
    rows = len(piece.weight)
    left, right = random_bf16(tokens, rank, device, seed), random_bf16(rows, rank, device, seed + 1)
    bias = random_bf16(1, rows, device, seed + 2)[0]
    added = product(left, right) + constant(bias[None])
    return replace(piece, bias=bias, left=left, right=right), added


def run_all(
    what: str, shape: tuple[int, ...], contest: Contest, exact: list[Exact]
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


def check_products(device: str, options: Options) -> Iterator[Checked]:
    """O of layers alone, with adapters and as siblings, O_A, dL/dx of one and of several layers,
    dL/dB and dL/dA.
    """
    for shape in SHAPES_CHECKED if device == "cuda" else TINY:
        yield from _check_forward(shape, device, options)
        yield from _check_backward(shape, device, options)


def _check_forward(
    shape: tuple[int, int, int, int], device: str, options: Options
) -> Iterator[Checked]:
    """Of two layers, the second of fewer rows, with adapters of different rank."""
    n, out, features, rank = shape
    few, low = out // 2, rank // 2
    q, q_scale = fp8(n, features, E4M3, device, 0), positive(n, device, 1)

    def layer(rows: int, seed: int) -> tuple[Piece, Exact]:
        piece = Piece(fp8(rows, features, E4M3, device, seed), positive(rows, device, seed + 1))
        assert piece.scale is not None
        return piece, product(q, piece.weight, q_scale.double() * piece.scale.double().t())

    (one, exact_one), (two, exact_two) = layer(out, 2), layer(few, 4)
    (a_one, exact_a), (a_two, exact_b) = layer(rank, 6), layer(low, 8)

    def run(what: str, pieces: list[Piece], a_pieces: int, exact: list[Exact]) -> Iterator[Checked]:
        contest = dispatch.forward(q, q_scale, pieces, a_pieces, BF16, BF16, options)
        yield from run_all(what, shape, contest, exact)

    yield from run("O", [one], 0, [exact_one])
    yield from run("O of siblings", [one, two], 0, [exact_one, exact_two])
    yield from run("O_A", [a_one], 1, [exact_a])
    yield from run("O_A of several", [a_one, a_two], 2, [exact_a.beside(exact_b)])
    of_two = ((one, n, rank, device, 10), (two, n, low, device, 13))
    adapted, terms = map(list, zip(*itertools.starmap(with_adapter, of_two), strict=True))
    yield from run("O, adapter, bias", adapted[:1], 0, [exact_one + terms[0]])
    wanted = [exact_one + terms[0], exact_two + terms[1]]
    yield from run("O of siblings, adapters, bias", adapted, 0, wanted)
    # With update="rows" W and A are rows of one tensor.
    merged, scale = fp8(out + rank, features, E4M3, device, 16), positive(out + rank, device, 17)
    parts = [Piece(merged[at], scale[at]) for at in (slice(out), slice(out, None))]
    both = product(q, merged, q_scale.double() * scale.double().t())
    halves = [both.columns(slice(out)), both.columns(slice(out, None))]
    yield from run("O, O_A", parts, 1, halves)


def check_grad_x(
    shape: tuple[int, int, int, int], device: str, options: Options, draw: Draw, of: str = ""
) -> Iterator[Checked]:
    """dL/dx of two layers that share x, of which the first has an adapter. ``draw`` makes W, and
    what it stands for; ``of`` names its form.
    """
    n, out, features, rank = shape
    products, exact = [], []
    for rows, seed in ((out, 20), (out // 2, 23)):
        g, g_scale = fp8(n, rows, E5M2, device, seed), positive(n, device, seed + 1)
        weight, values = draw(rows, features, device, seed + 2)
        products.append(Product(g, g_scale, weight))
        exact.append(product(g, values.t(), g_scale.double()))
    d, right = random_bf16(n, rank, device, 26), random_bf16(features, rank, device, 27)
    term = product(d, right)
    for what, count, ends, wanted in (
        ("dL/dx", 1, (None, None), exact[0]),
        ("dL/dx, adapter", 1, (d, right), exact[0] + term),
        ("dL/dx of siblings", 2, (None, None), exact[0] + exact[1]),
        ("dL/dx of siblings, one adapter", 2, (d, right), exact[0] + exact[1] + term),
    ):
        of_d, of_a = ends
        found = dispatch.grad_x(products[:count], of_d, of_a, BF16, options)
        yield from run_all(f"{what}{of}", shape, found, [wanted])


def _check_backward(
    shape: tuple[int, int, int, int], device: str, options: Options
) -> Iterator[Checked]:
    """Of two layers that share x, of which the first has an adapter."""
    n, out, features, rank = shape
    yield from check_grad_x(shape, device, options, fp8_weight)
    d = random_bf16(n, rank, device, 26)
    grad = random_bf16(n, out, device, 28)
    # x as it is kept: its scale goes into D, which is rounded again.
    code, scale = fp8(n, features, E4M3, device, 29), positive(n, device, 30)
    scaled = (d.float() * scale).to(BF16)
    found = adapters.adapter_grads(
        [grad], d, [rank], [1.0], [code, scale], [d], torch.float32, "auto"
    )
    exact = [product(grad.t(), d.t()), product(scaled.t(), code.t())]
    yield from run_all("dL/dB, dL/dA", shape, found, exact)


def check_inductor(device: str, options: Options) -> Iterator[Checked]:
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


def check_transpose(device: str) -> Checked:
    w = fp8(*((300, 272) if device == "cuda" else (40, 48)), E4M3, device, 0)
    (turned,) = stored.transposed([w])
    assert torch.equal(turned.view(torch.uint8)[:, : len(w)], w.view(torch.uint8).t()), "transpose"
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


def check_adapter_casts(device: str) -> Checked:
    """Â, its scale, s·B, and with adapters in FP8 α against the CPU's: equal bytes. Alone, and with
    one scale a row beside what a calibration makes.
    """
    shapes = ((512, 256, 16), (96, 1024, 8)) if device == "cuda" else ((48, 32, 16), (16, 64, 8))
    generator = torch.Generator().manual_seed(0)
    lora_a = [torch.randn(r, features, generator=generator) for _, features, r in shapes]
    lora_b = [torch.randn(out, r, generator=generator) for out, _, r in shapes]
    scaling = [2.0, 0.3]
    given_a, given_b = ([t.to(device) for t in column] for column in (lora_a, lora_b))
    here, there = (lora_a, lora_b, scaling), (given_a, given_b, scaling)
    sizes = [[(9, features), (out, 9), (out, 5)] for out, features, _ in shapes]
    drawn = [[torch.randn(*size, generator=generator).to(BF16) for size in of] for of in sizes]
    bought = Fixed(*map(list, zip(*drawn, strict=True)))
    ways = [(g, m, NONE_FIXED) for g in ("row", "tensor") for m in ("amax", "pow2")]
    for granularity, mode, fixed in (*ways, ("row", "amax", bought), ("row", "pow2", bought)):
        spec = SiteSpec(granularity, mode, "e5m2")
        fixed_there = Fixed(*([t.to(device) for t in column] for column in fixed))
        in_k = str(replace(spec, adapter="fp8"))
        s = [torch.rand(len(b), 1) + 0.1 if spec.per_row else torch.ones(()) for b in lora_b]
        made = gpu.proxy_update(*there, [], False, str(spec), fixed_there)
        made += fp8_gpu.proxy_update(*there, [t.to(device) for t in s], in_k, fixed_there)
        expected = lowering.proxy_update(*here, [], False, str(spec), fixed)
        expected += fp8_adapter.proxy_update(*here, s, in_k, fixed)
        for one, other in zip(made, expected, strict=True):
            ours, wanted = (t.reshape(-1).view(torch.uint8) for t in (one.cpu(), other))
            assert torch.equal(ours, wanted), spec
    return Checked("casts of adapters", f"{len(shapes)} adapters", shapes[0], 0.0)


def make_state(out: int, features: int, rank: int) -> tuple[MergedAdapter, Tensor, Tensor, Tensor]:
    """A site whose sums are exact in float32: small multiples of powers of two."""
    generator = torch.Generator().manual_seed(out)

    def dyadic(rows: int, columns: int, most: int, step: float) -> Tensor:
        return torch.randint(-most, most + 1, (rows, columns), generator=generator) * step

    base, lora_a = dyadic(out, features, 16, 2.0**-3), dyadic(rank, features, 16, 2.0**-3)
    lora_b = dyadic(out, rank, 64, 2.0**-6)
    state = create("site", base, lora_a, lora_b, 2.0, FalqonConfig(update="rows"))
    lora_b += dyadic(out, rank, 16, 2.0**-8)
    return state, base, lora_a, lora_b


def check_update(device: str) -> Checked:
    """The kernels of update="rows" against the CPU op, random bits included."""
    shapes = ((512, 256, 16), (96, 1024, 16)) if device == "cuda" else ((48, 32, 16),)
    results: list[list[Tensor]] = []
    for place in ("cpu", device):
        made = [make_state(*shape) for shape in shapes]
        states = [[t.to(place) for t in state.tensors] for state, *_ in made]
        columns = [[*column] for column in zip(*states, strict=True)]
        base, lora_a, lora_b = ([m[i].to(place) for m in made] for i in (1, 2, 3))
        # The first is the reference; a second run on "cpu" is the kernels, interpreted.
        scaling, spec = [2.0] * len(made), str(made[0][0].spec)
        given: Any = [*columns, lora_b, lora_a, base, scaling], spec
        run = rows_cuda.proxy_update_ if results else reference.proxy_update_
        run(*given)
        results.append([t.cpu() for column in columns for t in column])
    if device == "cuda":  # B has not changed; and no value is read back on the host
        torch.cuda.set_sync_debug_mode("error")
        run(*given)
        torch.cuda.set_sync_debug_mode("default")
    for expected, actual in zip(*results, strict=True):
        same = expected.view(torch.uint8) == actual.view(torch.uint8)
        assert same.all(), f"{(~same).sum().item()} bytes of {tuple(expected.shape)} differ"
    return Checked("update", f"{len(shapes)} sites", shapes[0], 0.0)


def check_training(device: str, name: str) -> Checked:
    """Three eager steps of two tiny layers by a contender: the device's losses against the CPU's.

    Both run the same casts; products differ in summation order, at most some bfloat16 roundings in
    each layer.
    """
    losses = []
    contender = CONTENDERS[name]
    contender = replace(contender, options=(*contender.options, ("inner", "eager")))
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
    return Checked("three steps", name, (2, 16), worst)


def smoke(device: str) -> list[Checked]:
    """Whether kernels of each kind run here and compute what a CPU does: in seconds."""
    return [
        check_transpose(device),
        check_adapter_casts(device),
        check_training(device, IN_K),
        check_training(device, BEHIND),
    ]


def rest(device: str, options: Options | None = None) -> Iterator[Checked]:
    """Every kernel that may run."""
    options = options or Options()
    yield from check_activation_cast(device)
    yield from check_products(device, options)
    yield from check_inductor(device, options)
    yield check_update(device)
    yield check_training(device, "falqon, A frozen")
