"""`save_fp8`: a checkpoint folder for serving engines, holding the very bytes trained on."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor, nn

from falqon_fx import storage, trees
from falqon_fx.errors import FalqonError
from falqon_fx.merged import MergedAdapter
from falqon_fx.numerics import E4M3
from falqon_fx.prepare import unwrap
from falqon_fx.unload import fp8_layers, merged_bias, merged_layer

Form = Literal["compressed-tensors", "fp8"]
_BLOCK = 128  # the block size that engines have kernels for
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM, into one layer
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "chat_template*", "*.model", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class FlushReport:
    """What writing the pending rows changed.

    ``relative_change`` is ‖dq(W) after - dq(W) before‖ / ‖dq(W) before‖ over the layers that had
    pending rows (Frobenius); ``left`` the largest |scaling · (B - applied)| that could not be
    written, because ``applied`` rounds B to 16 bits or a row holds NaN.
    """

    layers: int
    rows: int
    relative_change: float
    left: float

    def __str__(self) -> str:
        if not self.rows:
            return "no row was pending"
        return (
            f"{self.rows} pending rows in {self.layers} layers were written first, which changed "
            f"their FP8 weights by {self.relative_change:.2%}"
        )


@dataclass(frozen=True)
class ExportReport:
    """What `save_fp8` wrote: FP8 layers, layers left dense and why, files and bytes."""

    directory: Path
    form: str
    layers: tuple[str, ...]
    dense: dict[str, str]
    flushed: FlushReport
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [
            f"{self.directory}: {len(self.layers)} layers in FP8 ({self.form}), "
            f"{self.bytes / 2**20:.1f} MiB in {len(self.files)} files",
            str(self.flushed),
        ]
        lines += [f"dense: {path}: {reason}" for path, reason in self.dense.items()]
        return "\n".join([*lines, *self.notes])


def save_fp8(
    model: nn.Module,
    directory: str | Path,
    *,
    form: Form = "compressed-tensors",
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> ExportReport:
    """Write a transformers checkpoint whose adapted linear layers are the FP8 weights of training.

    Pending rows are flushed first. Nothing is quantized anew: ``weight`` is ``state.weight[:out]``,
    byte for byte. The folder appears under its name once it is whole and on the disk.

    Args:
        model: a transformers model with PEFT's LoRA, prepared or trained under the backend, or its
            compiled wrapper.
        directory: a new folder.
        form: "compressed-tensors" is its ``float-quantized`` format: ``weight`` float8_e4m3fn
            [out, in], ``weight_scale`` float32 [out, 1] (one tensor scale is repeated, since
            engines quantize fused layers anew when their tensor scales differ), activations cast
            per token as they come. "fp8" has a scale a block, ``weight_scale_inv``, for which the
            model must have been trained with granularity="tensor".
        tokenizer: what has ``save_pretrained``. Without it, the tokenizer's files are copied from
            the folder that the model was loaded from, where there is one.
        max_shard_size: of a safetensors file, such as "5GB".
        progress: show a bar while writing.

    Raises:
        FalqonError: no FP8 layer, a form that can't hold the scales, a folder that exists, or a
            full disk. Nothing is left under the name then.
    """
    directory = Path(directory)
    storage.refuse_existing(directory)
    base = _transformers_model(unwrap(model))
    found = _Export(base)
    _check_form(form, found)
    flushed = _flush(found.all_states.values())

    tensors = _renamed(base, found.tensors(form))
    plan = _shards(tensors, max_shard_size)
    with storage.new_folder(directory) as folder:
        _write_shards(folder, plan, tensors, progress)
        _write_config(folder, base, found, form, tensors)
        notes = (*_write_tokenizer(folder, base, tokenizer), *_mixed(found.states, found.dense))
        files = tuple(sorted(path.name for path in folder.iterdir()))
        size = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(
        directory, form, tuple(found.states), found.dense, flushed, files, size, notes
    )


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


def _fp8_layers(base: nn.Module) -> dict[str, tuple[Any, MergedAdapter]]:
    found = fp8_layers(base)
    if not any(not layer.transposed for layer, _ in found.values()):
        raise FalqonError(
            "",
            "no layer of the model has an FP8 weight that engines can hold",
            "Call falqon_fx.prepare(model), or train it under torch.compile(backend='falqon'); "
            "weights stored [in, out] (GPT-2's Conv1D) have no FP8 form",
        )
    return found


class _Export:
    """Walks a model and gives its tensors under the names they have without PEFT."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        layers = _fp8_layers(base)
        self.states = {p: state for p, (layer, state) in layers.items() if not layer.transposed}
        self.layers = {path: layer for path, (layer, _) in layers.items()}
        self.all_states = {path: state for path, (_, state) in layers.items()}
        self.dense: dict[str, str] = {}  # linear layers that stay dense, and why

    def tensors(self, form: Form) -> dict[str, Tensor]:
        return dict(self._walk(self.base, "", form))

    def _walk(self, module: Any, path: str, form: Form) -> Iterator[tuple[str, Tensor]]:
        if path in self.states:
            yield from self._fp8(path, form)
            return
        reason = "it has no adapter"
        if path in self.layers:
            reason = "Conv1D has no FP8 form, so the merged weight was written dense"
            layer, state = self.layers[path], self.all_states[path]
            module = merged_layer(layer, state)
            self.dense[path] = reason
        elif hasattr(module, "unload_and_optionally_merge_module"):  # PEFT's modules_to_save
            module = copy.deepcopy(module).unload_and_optionally_merge_module(
                merge=True, safe_merge=True, adapter_names=None
            )
        elif hasattr(module, "get_base_layer") and hasattr(module, "merge"):
            reason = "it has no FP8 weight, so its adapter was merged into the dense one"
            module = copy.deepcopy(module)
            module.merge(safe_merge=True)
            module = module.get_base_layer()
        if isinstance(module, nn.Linear):
            self.dense[path] = reason
        prefix = f"{path}." if path else ""
        for name, tensor in module.state_dict().items():
            if "." not in name:
                yield prefix + name, tensor
        for name, child in module.named_children():
            yield from self._walk(child, prefix + name, form)

    def _fp8(self, path: str, form: Form) -> Iterator[tuple[str, Tensor]]:
        state = self.states[path]
        out, _ = state.applied.shape
        yield f"{path}.weight", state.code[:out].view(E4M3)
        scale = state.scale if state.scale.dim() == 0 else state.scale[:out]
        if form == "compressed-tensors":
            yield f"{path}.weight_scale", scale.expand(out, 1).contiguous()
        else:
            size = self.block_size
            grid = (-(-out // size), -(-state.code.shape[1] // size))
            yield f"{path}.weight_scale_inv", scale.expand(grid).contiguous()
        bias = merged_bias(self.layers[path])
        if bias is not None:
            yield f"{path}.bias", bias

    @property
    def block_size(self) -> int:
        """The largest power of two up to 128 that divides every side of every FP8 weight."""
        size = _BLOCK
        for state in self.states.values():
            while state.applied.shape[0] % size or state.code.shape[1] % size:
                size //= 2
        return size


def _mixed(fp8: Collection[str], dense: Collection[str]) -> tuple[str, ...]:
    """What vLLM refuses: layers that it fuses, of which only some are FP8."""
    for path in fp8:
        parent, _, name = path.rpartition(".")
        for group in (group for group in _FUSED if name in group):
            left = [other for other in group if f"{parent}.{other}" in dense]
            if left:
                return (
                    f"{parent} has {name} in FP8 and {', '.join(left)} dense: vLLM, which fuses "
                    f"them, refuses that. Remedy: an adapter on all of {', '.join(group)}",
                )
    return ()


def _check_form(form: Form, found: _Export) -> None:
    if form not in ("compressed-tensors", "fp8"):
        raise FalqonError("form", f"{form!r} is unknown", "Give 'compressed-tensors' or 'fp8'")
    if form == "fp8":
        for path, state in found.states.items():
            if state.plan.per_row:
                raise FalqonError(
                    path,
                    "it has a scale a row, which the fp8 form can't hold without quantizing anew",
                    "Export in the compressed-tensors form, or train with granularity='tensor'",
                )


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


def _renamed(base: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the model's public checkpoints; transformers 5 loads some under others."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 loads by the modules' own names
        return tensors
    renamed: dict[str, Tensor] = revert_weight_conversion(base, tensors)
    return renamed


# -- writing ---------------------------------------------------------------------------------------


def _shards(tensors: dict[str, Tensor], max_shard_size: int | str) -> Any:
    hub = storage.require("huggingface_hub", "export")
    _, same = trees.unshared((n, t) for n, t in tensors.items() if t.device.type == "cpu")
    for name in same:  # tied weights are written once
        del tensors[name]
    return hub.split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)


def _write_shards(folder: Path, plan: Any, tensors: Mapping[str, Tensor], show: bool) -> None:
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        task = bar.add_task("", total=sum(t.nbytes for t in tensors.values()))
        for file, names in plan.filename_to_tensors.items():
            shard, _ = trees.unshared((name, tensors[name]) for name in names)
            storage.save_tensors(folder / file, shard)
            bar.advance(task, sum(t.nbytes for t in shard.values()))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _write_config(
    folder: Path, base: Any, found: _Export, form: Form, tensors: Mapping[str, Tensor]
) -> None:
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]
    config.dtype = str(base.dtype).removeprefix("torch.")
    ignore = list(found.dense)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is not None and getattr(config, "tie_word_embeddings", False):
        path = next(name for name, module in base.named_modules() if module is head)
        config.tie_word_embeddings = f"{path}.weight" not in tensors
    describe: dict[str, Callable[[], dict[str, Any]]] = {
        "compressed-tensors": lambda: compressed_tensors_config(ignore),
        "fp8": lambda: fp8_config(ignore, found.block_size),
    }
    config.quantization_config = describe[form]()
    config.save_pretrained(folder)
    if getattr(base, "generation_config", None) is not None and base.can_generate():
        base.generation_config.save_pretrained(folder)


def compressed_tensors_config(ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors' float-quantized format: a scale a row for
    weights, a scale a token for activations.
    """
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**number, "strategy": "channel", "dynamic": False},
                "input_activations": {**number, "strategy": "token", "dynamic": True},
                "output_activations": None,
                "format": "float-quantized",
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def fp8_config(ignore: list[str], block_size: int) -> dict[str, Any]:
    """The ``quantization_config`` of the fp8 form: a scale a block of weights."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block_size, block_size],
        "modules_to_not_convert": ignore,
    }


def _write_tokenizer(folder: Path, base: Any, tokenizer: Any) -> tuple[str, ...]:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return ()
    source = Path(str(getattr(base.config, "_name_or_path", "") or ""))
    if str(source) not in ("", ".") and source.is_dir():
        copied = [f for pattern in _TOKENIZER_FILES for f in source.glob(pattern) if f.is_file()]
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        if copied:
            return ()
    return ("no tokenizer was written: give tokenizer=",)
