"""What the ``falqon::`` ops become below autograd, for Inductor, in graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from falqon_fx._compat import OpOverload, inductor_decompositions
from falqon_fx.kernels.fixed import Fixed
from falqon_fx.ops import (
    experts,
    experts_lowering,
    fp8_gpu,
    fp8_grad,
    gpu,
    merged_linear,
    outliers,
    products,
)
from falqon_fx.ops.arguments import Merged, MergedGrad
from falqon_fx.rows import ops as rows_ops
from falqon_fx.site.spec import lowering_version


class Decompositions(dict[OpOverload, Callable[..., Any]]):
    """A decomposition table that stands in a disk cache's key as what made it.

    Inductor pickles the table into the key of its graph cache, and gives up caching where an entry
    can't be pickled.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return decompositions, (torch.__version__, lowering_version())


def _merged_experts(*args: Any) -> list[Tensor]:
    return experts_lowering.lower_merged_experts(experts_lowering.Experts(*args))


def _merged_linear(*args: Any) -> list[Tensor]:
    given = Merged(*args)
    run = fp8_gpu.merged_linear if given.alpha else gpu.merged_linear
    return run(given)


def _merged_linear_grad(*args: Any) -> list[Tensor]:
    return fp8_gpu.merged_linear_grad(MergedGrad(*args))


def _casts(lora_a: Any, lora_b: Any, scaling: Any, base_scale: Any, *rest: Any) -> list[Tensor]:
    given, (*fixed, wide, spec_text) = (lora_a, lora_b, scaling, base_scale), rest
    if base_scale:
        return fp8_gpu.proxy_update(*given, spec_text, Fixed(*fixed))
    return gpu.proxy_update(*given, wide, spec_text, Fixed(*fixed))


def decompositions(_torch: str = "", _lowering: str = "") -> Decompositions:
    """Inductor's decompositions and those that open the ``falqon::`` ops below autograd, for graphs
    on a GPU.
    """
    table = Decompositions(inductor_decompositions())
    table[merged_linear.CASTS] = _casts
    table[torch.ops.falqon.pending.default] = rows_ops.pending_part
    table[merged_linear.OP] = _merged_linear
    table[outliers.OP] = outliers.lower_outliers
    table[experts.OP] = _merged_experts
    table[torch.ops.falqon.merged_experts_grad_x.default] = experts_lowering.lower_grad_x
    table[torch.ops.falqon.merged_experts_grads.default] = experts_lowering.lower_grads
    table[torch.ops.falqon.merged_experts_grad_out_a.default] = experts_lowering.lower_grad_out_a
    table[fp8_grad.OP] = _merged_linear_grad
    table[torch.ops.falqon.merged_linear_grad_x.default] = gpu.merged_linear_grad_x
    table[torch.ops.falqon.grad_a.default] = gpu.grad_a
    table[torch.ops.falqon.adapter_grads.default] = partial(
        products.call, products.adapter_grads_product
    )
    table[torch.ops.falqon.grad_out_a.default] = partial(products.call, products.grad_out_a_product)
    return table
