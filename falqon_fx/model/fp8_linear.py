"""`Fp8Linear`, the layer that `prepare` puts in the place of a frozen linear one: W
in FP8 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import _compat
from falqon_fx.errors import FalqonError
from falqon_fx.ops.base_linear import base_linear, dequantize
from falqon_fx.site import transposed as stored
from falqon_fx.site.base import Base, bases, digest
from falqon_fx.site.numerics import as_scale


class Fp8Linear(nn.Module):
    """x · dq(W)ᵀ + bias; in compiled code both are multiplied in FP8.

    W's bytes are a uint8 parameter and its float32 scales an int32 one, which holds their bits:
    ``.to(bfloat16)`` would cast a float8 tensor away and FSDP's mixed precision round the scales; a
    buffer would be broadcast by DDP in each forward pass. ``digest`` is their hash (`base.digest`):
    what averages all parameters, as an EMA does, would leave bytes that mean nothing.

    Args:
        base: W in FP8, [out, in].
        bias: the layer's own, or None.
        dtype: of the weight that ``base`` was cast from.
        transposed: whether the layer stored its weight [in, out], as GPT-2's Conv1D does.
        spec: what ``base`` was cast with (`falqon_fx.site.spec.SiteSpec`).
        path: of the layer, for errors.
    """

    def __init__(
        self,
        base: Base,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool,
        spec: str,
        path: str,
    ) -> None:
        super().__init__()
        self.path, self.spec = path, spec
        self.code = nn.Parameter(base.code, requires_grad=False)
        self.scale = nn.Parameter(base.scale.view(torch.int32), requires_grad=False)
        self.digest = nn.Parameter(digest(base.code, base.scale), requires_grad=False)
        self.bias = bias
        self.dtype, self.transposed = dtype, transposed
        self.out_features, self.in_features = base.code.shape

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        self._verify()
        result: Tensor = base_linear(x, self.code, self.scale, self.digest, self.bias, self.spec)
        return result

    def base(self) -> Base:
        """W as it lies in memory.

        Raises:
            FalqonError: its bytes are no longer those that `prepare` made.
        """
        self._verify()
        return Base(self.code.detach(), as_scale(self.scale.detach()))

    @property
    def weight(self) -> Tensor:
        """The base weight, dequantized anew at each access, in the original dtype and layout.

        Raises a `FalqonError` where someone writes to it, as PEFT's merge does.
        """
        weight = self._dequantized()
        return weight if torch.compiler.is_compiling() else ReadOnly.of(weight, self.path)

    def plain(self) -> nn.Module:
        """The layer as it was before `prepare`, within the cast."""
        self._verify()
        weight = dequantize(self.code, self.scale, self.dtype)
        return plain_layer(weight, self.bias, self.transposed).train(self.training)

    def _verify(self) -> None:
        if not torch.compiler.is_compiling():  # compiled code looks before each call
            base = Base(self.code.detach(), as_scale(self.scale.detach()))
            bases.verify(self.path, base, self.digest)

    def _dequantized(self) -> Tensor:
        self._verify()
        weight: Tensor = dequantize(self.code, self.scale, self.dtype)
        return weight.t().contiguous() if self.transposed else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Follow moves between devices, never a cast: the scales are part of the FP8 weight."""
        state = {id(self.code), id(self.scale), id(self.digest)}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in state or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in ("code", "scale", "digest"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                raise FalqonError(
                    self.path,
                    f"its {name} are bytes of FP8 numbers ({own.dtype}), the state dict has "
                    f"{given.dtype}: an average or a cast of them means nothing",
                    "Average or cast the trained parameters alone; the base is constant",
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        stored.forget()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.spec}"
        )


class ReadOnly(Tensor):
    """A dequantized copy of a base weight, and its views: writes into it would be lost."""

    path: str = ""

    @classmethod
    def of(cls, weight: Tensor, path: str) -> ReadOnly:
        result = weight.as_subclass(cls)
        result.path = path
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _writes(func.__name__) and isinstance(args[0], cls):
            raise FalqonError(
                args[0].path,
                "prepare() has put FP8 in the place of its base weight, so a write would be lost "
                "(merge_adapter, merge_and_unload, an initialization such as PiSSA)",
                "Call falqon_fx.restore(model) first, or falqon_fx.merge_and_unload(model)",
            )
        with _compat.plain_tensors():
            result = func(*args, **kwargs or {})
        own = [arg for arg in args if isinstance(arg, cls)]
        if own and isinstance(result, Tensor) and result.data_ptr() == own[0].data_ptr():
            return cls.of(result, own[0].path)
        return result


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument's values."""
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name in _WRITES


_WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def plain_layer(weight: Tensor, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """A frozen linear layer with ``weight`` [out, in]: GPT-2's Conv1D where it is to be stored
    [in, out], else ``nn.Linear``.
    """
    out, features = weight.shape
    layer: nn.Module
    with torch.device("meta"):  # its parameters are given
        if transposed:
            from transformers.pytorch_utils import Conv1D

            layer, weight = Conv1D(out, features), weight.t().contiguous()
        else:
            layer = nn.Linear(features, out, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer
