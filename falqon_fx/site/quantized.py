"""Weights that others have quantized: what tells them, and what is said of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor, is_fake

ALREADY = "its base weight is already quantized ({})"
SKIPPED = ALREADY + ": load the checkpoint in 16 bits to have it cast"  # by `prepare`
REMEDY = (
    "Load the checkpoint in 16 bits and have falqon cast it, "
    'to base_dtype="nvfp4" for four bits, to "fp8" or "int8" for eight; as it is the layer runs as '
    "it was"
)


def quantized_as(weight: Tensor) -> str | None:
    """The class and dtype of a weight that others have quantized, None of one that nobody has.

    It holds codes (integers or floating point of a byte, integers of four with several codes each),
    or is of a class that stands for such tensors, as those of torchao are.
    """
    dtype, kind = weight.dtype, type(weight)
    # No indices, no mask.
    is_code = dtype not in (torch.int64, torch.bool) and not dtype.is_complex
    is_code = is_code and (dtype.itemsize == 1 or not dtype.is_floating_point)
    stands_for = hasattr(kind, "__tensor_flatten__") and not is_dtensor(weight)
    if not is_code and not stands_for:
        return None
    named = kind not in (Tensor, nn.Parameter) and not is_fake(weight)
    return ", ".join([kind.__name__] * named + [str(dtype)] * is_code)


def own_state(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that may keep more in Python than its elements, which copies
    and stand-ins lose: no class of torch's, and none that says what it consists of.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) or is_fake(tensor)
    return not plain and not hasattr(type(tensor), "__tensor_flatten__")


def layer_quantized_as(layer: nn.Module, weight: object) -> str | None:
    """`quantized_as` of a layer's weight. One of a class that keeps more than its elements, in a
    layer with code of its own, may hold codes in any dtype: bitsandbytes' do, for FSDP.
    """
    if not isinstance(weight, Tensor):
        return None
    own = own_state(weight) and type(layer) is not nn.Linear
    return quantized_as(weight) or (type(weight).__name__ if own else None)
