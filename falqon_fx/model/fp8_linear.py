"""`Fp8Linear`, the layer that `prepare` puts in the place of a frozen linear one: W
in FP8 alone, and what a calibration has bought back of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.model.parts import on_parts
from falqon_fx.model.prepared_linear import PreparedLinear, autocast
from falqon_fx.model.terms import as_made, check_terms
from falqon_fx.ops.base_linear import base_linear, dequantize, with_columns
from falqon_fx.site.base import DIGEST_BYTES, Base, bases, digest
from falqon_fx.site.numerics import as_scale, scale_bits
from falqon_fx.site.nvfp4 import shape_of
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.sharded import local, whole
from falqon_fx.site.shards import Cut

IN_ONE_PROCESS = (
    "Call falqon_fx.save_checkpoint(model, folder) on all processes, and load_checkpoint(model, "
    "folder) in one with a model that isn't sharded; save_fp8(model, folder) merges as it writes"
)


class Fp8Linear(PreparedLinear):
    """x · dq(W)ᵀ + bias; in compiled code both are multiplied in FP8.

    A calibration (`prepare`) adds ``TERMS``, each None without it: ``error_a`` A_c [r, in] and
    ``error_b`` B_c [out, r], which stand for W's cast error (`falqon_fx.site.compensate`), and
    ``channels`` int32 [c] of x and ``columns`` W_S [out, c], with which compiled code adds the cast
    error of these channels. Frozen parameters: a buffer would be broadcast by DDP in each pass.

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
    TERMS = ("error_a", "error_b", "channels", "columns")

    error_a: nn.Parameter | None
    error_b: nn.Parameter | None
    channels: nn.Parameter | None
    columns: nn.Parameter | None

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
        self.out_features, self.in_features = shape_of(base.code)
        for name in self.TERMS:
            self.register_parameter(name, None)

    @property
    def terms(self) -> dict[str, nn.Parameter]:
        """What a calibration has added, by name."""
        named = ((name, getattr(self, name)) for name in self.TERMS)
        return {name: term for name, term in named if term is not None}

    @torch.inference_mode(False)  # they outlive the call
    def have_terms(self, like: Mapping[str, Tensor]) -> None:
        """Make place for the terms of a file, where there is none for them.

        Raises:
            FalqonError: its weight is cut over processes, and would have to be whole.
        """
        if {n: t.shape for n, t in like.items()} == {n: t.shape for n, t in self.terms.items()}:
            return
        if is_dtensor(self.code):
            problem = "a calibration was saved with it, and its FP8 weight is cut over processes"
            raise FalqonError(self.path, problem, IN_ONE_PROCESS)
        device = self.code.device
        self.set_terms({name: torch.empty_like(t, device=device) for name, t in like.items()})

    def set_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Take the terms of a calibration in the place of those that are there."""
        for name in self.TERMS:
            term = terms.get(name)
            setattr(self, name, None if term is None else nn.Parameter(term, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        self._verify()
        if is_dtensor(self.code):
            y: Tensor = on_parts(self, x)
            return y
        given = (self.code, self.scale, self.digest, self.bias, self.spec_text)
        terms = [getattr(self, name) for name in self.TERMS] if self.terms else []
        result: Tensor = base_linear(autocast(x), *given, *terms)
        return result

    def base(self) -> Base:
        """W as it lies in memory; of one that is cut over processes as DTensors.

        Raises:
            FalqonError: its bytes are no longer those that `prepare` made.
        """
        self._verify()
        return Base(self.code.detach(), as_scale(self.scale.detach()))

    def dequantized(self) -> Tensor:
        """dq(W) + B_c · A_c [out, in], in INT8 with W_S in its channels, in the original dtype.

        Raises:
            FalqonError: its bytes are no longer those that `prepare` made, or FSDP has spread them
                over processes.
        """
        if is_dtensor(self.code) and not self.is_part():
            problem = "it is sharded, and its dense base weight was asked for, as by PEFT's merge"
            raise FalqonError(self.path, problem, IN_ONE_PROCESS)
        self._verify()
        if self.terms:
            wide = dequantize(self.code, self.scale, torch.float32)
            return self.corrected(wide).to(self.dtype)
        weight: Tensor = dequantize(local(self.code), local(self.scale), self.dtype)
        cut = Cut.of(self.code)
        return weight if cut is None else cut.wrap(weight)

    def corrected(self, wide: Tensor) -> Tensor:
        """dq(W) + B_c · A_c, in INT8 with W_S in its channels, for float32 dq(W) [out, in]; dq(W)
        without a calibration.
        """
        if self.error_a is not None and self.error_b is not None:
            wide = wide + self.error_b.detach().float() @ self.error_a.detach().float()
        return with_columns(wide, self.code, self.channels, self.columns)

    def is_part(self) -> bool:
        """Whether tensor parallelism has cut W: then each process has a digest of its own bytes.
        FSDP cuts the digest of the whole as it cuts the bytes.
        """
        return is_dtensor(self.code) and self.digest.numel() > DIGEST_BYTES

    def whole_digest(self) -> Tensor:
        """The digest of all of W, uint8 [8]. All processes that hold a part of it call this."""
        if not self.is_part():
            return whole(self.digest.detach())
        return digest(whole(self.code.detach()), whole(self.scale.detach()))

    def digest_anew(self) -> None:
        """Make the digest that of the bytes which this process holds."""
        of_part = digest(local(self.code), local(self.scale))
        with torch.no_grad():
            local(self.digest).copy_(of_part)

    def _verify(self) -> None:
        # Compiled code looks before each call; of what FSDP has cut nobody here has all bytes.
        if torch.compiler.is_compiling():
            return
        if not is_dtensor(self.code) or (self.is_part() and not _in_two_ways(self)):
            base = Base(local(self.code).detach(), as_scale(local(self.scale).detach()))
            bases.verify(self.path, base, local(self.digest))

    def _make_ready(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Have the terms that the state dict has, which may be of another calibration."""
        super()._make_ready(state_dict, prefix)
        if prefix + "code" in state_dict:
            given = {name: state_dict.get(prefix + name) for name in self.TERMS}
            found = {name: term for name, term in given.items() if isinstance(term, Tensor)}
            found = as_made(self.path, found, "the state dict")
            size = self.out_features, self.in_features
            code = getattr(state_dict[prefix + "code"], "dtype", None)
            check_terms(self.path, found, size, "the state dict", code)
            self.have_terms(found)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.spec_text}"
        )


def _in_two_ways(layer: Fp8Linear) -> bool:
    """Whether FSDP shards what tensor parallelism has cut."""
    mesh = getattr(layer.code, "device_mesh", None)
    return layer.is_part() and mesh is not None and mesh.ndim > 1


def refuse_parts(model: nn.Module, call: str) -> None:
    """Raise where a ``call`` would have to put together what was cut in two ways."""
    for path, module in model.named_modules():
        if isinstance(module, Fp8Linear) and _in_two_ways(module):
            raise FalqonError(
                path,
                f"FSDP shards what tensor parallelism has cut of its FP8 weight, which {call} "
                "can't put together yet",
                "Save the adapters with falqon_fx.save_adapter(model, folder)",
            )


def made_terms(model: nn.Module) -> dict[str, Tensor]:
    """What calibrations have added to a model's layers, by name, in the dtypes it was made in
    (`as_made`).
    """
    return {
        f"{without_wrappers(path)}.{name}": term
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Fp8Linear)
        for name, term in as_made(module.path, module.terms, "the model").items()
    }
