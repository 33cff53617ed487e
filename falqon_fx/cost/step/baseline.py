"""What a decoder layer's step launches as PEFT and Inductor run it, as `falqon_fx.cost.step.layer`
has ours.
"""

from __future__ import annotations

from falqon_fx.cost.step.launches import Launch, Timer
from falqon_fx.cost.step.layer import NF4_BYTES, Step, attention, rope


def whole(step: Step, time: Timer, nf4: bool = False) -> list[Launch]:
    """PEFT's layer by Inductor: products by cuBLAS, B's added by whatever reads the sum."""
    d, a = step.decoder, step.a
    h, i, query, key = d.hidden, d.inner, d.query, d.key

    done = [
        time.fused("norm", a(h), a(h)),
        *summed_rope(step, time),
        time.fused("sum, norm", 3 * a(h), 2 * a(h)),
        time.fused("SwiGLU", 4 * a(i), 3 * a(i)),
        time.fused("sum", 3 * a(h), a(h)),
        time.fused("s dO", a(h), a(h)),
        time.fused("SwiGLU backward", 4 * a(i), 4 * a(i)),
        time.fused("sum, norm backward", 6 * a(h), 4 * a(h)),
        time.fused("attention's gradient", 2 * a(query), a(query)),
        time.fused("s dv", a(key), a(key)),
        *rope_backward(step, time),
        time.fused("sum, norm backward", 8 * a(h), a(h)),
        *attention(step, time),
    ]
    return [*done, *linears(step, time, nf4)]


def linears(step: Step, time: Timer, nf4: bool) -> list[Launch]:
    """The products of all linear layers, forward and backward."""
    done: list[Launch] = []
    for group in step.decoder.groups:
        for out in group.outs:
            done += _peft_linear(step, time, group.features, out)
            if nf4:
                share, weights = time.figures.dequantize.value, group.features * out
                bytes_of_w = (weights * NF4_BYTES, 2.0 * weights)
                done += [time.moving("dequantize", "W", *bytes_of_w, share) for _ in range(2)]
    return done


def summed_rope(step: Step, time: Timer) -> list[Launch]:
    """q, k and v with what their adapters add, and RoPE."""
    d, a = step.decoder, step.a
    query, key = a(d.query), a(d.key)
    added = [time.moving("elementwise", "v + its adapter", 2 * key, key)]
    if not d.qk_norm:
        both = query + key
        return [*added, time.moving("elementwise", "RoPE", 2 * both, both)]
    for of in (query, key):
        added.append(time.moving("elementwise", "q, k + their adapters", 2 * of, of))
    return [*added, *rope(step, time)]


def rope_backward(step: Step, time: Timer) -> list[Launch]:
    """Two gradients each: of the product of W, and of B."""
    d, a = step.decoder, step.a
    if not d.qk_norm:
        both = a(d.query) + a(d.key)
        return [time.moving("elementwise", "RoPE backward", both, 2 * both)]
    return [
        time.moving("elementwise", "RoPE, norm backward", 2 * of + 2 * a(d.head), 2 * of)
        for of in (a(d.query), a(d.key))
    ]


def _peft_linear(step: Step, time: Timer, k: int, out: int) -> list[Launch]:
    n, r, a, rate = step.n, step.rank, step.a, time.figures.bf16_gemm.value
    return [
        time.product("x W'", n, k, [out], 2, rate),
        time.product("dO W", n, out, [k], 2, rate),
        time.thin("adapter", "x A'", a(k) + 2 * r * k, a(r)),
        time.moving("adapter", "O_A B'", a(r) + 2 * r * out, a(out)),
        time.thin("adapter", "D", a(out) + 2 * r * out, a(r)),
        time.moving("adapter", "D A", a(r) + 2 * r * k, a(k)),
        time.thin("adapter", "dL/dB", a(out) + a(r), 2 * r * out),
        time.thin("adapter", "dL/dA", a(k) + a(r), 2 * r * k),
    ]
