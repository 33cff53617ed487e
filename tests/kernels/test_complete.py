"""What dispatch can choose on a GPU is in the table of compiled kernels, with the sizes it meets.

The functions that lower the ops run on tensors without data for a card that is not here, every
candidate of every product is launched, and each launch is looked up: the table must hold the
kernel, compiled for sizes that are multiples of 16 only where the launch's are.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from falqon_fx.kernels import hardware
from falqon_fx.kernels.adapter_cast import launch as adapter_cast
from falqon_fx.kernels.adapter_fp8 import launch as adapter_fp8
from falqon_fx.kernels.adapter_grads import launch as adapter_grads
from falqon_fx.kernels.aot import ARCHITECTURES
from falqon_fx.kernels.gemm import launch as gemm
from falqon_fx.kernels.grad_out_a import launch as grad_out_a
from falqon_fx.kernels.grouped_gemm import launch as grouped_gemm
from falqon_fx.kernels.grouped_outer import launch as grouped_outer
from falqon_fx.kernels.hardware import family
from falqon_fx.kernels.launching import Described
from falqon_fx.kernels.matrix import kernel_of, matrix
from falqon_fx.kernels.products import adapters, dispatch
from falqon_fx.kernels.products import tails as tails_products
from falqon_fx.kernels.products.choice import refuses
from falqon_fx.kernels.products.contest import Contest
from falqon_fx.kernels.spec import KernelSpec, Sizes, in_casts
from falqon_fx.kernels.tails import launch as tails
from falqon_fx.kernels.transpose import launch as transpose
from falqon_fx.kernels.update import launch as update
from falqon_fx.ops import experts_lowering, fp8_gpu, gpu, in_k, products
from falqon_fx.ops.experts_lowering import Experts
from falqon_fx.rows import cuda as rows_on_gpu
from falqon_fx.site.forms import scale_shape
from falqon_fx.site.numerics import E4M3, FP8_DTYPES
from falqon_fx.site.spec import RowsSpec, SiteSpec
from tests.parameters import slow

MODULES = (adapter_cast, adapter_fp8, adapter_grads, gemm, grad_out_a, grouped_gemm, grouped_outer)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of Llama and Qwen, and sizes that no tile divides.
SIZES = (4096, 1024, 11008, 3584, 576, 2730, 50257, 24)
RANKS = (8, 16, 64, 4, 24, 32, 100, 128, 256, 300)
Ints = tuple[int, ...]


@dataclass
class Card:
    """A card that launches nothing and notes what it would."""

    architecture: int
    seen: set[tuple[str, str, str]] = field(default_factory=set)
    missing: set[tuple[str, str]] = field(default_factory=set)

    def load(self, spec: KernelSpec, interpreted: bool) -> Any:
        assert not interpreted
        return Loaded(spec)

    def launch(
        self,
        kernel: tuple[KernelSpec, str],
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        written: Sequence[str],
        **options: int,
    ) -> list[Tensor]:
        spec, function = kernel
        names = kernel_of(spec).signatures(spec)[function]
        named = dict(zip(names, arguments, strict=True))
        self.note(spec, function, named)
        return [named[name] for name in written]

    def note(self, spec: KernelSpec, function: str, named: dict[str, Any]) -> None:
        """Look up a launch: a size that isn't a multiple of 16 must not be compiled as one."""
        known, where = kernel_of(spec), family(self.architecture)
        for sizes in get_args(Sizes):
            if (spec, sizes, where) not in TABLE:
                continue
            types = known.types(spec, sizes)[function]
            if all(is_aligned(named[n]) for n, kind in types.items() if kind.endswith(":16")):
                self.seen.add((spec.name, sizes, function))
                return
        odd = " ".join(name for name, value in named.items() if not is_aligned(value))
        self.missing.add((f"{spec.name} {function}", odd))


class Loaded:
    """The functions of a spec's source."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    def __getattr__(self, function: str) -> tuple[KernelSpec, str]:
        return self.spec, function


TABLE = {(spec, sizes, where) for spec, sizes, places in matrix() for where in places}


def is_aligned(value: Any) -> bool:
    if isinstance(value, Described):
        value = value.matrix
    if isinstance(value, Tensor):
        value = value.storage_offset() * value.itemsize
    return not isinstance(value, int) or value % 16 == 0


def run_all(contest: Contest) -> list[Tensor]:
    """Each candidate, as timing them does."""
    results: list[Tensor] = []
    for run in contest.candidates.values():
        if not refuses(run):
            results = run()
    return results


def library(a: Tensor, b: Tensor, *_: Tensor, out_dtype: torch.dtype, **options: Any) -> Tensor:
    return empty(a.shape[0], b.shape[1], dtype=out_dtype)


def grouped(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """torch's own has no shapes for all dtypes."""
    experts = [len(offs)] if b.dim() == 2 else []
    return empty(*experts, a.shape[0], b.shape[-1], dtype=a.dtype)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Tensors without data are of the card whose architecture is set."""
    made = Card(0)
    for module in (*MODULES, tails, transpose):
        monkeypatch.setattr(module, "load", made.load)
        monkeypatch.setattr(module, "launch", made.launch)
    monkeypatch.setattr(hardware, "_number", lambda device: made.architecture)
    monkeypatch.setitem(update._WRITERS, "meta", 64)
    monkeypatch.setattr(Contest, "run", run_all)
    monkeypatch.setattr(dispatch, "scaled_mm", library)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped)
    return made


def empty(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Group:
    """Sites that share x, each with the ranks of its adapters."""

    into: int
    outs: Ints
    ranks: tuple[Ints, ...]
    dtype: torch.dtype
    biased: bool
    lora_dtype: torch.dtype
    spec: SiteSpec

    @classmethod
    def drawn(cls, random: random.Random) -> Group:
        """Usual ones more often than rare ones."""

        def mostly(usual: Any, *others: Any) -> Any:
            return usual if random.random() < 0.8 else random.choice(others)

        size = lambda: mostly(random.choice(SIZES[:4]), *SIZES[4:])  # noqa: E731
        count, into = mostly(random.choice((1, 2, 3)), 4, 9), size()
        rank = mostly(random.choice(RANKS[:3]), *RANKS[3:])
        ranks = [mostly((rank,), (), (rank, 8), (random.choice(RANKS),)) for _ in range(count)]
        spec = SiteSpec(
            mostly("row", "tensor"),
            mostly("pow2", "amax"),
            mostly("e5m2", "e4m3"),
            accumulation=mostly("fast", "promoted"),
            transpose=random.choice(("auto", "transient", "kernel")),
            base="fp8" if into % 16 else mostly("fp8", "nvfp4"),
        )
        outs = tuple(size() for _ in range(count))
        dtype, lora = mostly(BF16, F16, F32), mostly(F32, BF16, F16)
        return cls(into, outs, tuple(ranks), dtype, mostly(False, True), lora, spec)

    @property
    def owner(self) -> list[int]:
        return [i for i, own in enumerate(self.ranks) for _ in own]

    @property
    def flat(self) -> list[int]:
        return [rank for own in self.ranks for rank in own]


N = 4096


def scale(rows: int, spec: SiteSpec) -> Tensor:
    return empty(rows, 1) if spec.per_row else empty()


def lowered(group: Group, *, fp8: bool, holds: bool, train_a: bool) -> None:
    """Forward and backward of the sites, as the ops are lowered on a GPU."""
    spec, text, flat = group.spec, str(group.spec), group.flat
    wide = BF16 if group.dtype == BF16 else F32
    q, q_scale = empty(N, group.into, dtype=E4M3), scale(N, spec)
    packed = spec.base == "nvfp4"
    weight = [empty(out, group.into, dtype=E4M3) for out in group.outs]
    if packed:
        weight = [empty(out, 9, group.into // 16, dtype=torch.uint8) for out in group.outs]
    scales = [empty(*scale_shape(out, spec)) for out in group.outs]
    bias = [empty(out, dtype=group.dtype) for out in group.outs] if group.biased else []
    lora_a = [empty(rank, group.into, dtype=group.lora_dtype) for rank in flat]
    lora_b = [
        empty(group.outs[i], rank, dtype=group.lora_dtype)
        for i, rank in zip(group.owner, flat, strict=True)
    ]
    grad = [empty(N, out, dtype=group.dtype) for out in group.outs]
    grads = [empty(N, out, dtype=FP8_DTYPES[spec.grad]) for out in group.outs]
    of_owner = [scales[i] for i in group.owner]
    ones = [1.0] * len(flat)
    a = [empty(rank, group.into, dtype=E4M3) for rank in flat]
    a_scale = [scale(rank, spec) for rank in flat]
    if fp8 and flat and max(flat) <= 128 and not packed:
        casts = fp8_gpu.proxy_update(lora_a, lora_b, ones, of_owner, text)
        b, alpha = [*casts[2::4]], [*casts[3::4]]
        counts = [empty(1, dtype=torch.int32) for _ in group.outs]
        own: tuple[Any, ...] = a, a_scale, b, alpha, counts
        of_x: tuple[Any, ...] = q, q_scale, [], [], weight, scales, bias
        in_k.merged_product_in_k(*(*of_x, *own, [], group.owner, [], group.dtype, text))
        of_g: tuple[Any, ...] = grads, scale(N, spec), weight
        for through, needs in ((True, True), (False, True), (True, False)):
            end: tuple[Any, ...] = group.owner, through, needs, [], group.dtype, wide, text
            in_k.grad_product_in_k(*(*of_g, *own, *end))
        d = [empty(N, sum(flat), dtype=wide)]
    else:
        gpu.proxy_update(lora_a, lora_b, ones, of_owner, wide == F32, text)
        b = [] if holds else [empty(*t.shape, dtype=wide) for t in lora_b]
        given: tuple[Any, ...] = q, q_scale, weight, scales, bias, a, a_scale, b, [], []
        products.merged_product(*(*given, group.owner, group.dtype, text))
        for code, own_scale in zip(a[:1], a_scale, strict=False):
            products.adapter_product(q, q_scale, code, own_scale, group.dtype, text)
        d = [empty(N, sum(flat), dtype=wide)] if flat else []
        of_grads = grads, [scale(N, spec)] * len(grads), weight
        products.grad_x_product(*of_grads, d, a, a_scale, [], group.dtype, text)
    x = [q, q_scale] if train_a else []
    for part in adapter_parts(flat):
        of_part = [grad[group.owner[j]] for j in part]
        ranks = [flat[j] for j in part]
        low = empty(N, sum(ranks), dtype=wide)
        given_b = [empty(group.outs[group.owner[j]], flat[j], dtype=wide) for j in part]
        products.grad_out_a_product(of_part, given_b, text)
        of_a = of_part, low, ranks, ranks, ones[: len(part)], x, [low] if x else []
        products.adapter_grads_product(*of_a, group.lora_dtype, text)


def calibrated(group: Group, more: int, last: int, first: int, *, train_a: bool) -> None:
    """Casts and gradients of adapters behind which stand ``more`` fixed rows, and ``last`` columns
    behind as many; in rows that begin with ``first`` columns of others.
    """
    spec, text, wide = group.spec, str(group.spec), BF16 if group.dtype == BF16 else F32
    of = [(group.outs[i], rank) for i, rank in zip(group.owner, group.flat, strict=True)]
    for launched in in_casts(len(of)):
        own = of[launched]
        lora_a = [empty(rank, group.into, dtype=group.lora_dtype) for _, rank in own]
        lora_b = [empty(out, rank, dtype=group.lora_dtype) for out, rank in own]
        rows = [empty(more, group.into, dtype=group.dtype) for _ in own] * bool(more)
        behind = [empty(out, more, dtype=group.dtype) for out, _ in own] * bool(more)
        columns = [empty(out, last, dtype=group.dtype) for out, _ in own] * bool(last)
        ones = [1.0] * len(own)
        fixed = rows, behind, columns
        adapters.adapter_casts(lora_a, lora_b, ones, wide, text, *fixed).run()
        scales = [empty(out, 1) for out, _ in own]
        plain = functools.partial(list[Tensor])
        tails_products.adapter_casts(lora_a, lora_b, ones, scales, plain, text, *fixed).run()
    q = [empty(N, group.into, dtype=E4M3), scale(N, spec)] * train_a
    for places in adapter_parts(group.flat):
        own = of[places.start : places.stop]
        ranks, widths = [rank for _, rank in own], [rank + more for _, rank in own]
        grad = [empty(N, out, dtype=group.dtype) for out, _ in own]
        b = [empty(out, rank + more + last, dtype=wide)[:, :rank] for out, rank in own]
        adapters.grad_out_a(grad, b, "auto").run()
        low, d = (empty(N, first + sum(widths), dtype=wide)[:, first:] for _ in range(2))
        given = grad, low, ranks, [1.0] * len(own), q, [d] if q else []
        adapters.adapter_grads(*given, group.lora_dtype, "auto", widths).run()


def adapter_parts(ranks: Sequence[int]) -> Iterator[range]:
    from falqon_fx.ops.adapter_grads import _parts

    for part in _parts([*ranks]):
        yield range(part.start, part.stop)


def in_one_stack(random: random.Random) -> None:
    """Experts, forward and backward."""
    out, into = random.choice(((1536, 2048), (2880, 2880), (2048, 768), (1000, 2048), (64, 24)))
    rank, experts, dtype = random.choice(RANKS), 8, random.choice((BF16, BF16, F16))
    spec = SiteSpec("row", random.choice(("pow2", "amax")), random.choice(("e5m2", "e4m3")))
    count, n, a_dtype = N, N // 2, random.choice((F32, BF16, F16))
    rows = random.choice(([], [empty(count, dtype=torch.int64)]))
    n = n if rows else count
    groups = empty(experts, dtype=torch.int32)
    weight, scales = empty(experts * out, into, dtype=E4M3), empty(experts * out, 1)
    a, a_scale = [empty(experts * rank, into, dtype=E4M3)], [empty(experts * rank, 1)]
    b = [empty(out, rank * experts)]
    x = empty(n, into, dtype=dtype)
    given = x, rows, groups, False, experts, weight, scales, a, a_scale, b, a, b, [1.0], True
    _, out_a, *kept = experts_lowering.lower_merged_experts(Experts(*given, dtype, str(spec)))
    grad = empty(count, out, dtype=dtype)
    of = grad, rows, groups, False, experts
    experts_lowering.lower_grad_out_a(grad, groups, False, experts, b[0], out_a.dtype, str(spec))
    d = [out_a]
    low = out_a, d, kept, 1.0, a_dtype, a_dtype
    experts_lowering.lower_grads(*of, *low, str(spec))
    of_x = grad, n, rows, groups, False, experts, weight, scales
    experts_lowering.lower_grad_x(*of_x, d, a, a_scale, dtype, str(spec))


def rows_written(random: random.Random, card: Card) -> None:
    """The update of rows, whose sizes stand in a table."""
    spec = random.choice(
        (
            RowsSpec("row", "pow2", "e5m2"),
            RowsSpec("tensor", "amax", "e5m2", pending="drop", topk="16", rounding="nearest"),
        )
    )
    out, into, rank = random.choice(SIZES), random.choice(SIZES), random.choice(RANKS)
    dtype, base = random.choice((F32, BF16, F16)), random.choice((None, BF16, F32))
    applied = F32 if spec.pending == "drop" else random.choice((F32, BF16))
    site = (
        empty(out + rank, into, dtype=E4M3),
        empty(out + rank, 1) if spec.per_row else empty(),
        empty(out, rank, dtype=applied),
        empty(5, dtype=torch.int64),
        empty(out, dtype=torch.int32),
        empty(out, rank, dtype=dtype),
        empty(rank, into, dtype=dtype),
        None if base is None else empty(out, into, dtype=base),
        1.0,
    )
    planned = rows_on_gpu._plan_launches([[value] for value in site], str(spec))
    assert len(planned.kernels) + len(planned.rest) == 1
    for launch in planned.kernels:
        for function in kernel_of(launch.spec).signatures(launch.spec):
            card.note(
                launch.spec,
                function,
                {"table_ptr": 0, "found_ptr": 0, "score_ptr": 0, "rows_ptr": 0},
            )


@pytest.mark.parametrize("count", [10, slow(300)])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 103])
def test_each_launch_is_in_the_table(card: Card, architecture: int, count: int) -> None:
    card.architecture = architecture
    draw = random.Random(architecture)
    for i in range(count):
        group = Group.drawn(draw)
        lowered(group, fp8=i % 2 == 0, holds=i % 5 == 1, train_a=i % 3 > 0)
        sizes = [draw.choice(of) for of in ((16, 16, 8, 0), (16, 16, 0, 4), (0, 0, 16, 8))]
        calibrated(group, *sizes, train_a=i % 3 > 0)
        in_one_stack(draw)
        rows_written(draw, card)
    assert not card.missing, "\n".join(map(str, sorted(card.missing)))
    assert len(card.seen) > 40


def test_a_small_rank_beside_a_large_one(card: Card) -> None:
    """In FP8, where one launch has both."""
    card.architecture = 90
    group = Group(
        4096, (4096, 1024), ((8,), (128,)), BF16, False, F32, SiteSpec("row", "pow2", "e5m2")
    )
    lowered(group, fp8=True, holds=False, train_a=True)
    assert not card.missing, card.missing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_a_calibrated_layer_has_kernels(
    card: Card, architecture: int, dtype: torch.dtype, rank: int
) -> None:
    """Of all seven sites, with 16 fixed rows and the columns of 16 channels."""
    card.architecture = architecture
    outs, spec = (4096,) * 4 + (11008, 11008, 4096), SiteSpec("row", "pow2", "e5m2")
    group = Group(4096, outs, ((rank,),) * 7, BF16, False, dtype, spec)
    calibrated(group, 16, 16, 0, train_a=True)
    assert not card.missing, card.missing
    fixed = {name[:11]: name for name, *_ in card.seen if "_7x_fixed_bfloat16_" in name}
    assert sorted(fixed) == ["adapter_cas", "adapter_fp8"]
