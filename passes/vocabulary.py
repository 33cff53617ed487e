"""The operations that the passes know, by what they mean; a new spelling is one more entry."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from falqon_fx._compat import grouped_mm, nn_linear

aten = torch.ops.aten

LINEAR = {F.linear, nn_linear, aten.linear.default}
MATMUL = {torch.matmul, operator.matmul, aten.matmul.default, aten.mm.default, torch.mm}
ADDMM = {torch.addmm, aten.addmm.default}
OTHER = {
    F.embedding: "an embedding",
    aten.embedding.default: "an embedding",
    F.conv1d: "a convolution",
    F.conv2d: "a convolution",
    F.conv3d: "a convolution",
    aten.conv1d.default: "a convolution",
    aten.conv2d.default: "a convolution",
    aten.conv3d.default: "a convolution",
}
OTHER_MODULES: dict[Any, str] = {
    nn.Embedding: "an embedding",
    nn.Conv1d: "a convolution",
    nn.Conv2d: "a convolution",
    nn.Conv3d: "a convolution",
}
EINSUM = {torch.einsum, aten.einsum.default}
BATCHED = {torch.bmm, torch.baddbmm, aten.bmm.default, aten.baddbmm.default}
BMM: set[Any] = {torch.bmm, aten.bmm.default}
BADDBMM: set[Any] = {torch.baddbmm, aten.baddbmm.default}
GROUPED_MM: set[Any] = {F.grouped_mm, grouped_mm, aten._grouped_mm.default}
# transformers defines it when it is imported.
GROUPED_MM_NAMES = {f"transformers.grouped_mm_fallback{end}" for end in ("", ".default")}
PRODUCT_METHODS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__"}
MOVES: set[Any] = {torch.unsqueeze, torch.squeeze, torch.permute, torch.split, torch.chunk}
MOVES |= {torch.movedim, torch.cat, operator.getitem, aten.unsqueeze.default, aten.permute.default}
MOVE_METHODS = {"unsqueeze", "squeeze", "permute", "split", "chunk", "movedim", "expand"}
MOVE_METHODS |= {"contiguous", "clone", "view_as"}
ADD = {torch.add, operator.add, operator.iadd, aten.add.Tensor, aten.add_.Tensor}
MUL: set[Any] = {torch.mul, operator.mul, operator.imul, torch.multiply}
MUL |= {aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor, aten.mul_.Scalar}
MUL |= {aten.multiply.Tensor, aten.multiply.Scalar}
DIV: set[Any] = {torch.div, torch.divide, torch.true_divide, operator.truediv, operator.itruediv}
DIV |= {aten.divide.Tensor, aten.divide.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar}
DIV |= {aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor, aten.div_.Scalar}
DROPOUT = {F.dropout, torch.dropout, aten.dropout.default}
TRANSPOSE: set[Any] = {torch.t, aten.t.default, aten.numpy_T.default, aten.mT.default}
TRANSPOSE |= {aten.numpy_T, aten.mT}  # what Dynamo of torch 2.15 makes of W.T
TRANSPOSE_DIMS = {torch.transpose, aten.transpose.int}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}
VIEWS: set[Any] = {torch.reshape, torch.flatten, aten.view.default, aten.reshape.default}
VIEWS |= {aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int}
VIEW_METHODS = {"view", "reshape", "flatten", "unflatten"}
ROUNDING = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
OPERANDS = ("input", "mat1", "mat2", "other")  # in the order of their positions
CAST_METHODS = ("float", "half", "bfloat16", "double")
METHODS: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "add_": torch.add,
    "addmm": torch.addmm,
    "mul": torch.mul,
    "mul_": torch.mul,
    "div": torch.div,
    "div_": torch.div,
    "matmul": torch.matmul,
    "mm": torch.mm,
    "t": torch.t,
    "transpose": torch.transpose,
}


def linear_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """(x, weight, bias or None) of a call of one of `LINEAR`."""
    bound = {"bias": None, **dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    return bound["input"], bound["weight"], bound["bias"]
