"""`save_checkpoint` and `load_checkpoint`: training goes on as if it had not been interrupted.

A checkpoint is a folder: ``checkpoint.json`` names the file that belongs to it, with checksums, and
is renamed into place last. So a save that is killed leaves the checkpoint before it whole.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files import atomic, disk, model_state, ranks, storage, training, trees
from falqon_fx.model.fp8_linear import refuse_parts
from falqon_fx.model.lora_layers import unwrap
from falqon_fx.site.agreement import of_each
from falqon_fx.site.sharded import gathered, is_sharded

FORMAT = "falqon_fx.checkpoint.3"
MANIFEST = "checkpoint.json"
_OTHER_FORMAT = (
    "Load it with the falqon-fx that wrote it, keep the adapter with model.save_pretrained(...), "
    "and go on from that"
)
_TENSORS = re.compile(r"tensors-[0-9a-f]{12}(-\d+)?\.safetensors")
_GATHERED = 2 << 30  # bytes of a sharded model that are gathered for a file
Unshared = tuple[dict[str, Tensor], dict[str, str]]  # what `trees.unshared` gives
_TRAINING = ".training"  # what isn't the model's; no module's path begins with a dot


@dataclass(frozen=True)
class CheckpointReport:
    """What was written: files, tensors and bytes."""

    directory: Path
    files: tuple[str, ...]
    tensors: int
    bytes: int
    sites: int

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.sites} sites, {self.tensors} tensors, "
            f"{self.bytes / 2**20:.1f} MiB"
        )


# -- saving ----------------------------------------------------------------------------------------


def save_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Mapping[str, Any] | None = None,
    rng: bool = True,
) -> CheckpointReport:
    """Write all that the next steps depend on: A, B and every other parameter and buffer, with
    what `prepare` made of the base weights; the optimizer, the scheduler, and the random generators
    of torch and Python. With update="rows" the FP8 weights, which were trained, are in it too.

    Base weights that `prepare` has not freed, and that compiled code keeps in FP8, are not in it:
    the model to load into brings them, and is compared. Nor are gradients: a save between backward
    and the optimizer's step loses them.
    Processes that save into one folder, or load from it, take turns.

    Every process of a sharded model (FSDP2, tensor parallelism) has to call this. The first one
    writes, and holds at most 2 GiB of what is gathered, tensor by tensor; the files are those of
    one process, and any number of processes load them.

    Args:
        model: the module or its compiled wrapper.
        directory: a new folder, or one with an earlier checkpoint, which this one replaces at the
            moment that it is whole and on the disk.
        optimizer: its state, of plain data and tensors.
        scheduler: likewise, of a learning rate schedule: any of torch's. Functions that it was made
            with, such as LambdaLR's, are not saved; it has to be made with them again.
        extra: tensors, numbers, text, lists and dicts that `load_checkpoint` gives back.
        rng: also the state of the random generators.

    Raises:
        FalqonError: something that can't be saved, a full disk, or a folder that can't be written
            to. An earlier checkpoint stays.
    """
    directory, model = Path(directory), unwrap(model)
    refuse_parts(model, "save_checkpoint")
    sharded = is_sharded(model)
    sites, named = model_state.snapshot(model)
    of_training: dict[str, Tensor] = {}
    objects = {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None
        if scheduler is None
        else training.without_functions(scheduler.state_dict()),
        "rng": _rng_state(sharded) if rng else None,
        "extra": dict(extra or {}),
    }
    tree = trees.to_plain(objects, _TRAINING, of_training)
    items = [*named, *of_training.items()]

    def work(parts: Iterator[Unshared]) -> CheckpointReport:
        with atomic.made_folder(directory), disk.lock(directory):
            described = _write(directory, parts, sites, tree)
        size = sum(file["bytes"] for file in described.values())
        count = sum(len(file["tensors"]) for file in described.values())
        return CheckpointReport(directory, tuple(described), count, size, len(sites))

    if not sharded:
        return work(iter([trees.unshared(items)]))
    return ranks.lead(sharded, [functools.partial(_gather, part) for part in _parts(items)], work)


def _parts(items: Iterable[tuple[str, Tensor]]) -> list[list[tuple[str, Tensor]]]:
    """Tensors in groups of bounded bytes, as long as none alone has more."""
    parts: list[list[tuple[str, Tensor]]] = []
    room = 0
    for name, tensor in items:
        room -= tensor.nbytes
        if room < 0 or not parts:
            parts.append([])
            room = _GATHERED - tensor.nbytes
        parts[-1].append((name, tensor))
    return parts


def _gather(part: Iterable[tuple[str, Tensor]]) -> Unshared:
    """Whole tensors in the memory of the first process."""
    kept: dict[str, Tensor] = {}
    for name, tensor in part:
        kept[name] = gathered(tensor)
        if dist.get_rank() != 0:
            kept.clear()  # it gave its part
    return trees.unshared(kept.items())


def _write(
    directory: Path,
    parts: Iterable[Unshared],
    sites: list[dict[str, Any]],
    tree: Any,
) -> dict[str, Any]:
    """Write each part into a file, then the manifest that names them, which it returns described.

    Of the folder's other files those are removed that the earlier manifest names, or that a save
    which was killed has left.
    """
    named, replaced = _named(directory)
    for number in atomic.leftovers(directory):
        for left in directory.glob(f"tensors-{number}*.safetensors"):
            if left.name not in named:
                atomic.remove(left)
    with atomic.aside(directory) as folder:
        described: dict[str, Any] = {}
        same: dict[str, str] = {}
        try:
            for tensors, twice in parts:
                count = f"-{len(described)}" if described else ""
                file = f"tensors-{atomic.number_of(folder)}{count}.safetensors"
                with disk.disk_errors_explained(directory):
                    described[file] = storage.write_tensors(folder / file, tensors)
                    atomic.rename(folder / file, directory / file)
                same |= twice
                del tensors  # before the next are gathered
            with disk.disk_errors_explained(directory):
                disk.flush_to_disk(directory)
            content = {"format": FORMAT, "versions": versions(), "sites": sites}
            content |= {"files": described, "same": same, "objects": tree}
            old = {name for name in named | replaced if os.path.lexists(directory / name)}
            content["replaces"] = sorted(old)  # a kill may leave them for the next save
            storage.write_manifest(directory / MANIFEST, content)
        finally:  # Ctrl-C too, which may come when the manifest has its name already
            _remove_unnamed(directory, {*described} | named | replaced)
    return described


def _remove_unnamed(directory: Path, names: set[str]) -> None:
    try:
        named, _ = _named(directory)
    except FalqonError as error:
        disk.warn(f"{directory} keeps older files, too ({error}). Save into a new folder")
        return
    for name in sorted(names - named):
        atomic.remove(directory / name)


def _named(directory: Path) -> tuple[set[str], set[str]]:
    """The files of tensors that a folder's manifest names, and those that it replaced; none where
    there is no manifest, or a damaged one.
    """
    try:
        content = storage.read_json(directory / MANIFEST)
        found = [{str(name) for name in content.get(key, ())} for key in ("files", "replaces")]
    except (storage.DamagedFileError, AttributeError, TypeError):
        return set(), set()
    named, replaced = ({name for name in names if _TENSORS.fullmatch(name)} for names in found)
    return named, replaced


@functools.cache
def versions() -> dict[str, str]:
    """The versions of everything that the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("falqon-fx", "peft", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _rng_state(sharded: bool) -> dict[str, Any]:
    """The state of this process, with those of the others beside that of the first."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    own = {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}
    if not sharded:
        return own
    first, *others = of_each(own)
    return {**first, "others": others}


# -- loading ---------------------------------------------------------------------------------------


@torch.inference_mode(False)  # what is loaded is to be trained
def load_checkpoint(
    model: nn.Module,
    directory: str | Path,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    rng: bool = True,
) -> dict[str, Any]:
    """Bring a model, made as for the interrupted run, to the state that was saved. In place:
    parameters keep their identity, so optimizers and compiled graphs stay valid.

    A model that is not yet prepared becomes prepared where the saved one was; that costs no cast.
    Every process of a sharded model calls this and takes its parts; as many as have saved, or
    others. Of their random generators those of the first so many go on.

    The file is mapped and each byte read twice, to check and to copy, FP8 bytes a third time, to
    see that they are numbers: beside the model only the optimizer's state and ``extra`` take memory
    of their own. Returns ``extra`` as given to `save_checkpoint`.

    Raises:
        DamagedFileError: names the file, the tensor and what is wrong with it.
        FalqonError: a checkpoint of another model, of other base weights, or without what was asked
            for. Nothing has been changed then.
    """
    directory, model = Path(directory), unwrap(model)
    refuse_parts(model, "load_checkpoint")
    sharded = is_sharded(model)
    tensors: dict[str, Tensor] = {}
    with ranks.together(sharded), storage.read_errors_explained(directory):
        if not directory.is_dir():
            raise FalqonError(str(directory), "there is no such folder", "Name another")
        # Or a save would remove files that are being opened.
        with disk.lock(directory, shared=True):
            manifest = _manifest(directory)
            for name, expected in manifest["files"].items():
                tensors |= storage.open_tensors(directory / name, expected)
    if sharded:
        ranks.check_alike(str(directory), storage.json_checksum(manifest))
    tensors |= trees.shared_again(manifest["same"], tensors, str(directory / MANIFEST))
    objects = _objects(manifest, tensors, directory)
    where, state = str(directory), objects["rng"] if rng else None
    if sharded and state is not None:
        state = training.rng_of(state, dist.get_rank())
    if scheduler is not None:
        training.check_scheduler(scheduler, objects["scheduler"], where)
    if optimizer is not None:
        training.check_optimizer(optimizer, objects["optimizer"], where)
        objects["optimizer"] = training.cut_as(optimizer, objects["optimizer"])
    if state is not None:
        training.check_rng(state, where)

    ours = {n: t for n, t in tensors.items() if not n.startswith(_TRAINING)}
    model_state.check(model, manifest["sites"], ours, where)
    targets = (("optimizer", optimizer), ("scheduler", scheduler))
    training.load_all(((n, to, objects[n]) for n, to in targets if to is not None), where)
    model_state.write(model, manifest["sites"], ours)
    if state is not None:
        training.set_rng(state)
    extra: dict[str, Any] = objects["extra"]
    return extra


def read_extra(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds as ``extra``, apart from its tensors, which are empty.

    Raises:
        FalqonError: no checkpoint, or a damaged one.
    """
    extra: dict[str, Any] = _objects(_manifest(directory), None, directory)["extra"]
    return extra


def _manifest(directory: Path) -> dict[str, Any]:
    return storage.read_manifest(directory / MANIFEST, FORMAT, "checkpoint", _OTHER_FORMAT)


def _objects(
    manifest: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, directory: Path
) -> dict[str, Any]:
    """What isn't the model's."""
    found = trees.from_plain(manifest["objects"], tensors, str(directory / MANIFEST))
    match found:
        case {"optimizer": _, "scheduler": _, "rng": _, "extra": dict()}:
            return dict(found)
    raise storage.DamagedFileError(directory / MANIFEST, "its objects are not those of a run")
