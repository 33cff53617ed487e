"""`load`: a trainable model from FP8 files, made without dense weights, the bytes mapped in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.files import seals, storage
from falqon_fx.files.fp8_import import load_fp8
from falqon_fx.files.hf import adapter_config, empty_model, fill
from falqon_fx.files.stack_files import Checkpoint
from falqon_fx.files.storage import DamagedFileError

FORMAT = "falqon_fx.prequantized.3"  # what `falqon_fx.prequantize` writes
MANIFEST = seals.MANIFEST


def load(
    directory: str | Path,
    lora: Any = None,
    config: FalqonConfig | None = None,
    *,
    verify: bool = True,
) -> nn.Module:
    """A prepared PEFT model from a folder of `prequantize`, or from an FP8 or INT8 checkpoint.

    The model is built without weights and the FP8 bytes are mapped in: dense copies of them never
    exist. Of a checkpoint of others (compressed-tensors ``float-quantized`` or ``int-quantized``,
    or the fp8 form) the bytes are base weights as they are, beside a new A and B = 0; with one
    scale per block they are cast again to one per row (`falqon_fx.files.blocks`).

    Args:
        directory: the folder.
        lora: for FP8 checkpoints: a PEFT ``LoraConfig``; by default rank 16 on all linear layers.
        config: for FP8 checkpoints: as for `prepare`; scales that aren't all powers of two make it
            scale="amax", and INT8 weights base_dtype="int8", which torch.compile must then get too.
            What ``exclude`` names is decoded.
        verify: compare the checksums of a folder that `prequantize` or `save_fp8` wrote, and look
            for FP8 weights of `prequantize` that are no numbers (reads every byte twice). Without
            it NaN in them is not seen; FP8 weights of others are always looked at.

    Raises:
        DamagedFileError: a file that is truncated or was changed.
        FalqonError: neither kind of folder, or a form that can't be taken as it is.
    """
    with storage.read_errors_explained(Path(directory)):
        return _load(Path(directory), lora, config, verify)


def _load(directory: Path, lora: Any, config: FalqonConfig | None, verify: bool) -> nn.Module:
    if seals.is_export(directory):
        if verify:
            seals.check_export(directory)
        return load_fp8(directory, lora, config)
    if not (directory / MANIFEST).is_file():
        return load_fp8(directory, lora, config)
    manifest = storage.read_manifest(
        directory / MANIFEST,
        FORMAT,
        "prequantized",
        "Call falqon_fx.prequantize on the model again",
    )
    if verify:
        seals.check(directory, manifest["others"], manifest["files"])
    count = sum(len(entry["tensors"]) for entry in manifest["files"].values())
    model = empty_model(directory, adapter_config(directory), count)
    by_file = {site["file"]: site for site in manifest["sites"]}
    tensors: dict[str, Tensor] = {}
    new_a: dict[str, Tensor] = {}
    layers = {}
    for file, expected in manifest["files"].items():
        found = storage.open_tensors(directory / file, expected, verify=verify)
        site = by_file.get(file)
        if site is None:
            tensors |= found
            continue
        path = site["prepared"]
        if "lora_A" in found:
            name = f"{path.removesuffix('.base_layer')}.lora_A.default.weight"
            new_a[name] = found.pop("lora_A")
        layers[path] = (site, found)
    if len(layers) != len(by_file) or len(by_file) != len(manifest["sites"]):
        raise DamagedFileError(directory / MANIFEST, "its sites and files don't belong together")
    placed = Checkpoint(model, tensors).placed(tensors) | new_a
    return fill(model, layers, placed, str(directory), verify=verify)
