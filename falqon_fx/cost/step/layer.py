"""What a decoder layer's step launches: the list that `benchmarks/gpu_lens.py` shows for a layer
that is a graph by itself, with the bytes of each launch by the sizes of its arguments.

Bytes are counted in activations: ``a(f)`` is [n, f] in bf16, ``q(f)`` in FP8. A is [r, in], B
[out, r]; falqon's are float32, as PEFT makes them, those of PEFT bf16, the faster form. What a
fused kernel stores twice is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from falqon_fx.cost.step.decoder import Decoder, Group
from falqon_fx.cost.step.launches import Launch, Timer
from falqon_fx.errors import FalqonError

AdapterDtype = Literal["bfloat16", "fp8"]
Transpose = Literal["transient", "store"]
NF4_BYTES = 0.5 + 4 / 64  # an element: four bits, and a float32 scale of 64
NVFP4_BYTES = 0.5 + 1 / 16  # four bits, and an FP8 scale of 16


@dataclass(frozen=True)
class Step:
    """What is asked: a decoder, its tokens, and how it is trained; ``packed``: W in NVFP4,
    ``integers``: W, x and A in INT8.
    """

    decoder: Decoder
    batch: int
    tokens: int
    rank: int
    adapter_dtype: AdapterDtype = "bfloat16"
    transpose: Transpose = "transient"
    packed: bool = False
    integers: bool = False

    def __post_init__(self) -> None:
        if self.adapter_dtype == "fp8" and self.decoder.mixture is not None:
            problem = "it is not built for stacked experts"
            raise FalqonError('adapter_dtype="fp8"', problem, "Give bfloat16")

    @property
    def n(self) -> int:
        """Tokens of a step."""
        return self.batch * self.tokens

    def a(self, features: int) -> int:
        """Bytes of [n, features] in bf16."""
        return 2 * self.n * features

    def q(self, features: int) -> int:
        """Bytes of [n, features] in FP8."""
        return self.n * features

    @property
    def adapter_casts(self) -> int:
        """Bytes of a layer's A and s B as they are cast."""
        of_a, of_b = self.decoder.adapter(self.rank)
        return of_a + (of_b if self.adapter_dtype == "fp8" else 2 * of_b)


def attention(step: Step, time: Timer) -> list[Launch]:
    """FLOPs with a causal mask: half of the pairs; backward is five products to forward's two."""
    d = step.decoder
    flops = 2.0 * step.n * step.tokens * d.query
    forward, backward = time.figures.attention(step.tokens)
    q, kv, sums = step.a(d.query), 2 * step.a(d.key), 4 * step.n * d.heads
    back = time.timed("attention", "backward", 2.5 * flops / backward, 3 * q + kv + sums, q + kv)
    return [
        time.timed("attention", "forward", flops / forward, q + kv, q + sums),
        replace(back, kernels=3),
    ]


def rope(step: Step, time: Timer) -> list[Launch]:
    """RoPE of q and k, and their norms where a model has these."""
    d, a = step.decoder, step.a
    if not d.qk_norm:
        both = a(d.query) + a(d.key)
        return [time.moving("elementwise", "RoPE", both, both)]
    # Each reads cosines and sines, too, and keeps what a head is divided by.
    return [
        time.moving(
            "elementwise",
            "norm, RoPE",
            a(heads * d.head) + 2 * a(d.head) + 4 * step.n * heads,
            a(heads * d.head) + 4 * step.n * heads,
        )
        for heads in (d.heads, d.kv_heads)
    ]


def rope_backward(step: Step, time: Timer) -> list[Launch]:
    """RoPE's and the norms' backward, with the casts of dq and dk; norms go by way of float32."""
    d, a, q = step.decoder, step.a, step.q
    query, key = a(d.query), a(d.key)
    if not d.qk_norm:
        casts = query + key + (0 if step.integers else q(d.query + d.key))
        return [time.moving("elementwise", "RoPE backward, casts", query + key, casts)]
    done = []
    for of, kept in ((query, 2 * query), (key, 0)):
        first = 2 * of + 2 * a(d.head)
        done.append(time.moving("elementwise", "RoPE backward", first, 2 * of))
        writes = 2 * of + (0 if step.integers else of // 2) + kept
        done.append(time.moving("elementwise", "norm backward, casts", 3 * of, writes))
    return done


def falqon(step: Step, time: Timer, train_a: bool) -> list[Launch]:
    """Ours: casts fused into norms and SwiGLU, and into their backward."""
    in_k = step.adapter_dtype == "fp8"
    done = _casts_in_k(step, time) if in_k else _casts(step, time, train_a)
    done += attention(step, time)
    for group in step.decoder.groups:
        done += linears(step, time, group, train_a)
    return done


def linears(step: Step, time: Timer, group: Group, train_a: bool) -> list[Launch]:
    """The products of siblings, forward and backward."""
    ahead, back = _forward(step, time, group), _grad_x(step, time, group)
    return [*ahead, *back, *_adapter_grads(step, time, group, train_a)]


def _casts(step: Step, time: Timer, train_a: bool) -> list[Launch]:
    """What is around the products, with adapters in bfloat16."""
    d, a, q = step.decoder, step.a, step.q
    h, i, query, key = d.hidden, d.inner, d.query, d.key
    again = 0 if train_a else 1  # where x̂ isn't kept, the lens sees a cast stored twice
    back = 0 if step.integers else 1  # nothing is cast of gradients

    return [
        time.moving("casts", "A and s B", 4 * sum(d.adapter(step.rank)), step.adapter_casts),
        time.fused("norm, cast", a(h), q(h) * (1 + again)),
        *rope(step, time),
        time.moving("casts", "attention's output", a(query), q(query) * (1 + again)),
        time.fused("sum, norm, cast", 2 * a(h), q(h) * (1 + again)),
        time.fused("SwiGLU, cast", 2 * a(i), q(i) * (1 + again)),
        time.fused("sum", 3 * a(h), a(h)),
        *([time.moving("casts", "dO", a(h), q(h))] * back),
        time.fused("SwiGLU backward, casts", 3 * a(i), 4 * a(i) + 2 * q(i) * back),
        time.fused("sum, norm backward, cast", 4 * a(h), a(h) + q(h) * back),
        *rope_backward(step, time),
        *([time.moving("casts", "dv", a(key), q(key))] * back),
        time.fused("sum, norm backward", 3 * a(h), a(h)),
    ]


def _casts_in_k(step: Step, time: Timer) -> list[Launch]:
    """The same with the adapter in K: casts leave ``r`` columns behind theirs, of each adapter,
    which are counted with the cast. Those of siblings have one scale a token, so that the last
    ones wait for it: SwiGLU's stores one in between, k's and v's gradients are read again.
    """
    d, a, q, r = step.decoder, step.a, step.q, step.rank
    h, i, query, key = d.hidden, d.inner, d.query, d.key
    of_a, of_b = d.adapter(r)

    return [
        time.moving("casts", "A", 4 * (of_a + of_b), of_a),
        time.moving("casts", "s B", 4 * of_b, of_b),
        time.fused("norm, cast", a(h), q(h + 3 * r)),
        time.fused("RoPE", a(query) + a(key), a(query) + a(key)),
        time.moving("casts", "attention's output", a(query), q(query + r)),
        time.fused("sum, norm, cast", 2 * a(h), q(h + 2 * r)),
        time.fused("SwiGLU, cast", 2 * a(i), q(i + r)),
        time.fused("sum", 3 * a(h), a(h)),
        time.moving("casts", "dO", a(h), q(h + r)),
        time.fused("SwiGLU backward, casts", 3 * a(i), 2 * a(i) + q(3 * i + 2 * r)),
        time.fused("cast of up's gradient", q(i), 0),
        time.fused("sum, norm backward, cast", 4 * a(h), a(h) + q(h + r)),
        time.fused(
            "RoPE backward, casts",
            a(query) + 2 * a(key),
            a(query) + a(key) + q(query + 2 * key + 3 * r),
        ),
        time.fused("cast of dk", a(key), 0),
        time.moving("casts", "dv", a(key), 0),
        time.fused("sum, norm backward", 3 * a(h), a(h)),
    ]


def _forward(step: Step, time: Timer, group: Group) -> list[Launch]:
    """x·Aᵀ of all siblings by a kernel of ours, then O: the faster of ours with the adapter in its
    epilogue, and the library's with a second pass for each site; or with the adapter in K, the
    faster of ours, and the library's behind a pass that puts [W | b] together, or, where W is kept
    with room for b, writes b there.
    """
    n, r, k, f = step.n, step.rank, group.features, time.figures
    ranks, out = r * len(group.outs), sum(group.outs)
    skinny = time.skinny("x A'", n, k, len(group.outs), r)
    if step.adapter_dtype == "fp8":
        skinny = replace(skinny, writes=skinny.writes + n * ranks)
        own = f.own_gemm.value
        ours_in_k = time.product("[x t] [W b]'", n, k + r, group.outs, 1, own, own=True)
        in_k = [replace(ours_in_k, reads=ours_in_k.reads + n * (ranks - r))]  # every t
        anew, rate = 0 if step.transpose == "store" else k * out, f.fp8_gemm.value
        joins = time.moving("adapter", "[W b] (library)", anew + r * out, anew + ranks * out)
        joins = replace(joins, keeps=0 if anew else (k + ranks) * out)
        joined = [joins, time.product("[x t] [W b]' (library)", n, k + ranks, [out], 1, rate)]
        if len(group.outs) > 1:
            joined.append(time.moving("adapter", "scales of W (library)", 4 * out, 4 * out))
        return [skinny, *_faster(in_k, joined)]
    if step.packed:
        pairs = [(k, out) for out in group.outs]
        return [skinny, *_packed(step, time, "x W' + O_A B'", pairs, group.outs, k, r)]
    # bf16 products take twice as long as FP8 ones.
    rate = (f.own_int8 if step.integers else f.own_gemm).value
    ours = [time.product("x W' + O_A B'", n, k + 2 * r, group.outs, 1, rate, own=True)]
    theirs: list[Launch] = []
    rate = (f.int8_gemm if step.integers else f.fp8_gemm).value
    for out in group.outs:
        theirs.append(time.product("x W' (library)", n, k, [out], 1, rate))
        if step.integers:  # sums of 32 bits
            sums = 2 * step.a(out)
            theirs[-1] = time.more(theirs[-1], writes=step.a(out))
            theirs.append(time.moving("sums", "scales (library)", sums, step.a(out)))
        theirs += _addmm(step, time, out)
    if step.integers and f.architecture.value >= 90:  # ours is compiled for others
        return [skinny, *theirs]
    return [skinny, *_faster(ours, theirs)]


def _grad_x(step: Step, time: Timer, group: Group) -> list[Launch]:
    n, r, k, f = step.n, step.rank, group.features, time.figures
    sites, out = len(group.outs), sum(group.outs)
    done: list[Launch] = []
    scaled = time.moving("adapter", "scale D", step.a(r * sites), 2 * step.a(r * sites))
    if step.packed:
        pairs = [(of_site, k) for of_site in group.outs]
        return [scaled, *_packed(step, time, "dO W + D A", pairs, [k], out, r * sites)]
    if step.integers:
        return [scaled, *_decoded(step, time, k, out + r * sites)]
    in_k = out + (r * sites if step.adapter_dtype == "fp8" else 0)
    ones = time.moving("sums", "scales of 1 (library)", 0, 4 * k)  # it takes no product without
    if step.transpose == "transient":
        done.append(time.moving("transposes", "W", k * in_k, k * in_k))
    elif in_k > out:  # into columns beside Wᵀ
        done.append(time.moving("transposes", "A", k * (in_k - out), k * (in_k - out)))
    if step.adapter_dtype == "fp8":
        own, library = f.own_gemm.value, f.fp8_gemm.value
        by_us = [time.product("[g D] [W; A]", n, in_k, [k], 1, own, own=True)]
        by_them = [time.product("[g D] [W; A] (library)", n, in_k, [k], 1, library), ones]
        return [*done, *_faster(by_us, by_them)]
    rate = (f.summed_gemm if sites > 1 else f.own_gemm).value
    ours = [time.product("dO W + D A", n, out + 2 * r * sites, [k], 1, rate, own=True)]
    theirs = [time.product("dO W (library)", n, o, [k], 1, f.fp8_gemm.value) for o in group.outs]
    theirs += [ones] * sites
    if sites > 1:
        theirs.append(time.moving("sums", "of dL/dx", sites * step.a(k), step.a(k)))
    theirs += _addmm(step, time, k)
    return [*done, scaled, *_faster(ours, theirs)]


def _packed(
    step: Step,
    time: Timer,
    name: str,
    pairs: list[tuple[int, int]],
    columns: Sequence[int],
    depth: int,
    low: int,
) -> list[Launch]:
    """W [k, out] of ``pairs`` in NVFP4: the faster of our product, which decodes it as it reads it,
    and the library's, of what is decoded before; both in 16 bits, with the scales behind.
    """
    f, n, weights = time.figures, step.n, sum(k * out for k, out in pairs)
    ours = time.product(name, n, depth + low, columns, 1, f.own_gemm.value / 2, own=True)
    reads = step.q(depth) + NVFP4_BYTES * weights + 2 * low * (n + sum(columns))
    theirs = [time.moving("dequantize", "x (library)", step.q(depth), step.a(depth))]
    for k, out in pairs:
        theirs += [
            time.moving("dequantize", "W (library)", NVFP4_BYTES * k * out, 2 * k * out),
            time.product("x W' (library)", n, k, [out], 2, f.bf16_gemm.value),
            time.moving("sums", "scales (library)", step.a(out), step.a(out)),
        ]
    added = [one for out in columns for one in _addmm(step, time, out)]
    return _faster([replace(ours, reads=reads)], [*theirs, *added])


def _decoded(step: Step, time: Timer, k: int, rows: int) -> list[Launch]:
    """dL/dx of siblings whose W, with A's behind it, [rows, k], is decoded from INT8: dL/dO times
    the scales of rows, and a product of the library.
    """
    rate = time.figures.bf16_gemm.value
    return [
        time.moving("casts", "dO times scales", step.a(rows), step.a(rows)),
        time.moving("dequantize", "W", rows * k, 2 * rows * k),
        time.product("dO W + D A (library)", step.n, rows, [k], 2, rate),
    ]


def _addmm(step: Step, time: Timer, columns: int) -> list[Launch]:
    """The adapter added by ``torch.addmm``: two passes over what it adds to, or two more where it
    copies that first.
    """
    passes, whole = time.figures.addmm_passes.value, step.a(columns)
    half = passes / 2 * whole
    done = time.moving("adapter", "addmm (library)", half + step.a(step.rank), half)
    return [replace(done, kernels=ceil(passes / 2))]


def _faster(ours: list[Launch], theirs: list[Launch]) -> list[Launch]:
    return min(ours, theirs, key=lambda launches: sum(one.seconds for one in launches))


def _adapter_grads(step: Step, time: Timer, group: Group, train_a: bool) -> list[Launch]:
    """D, dL/dB and dL/dA of all siblings: parts over tokens, which a third kernel adds up."""
    r, sites, k, out = step.rank, len(group.outs), group.features, sum(group.outs)
    ranks = step.a(r * sites)
    parts = _splits(step.n, group, train_a, int(time.figures.processors.value))
    of_b, of_a = 4 * r * out, 4 * r * k * sites if train_a else 0
    # With the adapter in K, D comes from dL/dO's cast, and is stored in FP8, too.
    in_k = step.adapter_dtype == "fp8"
    grad, width = (step.q(out), 1) if in_k else (step.a(out), 2)
    done = [
        time.thin("adapter", "D", grad + width * r * out, ranks + in_k * ranks // 2),
        time.thin("adapter", "dL/dB", step.a(out) + ranks, parts * of_b),
    ]
    if train_a:
        done.append(time.thin("adapter", "dL/dA", step.q(k) + ranks, parts * of_a))
    sums = of_b + of_a
    return [*done, time.moving("adapter", "their sums", parts * sums, sums)]


def _splits(n: int, group: Group, train_a: bool, processors: int) -> int:
    """How `falqon_fx.kernels.adapter_grads` cuts tokens: two programs for each processor, of 256
    tokens and more.
    """
    columns = sum(ceil(out / 128) for out in group.outs)
    columns = min(columns, ceil(group.features / 64)) if train_a else columns
    of_step = 32 if len(group.outs) > 2 else 64  # tokens, of a program
    return max(1, min(ceil(n / of_step), 2 * processors // columns, n // 256))


def kept(step: Step, run: str) -> int:
    """Bytes of a layer that are there for backward alone."""
    d, a, q = step.decoder, step.a, step.q
    common = 2 * a(d.hidden) + 2 * (a(d.query) + a(d.key)) + 2 * a(d.inner)
    common += 4 * step.n * d.heads + a(step.rank) * d.sites
    common += (a(d.query) + a(d.key)) * d.qk_norm  # what the norms read
    if run in ("peft", "nf4"):  # both norms' results and SwiGLU's
        return common + 2 * a(d.hidden) + a(d.inner)
    of_x = sum(q(group.features) for group in d.groups) if run != "falqon_frozen_a" else 0
    return common + step.adapter_casts + of_x
