"""``adapter_dtype="fp8"``: the adapter as r more columns of the FP8 product.

    O = s_x ⊙ s_W ⊙ ([q | t] · [W | b]ᵀ)        t = q(O_A / (s_x · α)), b = q(s · B · α / s_W)
    dL/dx = s_g ⊙ ([g | D'] · [W; Â])            g = q(dL/dO ⊙ s_W), D' = q(D ⊙ s_A / s_g)

with D = s_g ⊙ (g · b) / α. Each is one plain product of FP8 operands with r more of K: no second
pass over O or dL/dx. α [r] holds a power of two for each dimension of the rank, which shares the
range of E4M3 between t and b. What is beyond the range is clamped, and counted (see `Clamped`).

This is the arithmetic on a CPU, in ATen; it is not compiled, and no faster than bfloat16 adapters.
`falqon_fx.ops.fp8_gpu` has it on a GPU.

Shapes: x [n, in]; W [out, in] and Â [r, in] in E4M3 (or bytes), their scales s_W and s_A float32
[rows, 1] or []; B and b [out, r]; O_A, t and D [n, r]; dL/dO and g [n, out]. Sites are numbered i,
adapters j; ``owner[j]`` is the site of adapter j.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from falqon_fx.errors import one_line
from falqon_fx.kernels.fixed import NONE_FIXED, Fixed
from falqon_fx.ops.arguments import Merged, MergedGrad
from falqon_fx.ops.cast_errors import cast_error
from falqon_fx.ops.lowering import (
    adapter_outputs,
    cast_fp8,
    cast_inputs,
    decode,
    finished,
    gemm_dtype,
    rescale,
    stacked,
)
from falqon_fx.site.casts import scale_of
from falqon_fx.site.clamped import AGAIN, ClampedCount
from falqon_fx.site.names import name_in_call
from falqon_fx.site.numerics import (
    E4M3,
    E5M2,
    FP8_MAX,
    ROUNDS_TO_MAX,
    decode_fp8,
    round_to_fp8,
    without_autocast,
)
from falqon_fx.site.spec import parse_spec

# A row of q has a root mean square of about 80: its largest element is at 448, and activations have
# a crest factor of 5 to 6.
_TYPICAL_Q = 80.0
# From a typical t to 448: tokens differ, and so do the directions of x.
_ROOM_T = 32.0
# From the largest g to what FP8 holds: D' has the scale of g and is a sum of many g. E5M2 has range
# to spare.
ROOM_G = {E5M2: 64.0, E4M3: 4.0}


class Clamped:
    """How many elements of b, t and D' were clamped, by the B that they belong to."""

    def __init__(self) -> None:
        self._counts: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
        self._on_device: weakref.WeakKeyDictionary[Any, dict[int, ClampedCount]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.Lock()

    def add(self, lora_b: Tensor, scaled: Tensor, fp8: torch.dtype) -> None:
        """Count the elements of ``scaled`` that FP8 clamps; warns when it begins."""
        count = int((scaled.abs() > ROUNDS_TO_MAX[fp8]).sum())
        if count == 0:
            return
        place = _place(lora_b)
        with self._lock:
            counts = self._counts.setdefault(lora_b.untyped_storage(), {})
            begins = place not in counts
            counts[place] = counts.get(place, 0) + count
        if begins:
            name = name_in_call(lora_b) or f"an adapter with B {list(lora_b.shape)}"
            warnings.warn(
                f"falqon: the part of {one_line(name)} is so large beside "
                f'that of its base weight that adapter_dtype="fp8" clamps some of it ({count} of '
                f"{scaled.numel()} elements). falqon_fx.adapters(model) counts them, by site, as "
                f".saturated. {AGAIN}",
                stacklevel=2,
            )

    def on_device(self, lora_b: Tensor, count: ClampedCount) -> None:
        """Note where a GPU counts those of the base weight that an adapter is added to."""
        self._on_device.setdefault(lora_b.untyped_storage(), {})[_place(lora_b)] = count

    def of(self, *lora_b: Tensor) -> int:
        """The number since the start, of the adapters of one base weight; waits for the device."""
        total, counts = 0, set[ClampedCount]()
        for b in lora_b:
            storage, place = b.untyped_storage(), _place(b)
            total += self._counts.get(storage, {}).get(place, 0)
            counts |= {c for p, c in self._on_device.get(storage, {}).items() if p == place}
        return total + sum(map(int, counts))


def _place(lora_b: Tensor) -> int:
    return int(lora_b.storage_offset())


clamped = Clamped()


@without_autocast
def proxy_update(
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    base_scale: Sequence[Tensor],
    spec_text: str,
    fixed: Fixed = NONE_FIXED,
) -> list[Tensor]:
    """[Â_j, s_A,j, b_j, α_j] of each adapter j in turn: b_j = q([s · B_j | B_c,j] · α_j / s_W) in
    E4M3, for the base with scale s_W that it is added to, and α_j float32 [r]. Behind it
    q(W_S,j / s_W).
    """
    spec = parse_spec(spec_text)
    casts: list[Tensor] = []
    for j, s in enumerate(base_scale):
        own = fixed.of([j])
        rank = own.rank(len(lora_a[j]))
        a = stacked(lora_a[j], own.error_a, 0, rank)
        of_a = cast_fp8(a, E4M3, spec, torch.float32, keep=True)
        assert of_a.code is not None
        values = decode_fp8(of_a.code, of_a.scale, torch.float32)
        b = stacked(lora_b[j].detach().to(torch.float32) * scaling[j], own.error_b, 1, rank)
        scaled, alpha = to_range(values, b, s)
        clamped.add(lora_b[j], scaled, E4M3)
        of_b = round_to_fp8(scaled, E4M3).to(E4M3)
        of_w = [part.to(torch.float32) / s for part in own.columns]
        of_b = round_to_fp8(torch.cat([scaled, *of_w], dim=1), E4M3).to(E4M3)
        casts += [of_a.code, of_a.scale, of_b, alpha]
    return casts


def to_range(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """b · α / s_W, float32 [out, r], which is cast, and α; ``a`` is dq(Â)."""
    wanted = b / s
    alpha = balance(_TYPICAL_Q * a.norm(dim=1), wanted.abs().amax(dim=0))
    return wanted * alpha, alpha


def balance(typical: Tensor, largest: Tensor) -> Tensor:
    """α [r], where with α = 1 a ``typical`` t is that large, and no b is above ``largest``.

    t / α has its room from α = typical · 32 / 448 on, and b · α fits up to α = 448 / largest. The
    geometric mean of the two leaves both the same range to spare. Where there is none the room of t
    shrinks: how large b is is known, of t it is a guess.
    """
    middle = (_exponent(typical * _ROOM_T / largest) + 1) >> 1
    most = _exponent(FP8_MAX[E4M3] / largest)
    # B is zero where a training starts.
    least = -_exponent(FP8_MAX[E4M3] / _ROOM_T / typical)
    power = torch.where(largest == 0, least, torch.minimum(middle, most)).clamp(-60, 60)
    return ((power + 127) << 23).view(torch.float32)


def _exponent(value: Tensor) -> Tensor:
    """The exponent of the largest power of two not above a positive float32; of zero -127."""
    return ((value.view(torch.int32) >> 23) & 0xFF) - 127


@without_autocast
def merged_linear(given: Merged) -> list[Tensor]:
    """[O_i | O_A | x̂] as `falqon_fx.ops.lowering.merged_linear` has them; O_A,j = t_j · s_x · α_j
    as it is multiplied.

    Where scales are powers of two they are in the values that are multiplied, which stay exact;
    others follow the product.
    """
    spec = parse_spec(given.spec_text)
    dtype, exact = gemm_dtype(given.out_dtype, given.x.device), spec.scale == "pow2"
    read = cast_inputs(given, spec, dtype)
    before = adapter_outputs(given, read, spec, dtype).split(given.ranks, dim=1)
    parts: list[Tensor] = []  # O_A
    tails: list[list[Tensor]] = []  # t, then e, with their scale where that is exact
    corrected, s_x = given.corrected, read.x.scale
    for j, (part, factor, of_b) in enumerate(zip(before, given.alpha, given.lora_b)):
        unit = read.x.scale * factor
        scaled = part.to(torch.float32) / unit
        clamped.add(of_b, scaled, E4M3)
        t = round_to_fp8(scaled, E4M3)
        parts.append((t * unit).to(dtype))
        tails.append([parts[-1] if exact else t.to(dtype)])
        if j in corrected:
            error = cast_error(given.x, s_x, corrected[j], spec)
            e = round_to_fp8(error / s_x, E4M3)
            tails[j].append((e * s_x if exact else e).to(dtype))
    ys = []
    for i, (w, s) in enumerate(zip(given.weight, given.scale)):
        own = given.adapters_of(i)
        right = [decode(w, s if exact else 1.0, dtype)]
        for j in own:
            of_b, factor, rank = given.b[j], given.alpha[j], given.ranks[j]
            right.append(decode_fp8(of_b[:, :rank], s / factor if exact else 1.0, dtype))
            if j in corrected:
                of_x = of_b[:, rank:]
                right.append(decode_fp8(of_x, s if exact else 1.0, dtype))
        left = [read.x.value, *(part for j in own for part in tails[j])]
        y = torch.cat(left, dim=1) @ torch.cat(right, dim=1).t()
        y = y if exact else rescale(y, read.x.rest, s, dtype)
        ys.append(finished(y, given, i))
    return [*ys, torch.cat(parts, dim=1), *read.kept(given.keep_x)]


@without_autocast
def merged_linear_grad(given: MergedGrad) -> list[Tensor]:
    """See `falqon_fx.ops.fp8_grad.merged_linear_grad`."""
    spec, grad, alpha = parse_spec(given.spec_text), given.grad, given.alpha
    first, fp8 = grad[0], spec.grad_dtype
    dtype, outs = gemm_dtype(first.dtype, first.device), [len(w) for w in given.weight]
    of_rows = [s.reshape(1, -1).expand(1, out) for s, out in zip(given.scale, outs)]
    wide = torch.cat([g.to(torch.float32) * s for g, s in zip(grad, of_rows)], dim=1)
    s_g = scale_of(wide, fp8, spec) * ROOM_G[fp8]
    g = round_to_fp8(wide / s_g, fp8).to(dtype)
    each = g.split(outs, dim=1)
    d, left, right = [], [g], [*given.weight]
    for j, i in enumerate(given.owner):
        product = (each[i] @ decode_fp8(given.b[j], 1.0, dtype)).to(torch.float32)
        d.append((product * (s_g / alpha[j])).to(dtype))
        if given.through_x:
            tail = product * (given.a_scale[j].reshape(1, -1) / alpha[j])
            clamped.add(given.counted[j], tail, fp8)
            left.append(round_to_fp8(tail, fp8).to(dtype))
            right.append(given.a[j])
    of_adapters = torch.cat(d, dim=1) if d else first.new_empty((len(first), 0), dtype=dtype)
    if not given.needs_x:
        nothing = first.new_empty((0, given.weight[0].shape[1]), dtype=given.x_dtype)
        return [nothing, of_adapters]
    product = torch.cat(left, dim=1) @ torch.cat([decode_fp8(code, 1.0, dtype) for code in right])
    return [(product.to(torch.float32) * s_g).to(given.x_dtype), of_adapters]
