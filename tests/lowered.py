"""What the ops should compute, in float64 on the same quantized operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.ops import lowering
from falqon_fx.site.forms import operand_of
from falqon_fx.site.numerics import E4M3, E5M2
from falqon_fx.site.spec import SiteSpec
from tests.emulation import cast, codes_of
from tests.strategies import Case, Layer, Lora
from tests.tolerances import Approx, rounded_bound, side_by_side

F32, BF16 = torch.float32, torch.bfloat16
falqon = torch.ops.falqon
NOTHING: list[list[Tensor]] = [[], [], [], []]  # scales of bases, and what a calibration makes


def run(case: Case) -> dict[str, Tensor]:
    """The op's results and the gradients of all that it differentiates, by name."""
    leaves = case.leaves()
    *ys, out_a = falqon.merged_linear(*case.arguments())[: len(case.layers) + 1]
    for layer, y in zip(case.layers, ys, strict=True):
        assert (y.shape, y.dtype) == (layer.grad.shape, case.out_dtype)
    pairs = [(y, layer.grad) for y, layer in zip(ys, case.layers) if layer.reached]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], [*leaves.values()], [g for _, g in pairs], allow_unused=True
    )
    results = {f"y {i}": y.detach() for i, y in enumerate(ys)} | {"out_a": out_a}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        if grad is not None:
            assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
            results[name] = grad
    return results


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products return; on a CPU that multiplies bfloat16."""
    return BF16 if dtype == BF16 else F32


def on_this_cpu(dtype: torch.dtype) -> torch.dtype:
    """The same on the CPU at hand."""
    return lowering.gemm_dtype(dtype, torch.device("cpu"))


def hat(x: Tensor, dtype: torch.dtype, spec: SiteSpec, apart: Sequence[int] = ()) -> Approx:
    """x [n, k] as it is multiplied: after its cast, exactly."""
    codes, scale = cast(x.float(), dtype, spec.per_row, spec.scale == "pow2", apart)
    return Approx.exact(codes.double() * scale.double())


def decoded(code: Tensor, scale: Tensor) -> Approx:
    """What codes stand for, exactly."""
    return Approx.exact(codes_of(operand_of(code)).double() * scale.double())


@dataclass
class Operands:
    """What the op multiplies on behalf of an adapter, exactly, and its O_A as computed."""

    lora: Lora
    read: Approx  # x, or the dropped x, after its cast
    a: Approx  # with A_c
    b: Approx  # scaling · B in the dtype of the products, with B_c and W_S
    out_a: Approx
    left: Approx  # O_A, with the cast error of x: what b meets
    channels: Tensor | None  # in which O_A and dL/dA get the cast error of x, too
    error: Approx | None

    @property
    def b_of_a(self) -> Approx:
        """b without W_S."""
        return self.b[:, : self.lora.rank]


def operands(case: Case, dtype: torch.dtype) -> list[list[Operands]]:
    """Of the adapters of each layer; ``dtype``: what products return."""
    casts = iter(case.casts)
    found: list[list[Operands]] = []
    for layer in case.layers:
        found.append([])
        for lora in layer.adapters:
            code, scale, b = next(casts)
            x, a = (case.x if lora.x is None else lora.x), decoded(code, scale)
            apart = () if case.apart else channels_apart(case)
            read = hat(x.detach().reshape(-1, x.shape[-1]), case.spec.operand, case.spec, apart)
            out_a = (read @ a.t()).rounded(dtype, *behind(case.spec, dtype))
            channels = None if case.apart or case.spec.base != "int8" else corrected(layer)
            error = None
            if channels is not None:
                error = cast_error(case, channels).rounded(dtype)
                of_a = a[:, channels.long()].rounded(F32, dtype)
                out_a = out_a.addmm(error, of_a.t(), dtype)
            # On a CPU without products in bfloat16 b is float32, which kernels may round.
            narrows = (b.dtype, dtype) == (F32, BF16)
            factor = Approx.exact(b).rounded(dtype) if narrows else Approx.exact(b.to(dtype))
            if not case.adds_b:  # then dL/dA is made from B itself
                factor = (Approx.exact(lora.lora_b) * number(lora.scaling)).rounded(F32, dtype)
            left = [out_a]
            if lora.channels is not None:
                left.append(cast_error(case, lora.channels).rounded(dtype))
            both = side_by_side(left, 1)
            found[-1].append(Operands(lora, read, a, factor, out_a, both, channels, error))
    return found


def corrected(layer: Layer) -> Tensor | None:
    """The channels in which a layer gets the cast error of x back: where several of its adapters
    bring it, those of the first.
    """
    each = (lora.channels for lora in layer.adapters)
    return next((channels for channels in each if channels is not None), None)


def channels_apart(case: Case) -> list[int]:
    """Those that the cast of x is zero in: in INT8 what is `corrected` in all layers."""
    if case.spec.base != "int8" or not case.adds_b:
        return []
    each = [corrected(layer) for layer in case.layers]
    found = [set[int]() if channels is None else {*channels.tolist()} for channels in each]
    return sorted(set.intersection(*found))


def cast_error(case: Case, channels: Tensor) -> Approx:
    """(x - dq(q(x)))_S: of x in float32, dq(q(x)) may have been rounded to it, and so is the
    difference.
    """
    x = case.x.detach().reshape(-1, case.x.shape[-1])
    read = hat(x, case.spec.operand, case.spec, channels_apart(case)).value[:, channels.long()]
    value = x.double()[:, channels.long()] - read
    off = rounded_bound(read, torch.zeros_like(read), F32)
    return Approx(value, off).rounded(F32)


def number(value: float) -> Approx:
    """A Python number that multiplies a float32 tensor."""
    return Approx.exact(torch.tensor(value, dtype=torch.float64)).rounded(F32)


def behind(spec: SiteSpec, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The roundings of a product with its scales. Those that are powers of two go into the operands
    exactly.
    """
    return () if spec.scale == "pow2" else (F32, F32, dtype)


def expected(
    case: Case, *, dtype: torch.dtype | None = None, steps: bool = False
) -> dict[str, Approx]:
    """Each result on the operands that the op really multiplies, and its roundings one by one.

    ``dtype``: what products return. ``steps``: dL/dx may be a buffer in it, which is rounded after
    each product that is added, instead of one product over all.
    """
    dtype = dtype or gemm_dtype(case.out_dtype)
    loras = operands(case, dtype)
    flat = case.x.detach().reshape(-1, case.x.shape[-1])
    x_hat = hat(flat, case.spec.operand, case.spec, channels_apart(case))
    wanted: dict[str, Approx] = {}
    for i, (layer, adapters) in enumerate(zip(case.layers, loras)):
        y = x_hat @ decoded(layer.base.code, layer.base.scale).t()
        y = y.rounded(dtype, *behind(case.spec, dtype))
        for lora in adapters if case.adds_b else []:
            y = y.addmm(lora.left, lora.b.t(), dtype)
        if layer.bias is not None:
            y = (y + Approx.exact(layer.bias).rounded(dtype)).rounded(dtype)
        wanted[f"y {i}"] = y.rounded(case.out_dtype)
    every = [lora.out_a for adapters in loras for lora in adapters]
    none = Approx.exact(torch.zeros(len(x_hat.value), 0))
    wanted["out_a"] = side_by_side(every, 1) if every else none
    return wanted | gradients(case, loras, dtype, steps)


def gradients(
    case: Case, loras: list[list[Operands]], dtype: torch.dtype, steps: bool
) -> dict[str, Approx]:
    """Those of the layers that are reached, by the names of `Case.leaves`."""
    spec, wanted = case.spec, {}
    pow2 = spec.scale == "pow2"
    products: list[tuple[Approx, Approx]] = []  # of W, each with scales of its own behind it
    joined: list[tuple[Approx, Approx]] = []  # added up in one product
    others: list[Approx] = []  # the parts of adapters that autograd adds to dL/dx
    j = -1
    for i, (layer, adapters) in enumerate(zip(case.layers, loras)):
        grad = layer.grad.reshape(-1, len(layer.base.code))
        exact, scale = Approx.exact(grad), layer.base.scale
        for lora in adapters:
            j += 1
            if not layer.reached:
                continue
            rank = len(lora.lora.lora_a)
            product = (exact.t() @ lora.out_a[:, :rank]).rounded(dtype) * number(lora.lora.scaling)
            wanted[f"b {j}"] = product.rounded(F32, lora.lora.lora_b.dtype)
            d = (exact @ lora.b_of_a).rounded(dtype)
            # The scale of x goes into D, unless it is in x̂ exactly.
            of_a = (d if pow2 else d.rounded(F32, dtype))[:, :rank]
            of_a = (of_a.t() @ lora.read).rounded(dtype, lora.lora.lora_a.dtype)
            if lora.channels is not None and lora.error is not None:
                error = (d[:, :rank].t() @ lora.error).rounded(dtype)
                of_a = with_columns(of_a, lora.channels, error).rounded(F32, lora.lora.lora_a.dtype)
            wanted[f"a {j}"] = of_a
            code, a_scale, _ = case.casts[j]
            if case.apart and case.adds_b:
                x = case.x if lora.lora.x is None else lora.lora.x
                part = d @ (lora.a if pow2 else lora.a.rounded(F32, dtype))
                part = part.rounded(dtype, x.dtype)
                if lora.lora.x is None:
                    others.append(part)
                else:
                    wanted[f"x {j}"] = part
            elif case.adds_b:  # the scales of A go into D
                turned = Approx.exact(a_scale.t() if spec.per_row else a_scale)
                joined.append(((d * turned).rounded(F32, dtype), decoded(code, torch.ones(()))))
        if not layer.reached:
            continue
        if layer.bias is not None:
            total = Approx.exact(torch.ones(1, len(grad))) @ exact
            wanted[f"bias {i}"] = Approx(total.value[0], total.bound[0]).rounded(layer.bias.dtype)
        # The scales of W's rows go into dL/dO before its cast.
        if spec.base == "int8":  # and are its cast
            turned = Approx.exact(scale.t() if spec.per_row else scale)
            w = decoded(layer.base.code, torch.ones(()))
            joined.append(((exact * turned).rounded(F32, dtype), w))
            continue
        wide = grad.float() * scale.t() if spec.base_per_row else grad.float()
        grad_hat = hat(wide, E5M2 if spec.grad == "e5m2" else E4M3, spec)
        w = decoded(layer.base.code, torch.ones(()) if spec.base_per_row else scale)
        (joined if pow2 else products).append((grad_hat, w))

    parts = [(left @ right).rounded(dtype, F32, F32) for left, right in products]
    if joined:
        lefts, rights = zip(*joined)
        parts.append((side_by_side(lefts, 1) @ side_by_side(rights, 0)).rounded(dtype))
    total = added(parts, F32)
    if steps:
        sizes = [left.largest @ right.largest for left, right in (*products, *joined)]
        size = torch.stack(sizes).sum(0)
        off = len(sizes) * rounded_bound(size, torch.zeros_like(size), dtype)
        total = Approx(total.value, total.bound + off)
    wanted["x"] = added([total.rounded(case.x.dtype), *others], case.x.dtype)
    return wanted


def with_columns(whole: Approx, channels: Tensor, columns: Approx) -> Approx:
    """``whole`` with ``columns`` added in some channels."""
    parts = [
        of.index_add(1, channels, column)
        for of, column in ((whole.value, columns.value), (whole.bound, columns.bound))
    ]
    return Approx(*parts)


def added(parts: list[Approx], dtype: torch.dtype) -> Approx:
    """The sum, rounded after each step, in any order: no partial sum exceeds that of all sizes."""
    value = torch.stack([part.value for part in parts]).sum(0)
    bound = torch.stack([part.bound for part in parts]).sum(0)
    size = torch.stack([part.largest for part in parts]).sum(0)
    for _ in parts[1:]:
        bound = bound + (rounded_bound(size, bound, dtype) - bound)
    return Approx(value, bound)


def check(case: Case, wanted: dict[str, Approx]) -> dict[str, Tensor]:
    """All results of the op, among them the gradient of everything that it should reach."""
    actual = run(case)
    assert actual.keys() == wanted.keys() & {*case.leaves(), *actual}
    for name, result in actual.items():
        shape = result.shape
        of = wanted[name]
        Approx(of.value.reshape(shape), of.bound.reshape(shape)).assert_holds(result)
    return actual
