"""A linear layer that has an FP8 form, as `save_fp8` writes it: with its active adapters merged."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.config import BaseDtype, FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.files import export_files as files
from falqon_fx.files.export_report import FROM_CAST, Left, Source
from falqon_fx.files.hf import read_index, read_tensor
from falqon_fx.files.site_checks import described
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.lora_layers import LoraLayer, is_linear
from falqon_fx.model.prepared_linear import PreparedLinear, plain_layer
from falqon_fx.model.stacks import Fp8Stack
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.rows.state import MergedAdapter
from falqon_fx.rows.unload import ACTIVATE, merged_weight, not_written
from falqon_fx.site import nvfp4
from falqon_fx.site.base import Base, bases, cast_base, check_weight, digest
from falqon_fx.site.numerics import INT8, powers_of_two
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.sharded import whole_copy
from falqon_fx.site.spec import SiteSpec, parse_spec


@dataclass(frozen=True)
class Merged:
    """W, float32 [out, in], the same with its adapters, and what W is."""

    weight: Tensor
    total: Tensor
    source: Source

    def note(self, cast: Base, left: Left) -> None:
        """How much a second cast leaves of the adapters."""
        if self.source != "base weight":
            left.note(self.weight, self.total, cast.dequantize())


@dataclass(frozen=True)
class ExportLayer:
    """``module`` at ``path`` is PEFT's layer around ``linear``, or ``linear`` itself.

    ``state`` is that of update="rows"; ``original`` reads the base weight [out, in] that `prepare`
    freed, where it is at hand.
    """

    path: str
    module: Any
    linear: Any
    spec: SiteSpec
    state: MergedAdapter | None = None
    original: Callable[[ExportLayer], Tensor] | None = None

    @property
    def prepared(self) -> bool:
        return isinstance(self.linear, PreparedLinear)

    @property
    def transposed(self) -> bool:
        """Whether the layer is GPT-2's Conv1D, whose weight is [in, out]."""
        return self.linear.transposed if self.prepared else type(self.linear) is not nn.Linear

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weight, now or before `prepare`."""
        return self.linear.dtype if self.prepared else self.linear.weight.dtype  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        if self.prepared:
            return self.linear.out_features, self.linear.in_features
        first, second = self.linear.weight.shape
        return (second, first) if self.transposed else (first, second)

    def whole(self) -> ExportLayer:
        """The layer with what other processes hold of it."""
        if not any(map(is_dtensor, self.module.parameters())):
            return self
        module = whole_copy(self.module)
        linear = module if self.module is self.linear else module.get_base_layer()
        if isinstance(self.linear, Fp8Linear) and self.linear.is_part():
            self.linear.base()  # looks at the bytes that this process holds
            linear.digest = nn.Parameter(digest(linear.code, linear.scale), requires_grad=False)
        return replace(self, module=module, linear=linear)

    def cast(self, left: Left) -> tuple[Base, Source]:
        """W + Σ scaling · B · A in the form of its base, cast once, and what from. Where the
        adapters add nothing, and with update="rows", the bytes that were trained on stay as they
        are.

        Raises:
            FalqonError: an adapter that PEFT can't merge, or a merged weight that FP8 can't hold.
        """
        if self.state is not None:
            out, scale = self.shape[0], self.state.scale
            return Base(self.state.code[:out], scale[:out] if scale.dim() else scale), "unchanged"
        merged = self.merged()
        if merged is None:
            return self.trained(), "unchanged"
        base = cast_base(merged.total, self.spec)
        merged.note(base, left)
        return base, merged.source

    def merged(self) -> Merged | None:
        """W + Σ scaling · B · A, and what from; None where the adapters add nothing.

        Raises:
            FalqonError: as `cast`.
        """
        whole = not (self.prepared and self.rounded_beside_terms())
        if self.module is self.linear and self.prepared and whole:
            return None
        weight, source = self.weight()
        merged = self._merged(weight)
        check_weight(self.path, merged, "merged weight")
        wide = weight.to(torch.float32)
        return None if whole and torch.equal(merged, wide) else Merged(wide, merged, source)

    def rounded_beside_terms(self) -> bool:
        """Whether the bytes stand for W together with the terms of a calibration alone."""
        return self.spec.base != "nvfp4" and "error_b" in getattr(self.linear, "terms", {})

    def trained(self) -> Base:
        """The bytes that were trained on."""
        if self.prepared:
            base: Base = self.linear.base()
            return base
        return cast_base(self.weight()[0], self.spec)

    def dense(self) -> Tensor:
        """The same in the dtype and layout of the base layer."""
        if self.state is not None:
            merged = merged_weight(self.state)
        else:
            merged = self._merged(self.weight()[0])
        merged = merged.to(self.dtype)
        return merged.t().contiguous() if self.transposed else merged

    def bias(self) -> Tensor | None:
        """The base layer's bias, plus scaling times that of lora_B for each adapter that has one.

        Raises:
            FalqonError: lora_B has a bias, the base layer has none.
        """
        bias: Tensor | None = self.linear.bias
        extra = self._lora_biases()
        if bias is None:
            if extra:
                raise FalqonError(
                    self.path,
                    "its lora_B has a bias and its base layer none, so there is no place for it",
                    "Train without lora_bias, or give the base layer a bias of zeros",
                )
            return None
        wide = bias.detach().to(torch.float32)
        return sum(extra, start=wide).to(bias.dtype)

    def _lora_biases(self) -> list[Tensor]:
        """scaling · bias of each lora_B that has one, float32."""
        lora_b = getattr(self.module, "lora_B", {})
        biases = {n: lora_b[n].bias for n in _waiting(self.module) if n in lora_b}
        scaling = getattr(self.module, "scaling", {})
        return [b.detach().float() * scaling[n] for n, b in biases.items() if b is not None]

    def weight(self) -> tuple[Tensor, Source]:
        """The base weight [out, in], or the nearest to it that is left."""
        if not self.prepared:
            weight = self.linear.weight.detach()
            return weight.t() if self.transposed else weight, "base weight"
        if self.original is not None:
            return self.original(self), "base weight"
        weight = self.linear.base().dequantize()
        if isinstance(self.linear, Fp8Linear):
            weight = self.linear.corrected(weight)
        return weight, FROM_CAST[self.spec.base]

    @torch.no_grad()
    def _merged(self, weight: Tensor) -> Tensor:
        """``weight`` with the active adapters added by PEFT's own merge, float32 [out, in]."""
        wide = weight.to(torch.float32, copy=True)
        if not _waiting(self.module):
            return wide
        plain = plain_layer(wide, None, self.transposed)
        # A copy of the adapters alone, around ``plain``: copying the base layer would take memory.
        module = copy.deepcopy(self.module, {id(self.linear): plain}).float()
        if hasattr(module, "lora_bias"):
            module.lora_bias = dict.fromkeys(module.lora_bias, False)  # see `bias`
        try:
            module.merge()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise FalqonError(
                self.path, f"PEFT can't merge its adapter ({error})", "Export without that adapter"
            ) from error
        merged: Tensor = plain.get_parameter("weight").detach()
        return merged.t() if self.transposed else merged


def _waiting(module: Any) -> list[str]:
    """The active adapters of PEFT's layer that are not merged into its base layer yet."""
    merged = getattr(module, "merged_adapters", ())
    return [name for name in getattr(module, "active_adapters", ()) if name not in merged]


def export_layer(
    path: str,
    module: Any,
    rows: dict[str, tuple[LoraLayer, MergedAdapter]],
    per_row: bool,
    original: Callable[[ExportLayer], Tensor] | None,
) -> ExportLayer | None:
    """The layer at ``path``, None where it has no FP8 form. Of several forms it takes one with a
    scale per row where ``per_row``, else one with a scale per tensor.

    Raises:
        FalqonError: an FP8 weight of update="rows" that is not that of the active adapter.
    """
    linear = module.get_base_layer() if is_adapted(module) else module
    if path in rows:
        layer, state = rows[path]
        problem = not_written(layer, state)
        if problem is None:
            return ExportLayer(path, module, linear, state.spec.site, state)
        if isinstance(linear, MergedBaseLinear) or state.spec.pending == "drop":
            raise FalqonError(path, problem, ACTIVATE)
        return ExportLayer(path, module, linear, state.spec.site)  # the base weight is at hand
    if isinstance(linear, MergedBaseLinear):
        raise FalqonError(
            path,
            "its FP8 weight holds an adapter that is not active",
            "Activate the adapter, or call falqon_fx.restore(model)",
        )
    if isinstance(linear, Fp8Linear) and not isinstance(linear, Fp8Stack):
        return ExportLayer(path, module, linear, parse_spec(linear.spec_text), original=original)
    made = bases.of(linear.weight) if is_linear(linear) else []
    if not made:
        return None
    fitting = [base for base in made if bool(base.scale.dim()) is per_row]
    return ExportLayer(path, module, linear, plan_of((fitting or made)[-1]))


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's around a base layer."""
    return hasattr(module, "get_base_layer") and hasattr(module, "merge")


def plan_of(base: Base) -> SiteSpec:
    """How a base was cast: scales of "amax" are all powers of two by chance alone."""
    spec = SiteSpec.from_config(FalqonConfig(granularity="row" if base.scale.dim() else "tensor"))
    kind: BaseDtype = "int8" if base.code.dtype == INT8 else "fp8"
    kind = "nvfp4" if nvfp4.is_packed(base.code) else kind
    return replace(spec, scale="pow2" if powers_of_two(base.scale) else "amax", base=kind)


class Originals:
    """The base weights in a model's folder, one at a time."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._folder, self._index = model, folder, read_index(folder)

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """The name of each weight in public checkpoints, by the path of its layer."""
        weights = {
            without_wrappers(path).removesuffix(".base_layer"): empty(
                *nvfp4.shape_of(m.code), dtype=m.dtype
            )
            for path, m in self._model.named_modules()
            if isinstance(m, Fp8Linear) and not isinstance(m, Fp8Stack)
        }
        named = files.renamed(self._model, {f"{path}.weight": t for path, t in weights.items()})
        names = {id(tensor): name for name, tensor in named.items()}
        return {path: names.get(id(t), f"{path}.weight") for path, t in weights.items()}

    def read(self, layer: ExportLayer) -> Tensor:
        """The base weight [out, in] that a prepared layer was made from.

        Raises:
            FalqonError: the folder has none, or another.
        """
        name, ours = self._names[layer.path], layer.linear.base()
        given = (layer.path, name, ours, layer.dtype, layer.spec, layer.transposed)
        beside = layer.rounded_beside_terms()
        return self.of_part(*given, layer.linear.corrected(ours.dequantize()) if beside else None)

    def of_part(
        self,
        path: str,
        name: str,
        ours: Base,
        dtype: torch.dtype,
        spec: SiteSpec,
        transposed: bool = False,
        near: Tensor | None = None,
    ) -> Tensor:
        """The tensor ``name`` [out, in], of which ``ours`` was made; see `read`. Where a
        calibration has rounded it, ``near`` is what ours and its terms stand for: at most twice
        as far from it as its cast to nearest.
        """
        remedy = "Name the folder of the model that was prepared, or leave out base="
        if name not in self._index:
            raise FalqonError(path, f"{self._folder} has no tensor {name!r}", remedy)
        weight = read_tensor(self._folder / self._index[name], name)
        if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:
            problem = f"{self._folder} has {described(weight)}, which was cast already"
            raise FalqonError(path, problem, "Name a dense checkpoint, or leave out base=")
        weight = weight.to(ours.code.device, dtype)
        weight = weight.t().contiguous() if transposed else weight
        if weight.shape == nvfp4.shape_of(ours.code):
            theirs = cast_base(weight, spec)
            if near is not None:
                wide = weight.to(torch.float32)
                if bool((near - wide).norm() <= 2 * (theirs.dequantize() - wide).norm()):
                    return weight
            elif torch.equal(theirs.code, ours.code) and torch.equal(theirs.scale, ours.scale):
                return weight
        problem = f"its FP8 weight was not made from the weight in {self._folder}"
        raise FalqonError(path, problem, remedy)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """What has a shape and a dtype alone."""
    return torch.empty(shape, dtype=dtype, device="meta")
