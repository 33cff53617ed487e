"""The files of a transformers checkpoint in FP8: shards, config, tokenizer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from falqon_fx.config import BaseDtype
from falqon_fx.errors import FalqonError
from falqon_fx.files import seals, storage, trees
from falqon_fx.files.checkpoint import versions
from falqon_fx.files.disk import everything_below
from falqon_fx.site.numerics import dtype_name

# Each by vLLM, into one layer.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
FORMATS: dict[BaseDtype, str] = {
    "fp8": "float-quantized",
    "int8": "int-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def renamed(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of the model's public checkpoints; transformers 5 loads some under others."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 loads by the modules' own names
        return tensors
    found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return found


def check_shard_size(size: int | str) -> None:
    """Raise a `FalqonError` where this is no size of a file."""
    hub = storage.require("huggingface_hub", "export")
    try:
        hub.split_torch_state_dict_into_shards({}, max_shard_size=size)
    except (ValueError, TypeError) as error:
        problem = f"{size!r} is no size of a file ({error})"
        raise FalqonError("max_shard_size", problem, "Give bytes, or text such as '5GB'") from error


def shards(tensors: dict[str, Tensor], max_shard_size: int | str) -> Any:
    """Which file holds which tensor; of tied ones ``tensors`` keeps the first."""
    hub = storage.require("huggingface_hub", "export")
    _, same = trees.unshared((n, t) for n, t in tensors.items() if t.device.type == "cpu")
    for name in same:  # tied weights are written once
        del tensors[name]
    return hub.split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)


def write_shards(
    folder: Path,
    plan: Any,
    tensors: Mapping[str, Tensor],
    made: Callable[[Tensor], Tensor],
    show: bool,
) -> None:
    """Write the files of a ``plan`` one by one, and their index; ``made`` fills a tensor."""
    columns = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        task = bar.add_task("", total=sum(t.nbytes for t in tensors.values()))
        for file, names in plan.filename_to_tensors.items():
            shard, _ = trees.unshared((name, made(tensors[name])) for name in names)
            storage.save_tensors(folder / file, shard)
            bar.advance(task, sum(t.nbytes for t in shard.values()))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_config(
    folder: Path, model: Any, tied: Callable[[str], bool], quantization: dict[str, Any]
) -> None:
    """The model's config, with ``quantization`` in it, and its generation config. ``tied`` says of
    the output head, by the name of its weight, whether that is still the embedding's.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype_name(model.dtype)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(config, "tie_word_embeddings", False):
        path = next(name for name, module in model.named_modules() if module is head)
        config.tie_word_embeddings = tied(f"{path}.weight")
    config.quantization_config = quantization
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(folder)


def compressed_tensors_config(ignore: list[str], kind: BaseDtype) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors' format for a base. FP8 and INT8: one scale
    per row for weights, one per token for activations. NVFP4: two levels of scales for weights, and
    activations as they are.
    """
    number = {"num_bits": 8, "type": "int" if kind == "int8" else "float", "symmetric": True}
    weights: dict[str, Any] = {**number, "strategy": "channel", "dynamic": False}
    if kind == "nvfp4":
        scales = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        weights |= {"num_bits": 4, "strategy": "tensor_group", **scales}
    of_tokens = {**number, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None if kind == "nvfp4" else of_tokens,
                "output_activations": None,
                "format": FORMATS[kind],
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


def fp8_config(ignore: list[str], block_size: int) -> dict[str, Any]:
    """The ``quantization_config`` of the fp8 form: one scale per block of weights."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block_size, block_size],
        "modules_to_not_convert": ignore,
    }


def write_tokenizer(folder: Path, model: Any, tokenizer: Any) -> tuple[str, ...]:
    """Write it, or copy it from where the model came from; what there is to say if neither."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return ()
    source = str(tokenizer or getattr(model.config, "_name_or_path", "") or "")
    found = seals.tokenizer_files(Path(source)) if source not in ("", ".") else []
    seals.copy_files(found, folder)
    return () if found else ("no tokenizer was written: give tokenizer=",)


def write_seal(folder: Path) -> None:
    """The manifest of a folder whose other files are written: the checksum of each."""
    paths = [path for path in everything_below(folder) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in paths]
    content = {"format": seals.EXPORT, "versions": versions(), "files": seals.seal(folder, names)}
    storage.write_manifest(folder / seals.MANIFEST, content)


def mixed(cast: Collection[str], dense: Collection[str], kind: BaseDtype) -> tuple[str, ...]:
    """What vLLM refuses: layers that it fuses, of which only some are cast."""
    for path in cast:
        parent, _, name = path.rpartition(".")
        for group in (group for group in FUSED if name in group):
            left = [other for other in group if f"{parent}.{other}" in dense]
            if left:
                return (
                    f"{parent} has {name} in {kind.upper()} and {', '.join(left)} dense: vLLM, "
                    f"which fuses them, refuses that. Remedy: frozen='fp8', or an adapter on all "
                    f"of {', '.join(group)}",
                )
    return ()
