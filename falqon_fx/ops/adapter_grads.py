"""The gradients of O_A, A and B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from falqon_fx.kernels.spec import MAX_RANK, MAX_SIBLINGS
from falqon_fx.ops import lowering


@dataclass(frozen=True)
class OutAGrads:
    """D_j = dL/dO_j · scaling_j · B_j [n, r_j], the gradients of O_A, by adapter.

    On a GPU they are columns of ``whole`` [n, Σ r_j], in the order of ``parts``.
    """

    parts: dict[int, Tensor]
    whole: Tensor | None = None

    def of(self, adapters: list[int]) -> list[Tensor]:
        """The gradients of some adapters: each, or on a GPU all side by side in one."""
        if self.whole is None or not adapters:
            return [self.parts[j] for j in adapters]
        places = [[*self.parts].index(j) for j in adapters]
        return [blocks(self.whole, [part.shape[1] for part in self.parts.values()], places)]


def blocks(whole: Tensor, widths: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """Some of the blocks of columns that stand side by side in ``whole``, a view of it where they
    do so, too.
    """
    if [*chosen] == [*range(chosen[0], chosen[-1] + 1)]:
        count = sum(widths[i] for i in chosen)
        return whole.narrow(1, sum(widths[: chosen[0]]), count)
    parts = whole.split([*widths], dim=1)
    return torch.cat([parts[i] for i in chosen], dim=1)


def grad_out_a(grad: dict[int, Tensor], b: dict[int, Tensor], spec_text: str) -> OutAGrads:
    """D_j of each adapter, for its dL/dO_j and b_j = scaling_j · B_j."""
    return OutAGrads({j: grad[j].to(factor.dtype) @ factor for j, factor in b.items()})


def grad_out_a_on_gpu(grad: dict[int, Tensor], b: dict[int, Tensor], spec_text: str) -> OutAGrads:
    """The same, in one launch."""
    if not b:
        return OutAGrads({})
    given = [grad[j] for j in b], [*b.values()]
    whole = torch.ops.falqon.grad_out_a(*given, spec_text)
    parts = whole.split([factor.shape[1] for factor in b.values()], dim=1)
    return OutAGrads(dict(zip(b, parts, strict=True)), whole)


@dataclass(frozen=True)
class Batch:
    """Adapters j that read the same x, and whose gradients are made together.

    Attributes:
        adapters: their numbers, of all that ``out_a`` has columns for.
        grad: dL/dO_j [n, out_j] of each.
        out_a: O_A [n, Σ R] of all adapters side by side; ``widths`` has R of each, of which the
            first ``ranks`` train: behind these stands what a calibration has made.
        scaling: of each of ``adapters``.
        b_dtypes: the dtype of each B.
        x: E4M3 [n, in] and its scale, where every A trains; else nothing, and no ``d``.
        d: D_j [n, R_j] of those, see `OutAGrads`.
        a_dtypes: the dtype of each A.
    """

    adapters: list[int]
    grad: list[Tensor]
    out_a: Tensor
    ranks: list[int]
    widths: list[int]
    scaling: list[float]
    b_dtypes: list[torch.dtype]
    x: list[Tensor]
    d: OutAGrads
    a_dtypes: list[torch.dtype]


def adapter_grads(batch: Batch, spec_text: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """dL/dB_j [out_j, r_j] = scaling_j · (dL/dO_j)ᵀ · O_A,j of each adapter, and
    dL/dA_j [r_j, in] = D_jᵀ · x̂ of each that has a D.
    """
    parts = batch.out_a.split(batch.widths, dim=1)
    of_b = [
        lowering.grad_b(g, parts[j][:, : batch.ranks[j]], factor, dtype)
        for g, j, factor, dtype in zip(batch.grad, batch.adapters, batch.scaling, batch.b_dtypes)
    ]
    return of_b, _grads_of_a(batch)


def _grads_of_a(batch: Batch) -> list[Tensor]:
    """dL/dA_j of each, as one product with those that share a dtype: x̂ is decoded once."""
    parts = {j: batch.d.parts[j][:, : batch.ranks[j]] for j in batch.adapters if batch.a_dtypes}
    if len({*batch.a_dtypes}) != 1:
        return [
            torch.ops.falqon.grad_a(parts[j], *batch.x, dtype)
            for j, dtype in zip(parts, batch.a_dtypes)
        ]
    whole = torch.cat([*parts.values()], dim=1)
    made = torch.ops.falqon.grad_a(whole, *batch.x, batch.a_dtypes[0])
    # Each as memory of its own: a gradient outlives the others.
    return [part.clone() for part in made.split([batch.ranks[j] for j in batch.adapters])]


def adapter_grads_on_gpu(batch: Batch, spec_text: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The same, in two or three launches for as many as the kernels take."""
    of_a: list[Tensor] = []
    of_b: list[Tensor] = []
    dtypes = {*batch.b_dtypes, *batch.a_dtypes}
    dtype = next(iter(dtypes)) if len(dtypes) == 1 else torch.float32
    for part in _parts([batch.ranks[j] for j in batch.adapters]):
        adapters = batch.adapters[part]
        ranks, d = [batch.ranks[j] for j in adapters], batch.d.of(adapters) if batch.x else []
        made = torch.ops.falqon.adapter_grads(
            batch.grad[part],
            blocks(batch.out_a, batch.widths, adapters),
            ranks,
            [batch.widths[j] for j in adapters],
            batch.scaling[part],
            batch.x,
            d,
            dtype,
            spec_text,
        )
        of_b += made[: len(ranks)]
        of_a += made[len(ranks) :]
    return _cast(of_b, batch.b_dtypes), _cast(of_a, batch.a_dtypes)


def _parts(ranks: Sequence[int]) -> Iterator[slice]:
    """The adapters in groups that the kernels take."""
    first = 0
    for end in range(1, len(ranks) + 1):
        full = end - first == MAX_SIBLINGS or sum(ranks[first : end + 1]) > MAX_RANK
        if full or end == len(ranks):
            yield slice(first, end)
            first = end


def _cast(results: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    return [result.to(dtype) for result, dtype in zip(results, dtypes, strict=True)]


def lower_grad_out_a(grad: dict[int, Tensor], b: dict[int, Tensor], spec_text: str) -> OutAGrads:
    """`grad_out_a`, or its like for GPUs."""
    on_gpu = any(factor.device.type == "cuda" for factor in b.values())
    return (grad_out_a_on_gpu if on_gpu else grad_out_a)(grad, b, spec_text)


def lower_adapter_grads(batch: Batch, spec_text: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """`adapter_grads`, or its like for GPUs."""
    run = adapter_grads_on_gpu if batch.out_a.device.type == "cuda" else adapter_grads
    return run(batch, spec_text)
