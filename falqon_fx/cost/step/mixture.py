"""What a decoder layer with stacked experts launches: `falqon_fx.cost.step.layer` of a mixture.

The list that `benchmarks/gpu_lens.py` shows for a layer of Qwen3-MoE. ``S = n · top`` rows are
multiplied with experts; each expert is taken to have S / E of them. ``a(f)`` are bytes of [n, f] in
bf16 as in a dense layer, ``b(f)`` those of [S, f], ``p(f)`` the same in FP8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from falqon_fx.cost.step import baseline, layer
from falqon_fx.cost.step.decoder import Mixture
from falqon_fx.cost.step.launches import Launch, Timer
from falqon_fx.cost.step.layer import Step
from falqon_fx.kernels.spec import in_casts


@dataclass(frozen=True)
class _Experts:
    """The experts of a step, in bytes."""

    step: Step
    time: Timer
    of: Mixture

    @property
    def rows(self) -> int:
        return self.step.n * self.of.top

    def b(self, features: int) -> int:
        return 2 * self.rows * features

    def p(self, features: int) -> int:
        return self.rows * features

    @property
    def hidden(self) -> int:
        return self.step.decoder.hidden

    @property
    def up(self) -> tuple[int, int]:
        """in and out of gate_up, the first stack."""
        return self.hidden, 2 * self.of.inner

    @property
    def down(self) -> tuple[int, int]:
        return self.of.inner, self.hidden

    def weights(self, stack: tuple[int, int]) -> int:
        return self.of.experts * stack[0] * stack[1]

    def low(self, features: int) -> int:
        """Elements of A, or of B, of a stack."""
        return self.of.experts * self.step.rank * features

    def fused(self, name: str, reads: float, writes: float) -> Launch:
        return self.time.moving("elementwise", name, reads, writes)

    def product(
        self, name: str, k: int, out: int, operand: int, rate: float, *, own: bool = False
    ) -> Launch:
        """The rows of each expert times its [k, out]."""
        return self.time.grouped(name, self.rows, self.of.experts, k, out, operand, rate, own=own)

    def routing(self) -> list[Launch]:
        """The router, its softmax and the best of it; then rows sorted by expert."""
        n, h, e, rows = self.step.n, self.hidden, self.of.experts, self.rows
        rate = self.time.figures.bf16_gemm.value
        return [
            self.time.product("router", n, h, [e], 2, rate),
            self.fused("softmax", 2 * n * e, 4 * n * e),
            self.fused("top", 4 * n * e, 12 * rows),
            self.fused("sort", 8 * rows, 16 * rows),
            self.fused("order", 12 * rows, 22 * rows),
            self.fused("experts of rows", 8 * rows, 4 * rows),
            self.fused("count", 4 * rows, 4 * e),
            self.fused("sum up", 4 * e, 4 * e),
        ]

    def routing_back(self) -> list[Launch]:
        n, h, e = self.step.n, self.hidden, self.of.experts
        rate = self.time.figures.bf16_gemm.value
        return [
            self.fused("zeros", 0, 4 * n * e),
            self.fused("weights' gradient", 10 * self.rows, 0),
            self.fused("softmax backward", 6 * n * e, 2 * n * e),
            self.time.product("router's dL/dx", n, e, [h], 2, rate),
            self.fused("zeros", 0, self.b(1)),
            self.fused("zeros", 0, self.b(h)),
            self.fused("dO of rows", 8 * self.rows + self.step.a(h), 0),
        ]


def falqon(step: Step, time: Timer, train_a: bool) -> list[Launch]:
    """Ours, with adapters in bfloat16."""
    d = step.decoder
    assert d.mixture is not None
    x = _Experts(step, time, d.mixture)
    a, q, b, p, h = step.a, step.q, x.b, x.p, d.hidden
    again = 0 if train_a else 1
    casts = time.moving("casts", "A and s B", 4 * sum(d.adapter(step.rank)), step.adapter_casts)
    done = [
        replace(casts, kernels=len([*in_casts(d.sites)])),
        x.fused("norm, cast", a(h), q(h) * (1 + again)),
        *layer.rope(step, time),
        time.moving("casts", "attention's output", a(d.query), q(d.query) * (1 + again)),
        # Where x̂ isn't kept, it is cast by way of float32, once more as it is gathered.
        x.fused("sum, norm, cast", 2 * a(h) + again * 2 * a(h), a(h) + 2 * q(h) + again * 3 * q(h)),
        *x.routing(),
        x.fused("ends", 4 * d.mixture.experts, 4 * d.mixture.experts),
        x.fused("tiles", 8 * d.mixture.experts, 8 * d.mixture.experts),
        *_stack_forward(x, x.up, 2 * a(h) if again else q(h)),
        x.fused("SwiGLU, cast", b(2 * d.mixture.inner), p(d.mixture.inner) * (1 + again)),
        *_stack_forward(x, x.down),
        x.fused("weighted sum", b(h) + 3 * a(h), a(h)),
        *_shared(x, cast=True),
        *x.routing_back(),
        x.fused("dO of rows, cast", 2 * b(h), 2 * b(h) + p(h)),
        *_stack_backward(x, x.down, train_a, gathered=False),
        x.fused("SwiGLU backward, cast", 3 * b(d.mixture.inner), 3 * b(d.mixture.inner)),
        *_stack_backward(x, x.up, train_a, gathered=True),
        x.fused("sum, norm backward, cast", 6 * a(h), a(h) + q(h)),
        *layer.rope_backward(step, time),
        time.moving("casts", "dv", a(d.key), q(d.key)),
        x.fused("sum, norm backward", 3 * a(h), a(h)),
        *layer.attention(step, time),
    ]
    for group in d.groups:
        done += layer.linears(step, time, group, train_a)
    return done


def _shared(x: _Experts, *, cast: bool) -> list[Launch]:
    """What is around the products of the expert that all tokens take."""
    s, a, q, h = x.of.shared, x.step.a, x.step.q, x.hidden
    if not s:
        return []
    forward = (2 * a(s), q(s)) if cast else (4 * a(s), 3 * a(s))
    backward = (3 * a(s), 4 * a(s) + 2 * q(s)) if cast else (4 * a(s), 4 * a(s))
    return [
        x.fused("shared SwiGLU", *forward),
        x.fused("sum with the shared expert's", 2 * a(h), a(h)),
        x.fused("shared SwiGLU backward", *backward),
    ]


def _stack_forward(x: _Experts, stack: tuple[int, int], gathered: int = 0) -> list[Launch]:
    """O: the library's grouped product, where the card has one, behind a pass that gathers x, with
    the adapter's added behind it; else ours, which gathers as it reads, and adds it as it stores.
    ``gathered`` are the bytes that rows are gathered from, 0 where each has its own.
    """
    (k, out), r, f = stack, x.step.rank, x.time.figures
    read = x.step.q(k) if gathered else x.p(k)
    skinny = [
        x.time.thin("adapter", "x A'", read + x.low(k), x.b(r)),
        x.time.moving("adapter", "B by expert", 2 * x.low(out), 2 * x.low(out)),
    ]
    if not f.library:
        own = x.product("x W' + O_A B'", k, out, 1, f.own_gemm.value, own=True)
        return [*skinny, x.time.more(own, reads=x.b(r) + 2 * x.low(out))]
    done = [x.time.moving("casts", "gather x", gathered, x.p(k))] if gathered else []
    return [
        *skinny,
        *done,
        x.product("x W' (library)", k, out, 1, f.fp8_gemm.value),
        x.time.moving("adapter", "O_A B'", x.b(r) + 2 * x.low(out), x.b(out)),
        x.time.moving("adapter", "add", 2 * x.b(out), x.b(out)),
    ]


def _stack_backward(
    x: _Experts, stack: tuple[int, int], train_a: bool, *, gathered: bool
) -> list[Launch]:
    """D, dL/dx and the adapter's gradients, all by generated kernels. Where the card's tensor cores
    don't read FP8 by columns, W is decoded as it is read: at half of the rate, as bf16's is.
    """
    (k, out), r, f = stack, x.step.rank, x.time.figures
    scaled = x.time.moving("adapter", "scale D", x.b(r), (1 + train_a) * x.b(r))
    rate = f.own_gemm.value if f.by_columns else f.own_gemm.value / 2
    grad = x.product("dO W + D A", out, k, 1, rate, own=True)
    width = 2 if gathered else 0  # sums over rows of x are float32
    grad = x.time.more(grad, reads=x.b(r) + 2 * x.low(k), writes=width * x.rows * k)
    done = [
        x.time.thin("adapter", "D", x.b(out) + 2 * x.low(out), x.b(r)),
        scaled,
        x.time.moving("adapter", "decode A", x.low(k), 2 * x.low(k)),
        grad,
    ]
    if gathered:
        zeros, rows = 4 * x.step.n * k, 4 * x.rows * k
        done += [
            x.time.moving("sums", "zeros", 0, zeros),
            # Each row is read and added in its place, which is read and written, too.
            x.time.again("sums", "of dL/dx", rows, 0, 2 * rows),
        ]
    done.append(x.time.thin("adapter", "dL/dB", x.b(r) + x.b(out), 4 * x.low(out)))
    if train_a:
        read = x.step.q(k) if gathered else x.p(k)
        done.append(x.time.thin("adapter", "dL/dA", x.b(r) + read, 4 * x.low(k)))
    return done


def peft(step: Step, time: Timer, nf4: bool = False) -> list[Launch]:
    """PEFT, traced: W + s·B·A of all experts by ``torch.baddbmm``, and dL/dW' of all of them."""
    d = step.decoder
    assert d.mixture is not None
    x = _Experts(step, time, d.mixture)
    a, b, h, i = step.a, x.b, d.hidden, d.mixture.inner
    rate = time.figures.bf16_gemm.value
    sums = [_sum(x, stack) for stack in (x.down, x.up)]
    done = [
        x.fused("norm", a(h), a(h)),
        *baseline.summed_rope(step, time),
        x.fused("sum, norm", 3 * a(h), 2 * a(h)),
        *x.routing(),
        *sums,
        x.fused("gather x", a(h), b(h)),
        x.product("x W'", *x.up, 2, rate),
        x.fused("SwiGLU", b(2 * i), b(i)),
        x.product("x W'", *x.down, 2, rate),
        x.fused("weighted sum", b(h) + 2 * a(h), a(h)),
        *_shared(x, cast=False),
        *x.routing_back(),
        x.fused("dO of rows", 2 * b(h), b(h)),
        x.fused("zeros", 0, a(h)),
        x.product("dO W'", *x.down[::-1], 2, rate),
        x.fused("SwiGLU backward", 3 * b(i), 2 * b(i)),
        x.product("dO W'", *x.up[::-1], 2, rate),
        time.again("sums", "of dL/dx", b(h), 0, 2 * b(h)),
        x.fused("sum, norm backward", 4 * a(h), 2 * a(h)),
        x.fused("attention's gradient", 2 * a(d.query), a(d.query)),
        x.fused("s dv", a(d.key), a(d.key)),
        *baseline.rope_backward(step, time),
        x.fused("sum, norm backward", 8 * a(h), 3 * a(h)),
        *layer.attention(step, time),
    ]
    for stack in (x.down, x.up):
        done += _sum_backward(x, stack)
    return [*done, *baseline.linears(step, time, nf4)]


def _sum(x: _Experts, stack: tuple[int, int]) -> Launch:
    """W + s·B·A by ``torch.baddbmm``."""
    (k, out), weights = stack, 2 * x.weights(stack)
    low = 2 * (x.low(k) + x.low(out))
    more = (x.time.figures.baddbmm_passes.value - 2) * weights
    return x.time.again("adapter", "W + s B A", weights + low, weights, more)


def _sum_backward(x: _Experts, stack: tuple[int, int]) -> list[Launch]:
    """dL/dW', of which dL/dA and dL/dB are made, and these as PEFT has them."""
    (k, out), weights = stack, 2 * x.weights(stack)
    of_a, of_b, rate = 2 * x.low(k), 2 * x.low(out), x.time.figures.bf16_gemm.value
    flops = 2 * x.rows * k * out / rate
    return [
        x.time.timed("products", "dL/dW'", flops, x.b(k) + x.b(out), weights),
        x.time.thin("adapter", "dL/dA", weights + of_b, of_a),
        x.time.moving("adapter", "s dL/dA", of_a, of_a),
        x.time.thin("adapter", "dL/dB", weights + of_a, of_b),
        x.time.moving("adapter", "s dL/dB as it lies", of_b, of_b),
    ]


def kept(step: Step, run: str) -> int:
    """Bytes of a layer that are there for backward alone."""
    d = step.decoder
    assert d.mixture is not None
    m, a, n, h = d.mixture, step.a, step.n, d.hidden
    rows = n * m.top
    attention = 2 * a(h) + 2 * (a(d.query) + a(d.key)) + 4 * n * d.heads
    attention += a(step.rank) * sum(len(group.outs) for group in d.groups)
    if d.qk_norm:  # of what the norms read
        attention += a(d.query) + a(d.key)
    # gate, up and the result of each row; the router's, and places of rows.
    common = attention + 2 * rows * (2 * m.inner + h) + 2 * n * m.experts + 26 * rows
    if run in ("peft", "nf4"):
        sums = 2 * m.experts * 3 * m.inner * h
        return common + sums + a(h) + 2 * rows * (h + m.inner)
    common += 2 * 2 * rows * step.rank + step.adapter_casts  # B by expert in the place of s·B
    of_x = sum(step.q(group.features) for group in d.groups) + step.q(h) + rows * m.inner
    return common + (of_x if run == "falqon" else 0)
