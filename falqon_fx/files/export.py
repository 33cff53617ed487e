"""`save_fp8`: a checkpoint folder for serving engines, in FP8 with the adapters merged."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.config import BaseDtype
from falqon_fx.errors import FalqonError
from falqon_fx.files import atomic, ranks
from falqon_fx.files import export_files as files
from falqon_fx.files.expert_parts import routers
from falqon_fx.files.export_forms import (
    Form,
    Stored,
    block_size,
    check_form,
    packed,
    shared_divisors,
    stored,
    warn_of_a_second_cast,
    warn_of_calibration,
)
from falqon_fx.files.export_layers import (
    ExportLayer,
    Originals,
    empty,
    export_layer,
    is_adapted,
)
from falqon_fx.files.export_report import ExportReport, FlushReport, Source
from falqon_fx.files.export_stacks import ExportStack, Stacks
from falqon_fx.model.fp8_linear import IN_ONE_PROCESS, refuse_parts
from falqon_fx.model.lora_layers import check_adapters, unwrap
from falqon_fx.model.stacks import is_experts, with_dense_stacks
from falqon_fx.passes.match.frozen import why_left
from falqon_fx.rows.state import MergedAdapter
from falqon_fx.rows.unload import check_pending, fp8_layers
from falqon_fx.site.base import Base
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.sharded import is_sharded, whole, whole_copy

_DENSE = "written dense, with its adapters"
_ROUTES = "it routes, in the dtype that it has"


def save_fp8(
    model: nn.Module,
    directory: str | Path,
    *,
    form: Form = "compressed-tensors",
    base: str | Path | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> ExportReport:
    """Write a transformers checkpoint in FP8, INT8 or NVFP4, as its base was trained on, with the
    active adapters merged.

    What ran in FP8 is written in FP8, with an adapter or without: q(W + Σ scaling · B · A), cast
    once to nearest with the scales' granularity and form of training; with another ``base_dtype``
    in that. W is the original base weight where the model or ``base`` has it, else dq(W), which
    rounds a second time; the report says which. Where the adapters add nothing, the bytes are those
    that were trained on. With update="rows" they always are: pending rows are written first, and
    nothing is cast anew.

    Every process of a sharded model calls this. The first one writes, and alone keeps what is
    gathered, a layer at a time, until its file is written.

    The folder appears under its name once it is whole and on the disk. Its ``falqon.json`` holds
    the checksum of every other file, which `load` compares.

    Args:
        model: a transformers model with PEFT's LoRA, prepared or run under the backend, or its
            compiled wrapper.
        directory: a new folder.
        form: "compressed-tensors" is its ``float-quantized`` format: ``weight`` float8_e4m3fn
            [out, in], ``weight_scale`` float32 [out, 1] (one tensor scale is repeated, since
            engines quantize fused layers anew when their tensor scales differ), activations cast
            per token as they come. Of an INT8 base it is ``int-quantized``, the same in int8; of an
            NVFP4 base ``nvfp4-pack-quantized`` with activations as they are: ``weight_packed``
            uint8 [out, in / 2], ``weight_scale`` float8_e4m3fn [out, in / 16] and
            ``weight_global_scale`` float32 [1], one for all layers that engines fuse. "fp8" has one
            scale per block, ``weight_scale_inv``, for which the model must have been trained with
            granularity="tensor".
        base: the folder with the safetensors that the model was prepared from.
        tokenizer: what has ``save_pretrained``, or a folder with the files. Without it, they
            are copied from the folder that the model was loaded from, where there is one.
        max_shard_size: of a safetensors file, such as "5GB"; as much memory is needed.
        progress: show a bar while writing.

    Raises:
        FalqonError: no FP8 layer, layers of several kinds, a form that can't hold them, an adapter
            that can't be merged or holds NaN or Inf, pending rows too large for the FP8 weight, a
            ``base`` that is not the model's, a folder that exists, or a full disk. Nothing is left
            under the name then.
    """
    directory = Path(directory)
    files.check_shard_size(max_shard_size)
    inner = _transformers_model(unwrap(model))
    refuse_parts(inner, "save_fp8")
    sharded = is_sharded(inner)
    with ranks.together(sharded):
        atomic.refuse_existing(directory)
    check_adapters(inner)
    found = _Export(inner, form, None if base is None else Path(base))
    states = {layer.path: layer.state for layer in found.all_layers if layer.state is not None}
    for path, state in states.items():
        check_pending(path, state)
    flushed = _flush(states.values())

    tensors = files.renamed(inner, found.tensors())
    tensors |= found.of_stacks()
    found.check_made(tensors)
    plan = files.shards(tensors, max_shard_size)
    quantization = found.quantization()

    def write(parts: Iterator[Callable[[], Tensor]]) -> ExportReport:
        with atomic.new_folder(directory) as folder:
            files.write_shards(folder, plan, tensors, lambda _: next(parts)(), progress)
            files.write_config(folder, inner, lambda name: name not in tensors, quantization)
            notes = files.write_tokenizer(folder, inner, tokenizer)
            files.write_seal(folder)
            written = tuple(sorted(path.name for path in folder.iterdir()))
            size = sum(path.stat().st_size for path in folder.iterdir())
        notes = (*notes, *files.mixed(found.layers, found.dense, found.kind))
        cast_from = found.cast_from | found.stacks.cast_from
        given = directory, form, cast_from, found.dense, flushed, written, size, notes
        warn_of_a_second_cast(found.stacks.left, found.kind)
        return ExportReport(*given, found.kind, found.stacks.left.share)

    warn_of_calibration(found.layers.values())
    names = [name for of_file in plan.filename_to_tensors.values() for name in of_file]
    steps = [functools.partial(found.gathered, tensors[name]) for name in names]
    return ranks.lead(sharded, steps, write)


# -- what is exported ------------------------------------------------------------------------------


def _transformers_model(model: nn.Module) -> Any:
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if not (hasattr(base, "config") and hasattr(base.config, "save_pretrained")):
        raise FalqonError(
            type(base).__name__,
            "it has no transformers config, which engines need",
            "Export a transformers model, or keep the training with falqon_fx.save_checkpoint",
        )
    return base


class _Export:
    """Walks a model and gives its tensors under the names they have without PEFT.

    Those of FP8 layers and sharded ones are on the meta device; `gathered` makes them as they are
    written.
    """

    def __init__(self, model: Any, form: Form, folder: Path | None) -> None:
        if form not in ("compressed-tensors", "fp8"):
            raise FalqonError("form", f"{form!r} is unknown", "Give 'compressed-tensors' or 'fp8'")
        self.model, self.form, self._routers = model, form, routers(model)
        self._rows = fp8_layers(model)
        originals = None if folder is None else Originals(model, folder)
        self._original = None if originals is None else originals.read
        self.stacks = Stacks(model, originals)
        self.all_layers: list[ExportLayer] = []
        self.dense: dict[str, str] = {}  # linear layers that stay dense, and why
        self.cast_from: dict[str, Source] = {}
        self._parts = list(self._walk(model, ""))
        self.layers = {found.path: found for found in self.all_layers if not found.transposed}
        self.kind = self._check()
        self._waiting: dict[int, tuple[Tensor, Any, Callable[[Any], Tensor]]] = {}
        self._divisors = shared_divisors(self.layers) if self.kind == "nvfp4" else {}
        self._last: tuple[str, Base] | None = None
        self._last_whole: ExportLayer | ExportStack | None = None

    def _check(self) -> BaseDtype:
        if not self.layers and not self.stacks.found:
            self.stacks.refuse_dense()
            raise FalqonError(
                "",
                "no layer of the model has an FP8 weight that engines can hold",
                "Call falqon_fx.prepare(model), or run it under torch.compile(backend='falqon'); "
                "weights stored [in, out] (GPT-2's Conv1D) have no FP8 form",
            )
        return check_form(self.layers.values(), self.stacks.found, self.form)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to write by name; what `gathered` makes has shape and dtype alone."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for part in self._parts:
            if not isinstance(part, ExportLayer):
                name, tensor = part
                if id(tensor) not in seen:  # sharded and tied
                    found[name] = self._stand_in(tensor)
                if is_dtensor(tensor):
                    seen.add(id(tensor))
                continue
            for last, tensor, make in self._of_layer(part):
                found[f"{part.path}.{last}"] = tensor
                self._waiting[id(tensor)] = tensor, part, make
            if (bias := part.bias()) is not None:
                found[f"{part.path}.bias"] = self._stand_in(bias)
        return found

    def of_stacks(self) -> dict[str, Tensor]:
        """The same of stacked experts, under the names of public checkpoints."""
        found: dict[str, Tensor] = {}
        for name, shape, is_weight, stack, make in self.stacks.tensors():
            found[name] = empty(*shape, dtype=E4M3 if is_weight else torch.float32)
            self._waiting[id(found[name])] = found[name], stack, make
        return found

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """What stands for a sharded tensor; another itself."""
        if not is_dtensor(tensor):
            return tensor.detach()
        stand_in = empty(*tensor.shape, dtype=tensor.dtype)
        self._waiting[id(stand_in)] = stand_in, tensor, lambda gathered: gathered
        return stand_in

    def check_made(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise where transformers made a tensor of others, of which there are only stand-ins."""
        for name, tensor in tensors.items():
            if tensor.is_meta and id(tensor) not in self._waiting:
                problem = "it is sharded, and in public checkpoints it is made of several or cut up"
                raise FalqonError(name, problem, IN_ONE_PROCESS)

    def gathered(self, tensor: Tensor) -> Callable[[], Tensor]:
        """What makes a tensor of `tensors`, whose parts are gathered now."""
        _, owner, make = self._waiting.get(id(tensor), (tensor, tensor, lambda itself: itself))
        if self._last_whole is not None and self._last_whole.path != getattr(owner, "path", None):
            self._last_whole = None  # one at a time
        if isinstance(owner, Tensor):
            return functools.partial(make, whole(owner))
        self._last_whole = self._last_whole or owner.whole()
        return functools.partial(make, self._last_whole)

    def _of_layer(
        self, layer: ExportLayer
    ) -> Iterator[tuple[str, Tensor, Callable[[ExportLayer], Tensor]]]:
        """The weight of a layer, and its scale: what stands for them, and what makes them."""
        out, features = layer.shape
        if layer.transposed:
            yield "weight", empty(features, out, dtype=layer.dtype), ExportLayer.dense
            return
        for each in stored(self.kind, layer.shape, self._block_size):

            def make(layer: ExportLayer, each: Stored = each) -> Tensor:
                return each.of(self._cast(layer))

            yield each.name, empty(*each.shape, dtype=each.dtype), make

    def _cast(self, layer: ExportLayer) -> Base:
        if self._last is None or self._last[0] != layer.path:  # its tensors come in turn
            four_bits, shared = self.kind == "nvfp4", self._divisors.get(layer.path)
            left = self.stacks.left
            base, source = packed(layer, shared, left) if four_bits else layer.cast(left)
            self._last, self.cast_from[layer.path] = (layer.path, base), source
        return self._last[1]

    def _walk(self, module: Any, path: str) -> Iterator[ExportLayer | tuple[str, Tensor]]:
        per_row = self.form == "compressed-tensors"
        layer = export_layer(path, module, self._rows, per_row, self._original)
        if layer is not None:
            self.all_layers.append(layer)
            if layer.transposed:
                self.dense[path] = "Conv1D has no FP8 form, so its weight was written dense"
            yield layer
            return
        reason, in_fp8 = None, self.stacks.take(path, module) if per_row else set()
        if in_fp8:
            module = module.get_base_layer() if is_adapted(module) else module
            for name, tensor in module._parameters.items():
                if name not in in_fp8 and tensor is not None:
                    yield f"{path}.{name}", tensor
            return
        if hasattr(module, "unload_and_optionally_merge_module"):  # PEFT's modules_to_save
            module = with_dense_stacks(whole_copy(module)).unload_and_optionally_merge_module(
                merge=True, safe_merge=True, adapter_names=None
            )
        elif is_adapted(module):
            reason = "it has no FP8 weight, so its adapter was merged into the dense one"
            module = whole_copy(module)
            module.merge(safe_merge=True)
            module = module.get_base_layer()
        if is_experts(module):
            self.dense[path] = f"{self.stacks.leave(path, module)}: {_DENSE}"
            module = with_dense_stacks(module)
        if path in self._routers:
            self.dense[path] = reason or _ROUTES
        if isinstance(module, nn.Linear):
            left = why_left(path, module.out_features, module.in_features, tied=False)
            self.dense[path] = reason or left or "it has no FP8 weight"
        prefix = f"{path}." if path else ""
        for name, tensor in module.state_dict(keep_vars=True).items():
            if "." not in name:
                yield prefix + name, tensor
        for name, child in module.named_children():
            yield from self._walk(child, without_wrappers(prefix + name))

    def quantization(self) -> dict[str, Any]:
        """The config's ``quantization_config``."""
        # Engines name the experts of a stack one by one.
        ignore = [*self.dense, *(f"re:{re.escape(path)}\\..*" for path in self.stacks.dense)]
        left = (*self._routers, *self.dense)
        weights = {f"{path}.weight": empty(1, dtype=torch.float32) for path in left}
        public = (name.removesuffix(".weight") for name in files.renamed(self.model, weights))
        ignore += [path for path in public if path not in ignore]
        if self._block_size is not None:
            return files.fp8_config(ignore, self._block_size)
        return files.compressed_tensors_config(ignore, self.kind)

    @property
    def _block_size(self) -> int | None:
        """The rows and columns of a block of the fp8 form; None of another."""
        return block_size(self.layers.values()) if self.form == "fp8" else None


def _flush(states: Iterable[MergedAdapter]) -> FlushReport:
    layers = rows = 0
    changed = total = left = 0.0
    for state in states:
        out, _ = state.applied.shape
        if not state.pending().any():
            continue
        writes, merged = state.writes.clone(), state.dequantize()[:out]
        state.flush()
        layers, rows = layers + 1, rows + int((state.writes != writes).sum())
        total += float(merged.double().square().sum())
        changed += float((state.dequantize()[:out] - merged).double().square().sum())
        left = max(left, float((state.pending() * state.scaling).abs().max()))
    return FlushReport(layers, rows, (changed / total) ** 0.5 if total else 0.0, left)
