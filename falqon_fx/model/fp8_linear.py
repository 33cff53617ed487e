"""`Fp8Linear`, the layer that `prepare` puts in the place of a frozen linear one: W
in FP8 alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.model.prepared_linear import PreparedLinear, autocast
from falqon_fx.ops.base_linear import base_linear, dequantize
from falqon_fx.site.base import Base, bases, digest
from falqon_fx.site.numerics import as_scale, scale_bits

IN_ONE_PROCESS = (
    "Call falqon_fx.save_checkpoint(model, folder) on all processes, and load_checkpoint(model, "
    "folder) in one with a model that isn't sharded; save_fp8(model, folder) merges as it writes"
)


class Fp8Linear(PreparedLinear):
    """x · dq(W)ᵀ + bias; in compiled code both are multiplied in FP8.

    Its scales are stored as their bits (`falqon_fx.site.numerics.scale_bits`). ``digest`` is a hash
    of the bytes and the scales (`base.digest`): what averages all parameters, as an EMA does, would
    leave bytes that mean nothing.

    Args:
        base: W in FP8, [out, in].
        bias: the layer's own, or None.
        dtype: of the weight that ``base`` was cast from.
        transposed: whether the layer stored its weight [in, out], as GPT-2's Conv1D does.
        spec_text: what ``base`` was cast with (`falqon_fx.site.spec.SiteSpec`).
        path: of the layer, for errors.
    """

    STATE = ("code", "scale", "digest")

    def __init__(
        self,
        base: Base,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool,
        spec_text: str,
        path: str,
    ) -> None:
        super().__init__()
        self.path, self.spec_text = path, spec_text
        self.code = nn.Parameter(base.code, requires_grad=False)
        self.scale = nn.Parameter(scale_bits(base.scale), requires_grad=False)
        self.digest = nn.Parameter(digest(base.code, base.scale), requires_grad=False)
        self.bias = bias
        self.dtype, self.transposed = dtype, transposed
        self.out_features, self.in_features = base.code.shape

    def forward(self, x: Tensor) -> Tensor:
        self._verify()
        given = (self.code, self.scale, self.digest, self.bias, self.spec_text)
        result: Tensor = base_linear(autocast(x), *given)
        return result

    def base(self) -> Base:
        """W as it lies in memory.

        Raises:
            FalqonError: its bytes are no longer those that `prepare` made.
        """
        self._verify()
        return Base(self.code.detach(), as_scale(self.scale.detach()))

    def dequantized(self) -> Tensor:
        """dq(W) [out, in], in the original dtype.

        Raises:
            FalqonError: its bytes are no longer those that `prepare` made, or other processes hold
                parts of them.
        """
        if is_dtensor(self.code):
            problem = "it is sharded, and its dense base weight was asked for, as by PEFT's merge"
            raise FalqonError(self.path, problem, IN_ONE_PROCESS)
        self._verify()
        weight: Tensor = dequantize(self.code, self.scale, self.dtype)
        return weight

    def _verify(self) -> None:
        # Compiled code looks before each call; of a sharded layer nobody here has all bytes.
        if not torch.compiler.is_compiling() and not is_dtensor(self.code):
            base = Base(self.code.detach(), as_scale(self.scale.detach()))
            bases.verify(self.path, base, self.digest)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.spec_text}"
        )
