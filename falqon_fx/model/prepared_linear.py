"""`PreparedLinear`, what the layers that `prepare` makes have in common: a base weight that lies in
FP8 alone, and reads as the weight it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from falqon_fx import _compat
from falqon_fx.errors import FalqonError
from falqon_fx.site import transposed as stored
from falqon_fx.site.numerics import AUTOCAST_DEVICES


class PreparedLinear(nn.Module):
    """A linear layer whose W [out, in] lies in FP8 or INT8, in the parameters named in ``STATE``.

    The bytes of FP8 are a uint8 parameter: ``.to(bfloat16)`` would cast a float8 tensor away, and a
    buffer would be broadcast by DDP in each forward pass.
    """

    STATE: ClassVar[tuple[str, ...]]
    TERMS: ClassVar[tuple[str, ...]] = ()  # parameters beside them, None where there are none

    code: nn.Parameter
    scale: nn.Parameter
    bias: nn.Parameter | None
    path: str  # for errors
    spec_text: str  # what W was cast with
    dtype: torch.dtype  # of the weight that was there
    transposed: bool  # whether that was stored [in, out], as GPT-2's Conv1D does
    in_features: int
    out_features: int

    def dequantized(self) -> Tensor:
        """dq(W) [out, in], in the original dtype."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The base weight, dequantized anew at each access, in the original dtype and layout.

        Raises a `FalqonError` where someone writes to it, as PEFT's merge does.
        """
        weight = self.dequantized()
        if self.transposed:
            weight = weight.t().contiguous()
        plain = torch.compiler.is_compiling() or _compat.is_dtensor(weight)
        return weight if plain else ReadOnly.of(weight, self.path)

    def plain(self) -> nn.Module:
        """The layer as it was before `prepare`, within the casts."""
        return plain_layer(self.dequantized(), self.bias, self.transposed).train(self.training)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self._make_ready(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        stored.forget()

    def _make_ready(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take bytes of this layer's own dtypes and shapes alone; all or none of them, and nothing
        that is made for them without them.
        """
        given = [n for n in (*self.STATE, *self.TERMS) if prefix + n in state_dict]
        lacking = [name for name in self.STATE if name not in given]
        if given and lacking:
            raise FalqonError(
                self.path,
                f"the state dict has a part of its FP8 weight, {', '.join(given)}, and lacks "
                f"{', '.join(lacking)}",
                "Load all of it or nothing of it (the trained parameters alone): one means nothing "
                "without the others",
            )
        for name in self.STATE:
            found, own = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(found, Tensor):
                continue
            if found.dtype != own.dtype:
                raise FalqonError(
                    self.path,
                    f"its {name} is {own.dtype} for a weight that was cast, the state dict has "
                    f"{found.dtype}: an average, a cast or another base_dtype's means nothing",
                    "Average or cast the trained parameters alone, and prepare both models with "
                    "the same config",
                )
            if found.shape != own.shape:
                raise FalqonError(
                    self.path,
                    f"its {name} is {list(own.shape)}, the state dict has {list(found.shape)}",
                    "Load it into a model with the same base, adapter and config",
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow moves between devices, never a cast: the scales are part of the FP8 weight."""
        state = {id(getattr(self, name)) for name in (*self.STATE, *self.TERMS)}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in state or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that a linear layer would read it in."""
    device = x.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


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
