"""`save_checkpoint` and `load_checkpoint`: training goes on as if it had not been interrupted.

A checkpoint is a folder: ``checkpoint.json`` names the files that belong to it, with checksums, and
is renamed into place last. So a save that is killed leaves the checkpoint before it whole.
"""

from __future__ import annotations

import json
import platform
import random
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import storage, update
from falqon_fx.errors import FalqonError
from falqon_fx.merged import STATE, MergedAdapter, allocate, registry
from falqon_fx.prepare import MergedBaseLinear, unwrap
from falqon_fx.spec import SiteSpec

FORMAT = "falqon_fx.checkpoint.1"
MANIFEST = "checkpoint.json"


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
    """Write all that the next steps depend on: FP8 weights with their scales, ``applied``, update
    counters (the state of stochastic rounding), A, B and every other parameter and buffer; the
    optimizer, the scheduler, and the random generators of torch and Python.

    Base weights that `prepare` has not freed are not in it: the model to load into brings them.

    Args:
        model: the module or its compiled wrapper.
        directory: a new folder, or one with an earlier checkpoint, which this one replaces at the
            moment that it is whole and on the disk.
        optimizer: its state, of plain data and tensors.
        scheduler: likewise, of a learning rate schedule.
        extra: tensors, numbers, text, lists and dicts that `load_checkpoint` gives back.
        rng: also the state of the random generators.

    Raises:
        FalqonError: something that can't be saved, or a full disk. An earlier checkpoint stays.
    """
    directory = Path(directory)
    sites, named = collect(unwrap(model))
    model_tensors, same = storage.unshared(named)
    training: dict[str, Tensor] = {}
    objects = {
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "rng": _rng_state() if rng else None,
        "extra": dict(extra or {}),
    }
    tree = storage.separate(objects, "training", training)
    training_tensors, training_same = storage.unshared(training.items())

    stamp = uuid.uuid4().hex[:12]
    files = {f"model-{stamp}.safetensors": model_tensors}
    if training_tensors:
        files[f"training-{stamp}.safetensors"] = training_tensors
    storage.make_folder(directory)
    described = {}
    try:
        for name, tensors in files.items():
            with storage.written_aside(directory / name) as aside:
                described[name] = storage.write_tensors(aside, tensors)
        storage.write_manifest(
            directory / MANIFEST,
            {
                "format": FORMAT,
                "versions": versions(),
                "sites": sites,
                "files": described,
                "same": same | training_same,
                "objects": tree,
            },
        )
    except BaseException:
        for name in files:
            (directory / name).unlink(missing_ok=True)
        raise
    _remove_older(directory, set(files))
    return CheckpointReport(
        directory,
        tuple(files),
        sum(map(len, files.values())),
        sum(item["bytes"] for item in described.values()),
        len(sites),
    )


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("falqon-fx", "peft", "transformers", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def collect(model: nn.Module) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
    """The sites of a model, and every named tensor that its next step depends on."""
    sites: list[dict[str, Any]] = []
    extra: list[tuple[str, Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, MergedBaseLinear):
            dtype = str(module.dtype).removeprefix("torch.")
            known = {"prepared": path, "dtype": dtype, "transposed": module.transposed}
            sites.append({**known, **_describe(module.merged())})
    freed = set()
    for site, state in _unprepared(model):
        prefix = f"falqon.{len(sites)}."
        sites.append({"state": prefix, **site, **_describe(state)})
        extra += [(prefix + n, t) for n, t in state.stored.items()]
        freed.add(site["base"])
    named = [(name, t) for name, t in model.state_dict().items() if name not in freed]
    return sites, named + extra


def _describe(state: MergedAdapter) -> dict[str, Any]:
    return {"scaling": state.scaling, "spec": asdict(state.plan)}


def _unprepared(model: nn.Module) -> Iterator[tuple[dict[str, Any], MergedAdapter]]:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for state, of_state in registry.within(model.parameters(), names):
        site = dict(zip(("base", "lora_a", "lora_b"), of_state, strict=True))
        yield {**site, "transposed": state.transposed}, state


def _rng_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def _remove_older(directory: Path, keep: set[str]) -> None:
    for pattern in ("model-*.safetensors", "training-*.safetensors"):
        for path in directory.glob(pattern):
            if path.name not in keep:
                path.unlink()


# -- loading ---------------------------------------------------------------------------------------


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
    Returns ``extra`` as given to `save_checkpoint`.

    Raises:
        DamagedFileError: names the file, the tensor and what is wrong with it.
        FalqonError: a checkpoint of another model, of other base weights, or without what was asked
            for. Nothing has been changed then.
    """
    directory, model = Path(directory), unwrap(model)
    manifest = storage.read_manifest(directory / MANIFEST, FORMAT)
    tensors: dict[str, Tensor] = {}
    for name, expected in manifest["files"].items():
        tensors |= storage.open_tensors(directory / name, expected)
    tensors |= {name: tensors[other] for name, other in manifest["same"].items()}
    objects = storage.join(manifest["objects"], tensors)
    for name, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        if target is not None and objects[name] is None:
            raise FalqonError(str(directory), f"it holds no {name}", f"Leave out {name}=")

    ours = {n: t for n, t in tensors.items() if not n.startswith("training.")}
    apply(model, manifest["sites"], ours, str(directory))
    for name, target in (("optimizer", optimizer), ("scheduler", scheduler)):
        if target is not None:
            target.load_state_dict(objects[name])
    if rng and objects["rng"] is not None:
        _set_rng_state(objects["rng"])
    extra: dict[str, Any] = objects["extra"]
    return extra


def read_extra(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds as ``extra``, apart from its tensors, which are empty."""
    objects = dict(storage.read_manifest(directory / MANIFEST, FORMAT)["objects"]["dict"])
    extra: dict[str, Any] = storage.join(objects["extra"], defaultdict(lambda: torch.empty(0)))
    return extra


def apply(
    model: nn.Module, sites: list[dict[str, Any]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Write tensors and sites, as `collect` gave them, into a model.

    Raises:
        FalqonError: they don't fit. Nothing has been changed then.
    """
    _check_names(model, sites, tensors, where)
    for site in sites:
        if "prepared" in site:
            _prepare_site(model, site, tensors)
    named = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in named:
                named[name].copy_(tensor)
    for parameter in model.parameters():
        registry.forget(parameter)
    for site in sites:
        if "state" in site:
            _adopt(model, site, tensors)


def _check_names(
    model: nn.Module, sites: list[dict[str, Any]], tensors: Mapping[str, Tensor], where: str
) -> None:
    expected = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    saved = {n: (t.shape, t.dtype) for n, t in tensors.items()}
    for site in sites:
        if "prepared" in site:
            path = site["prepared"]
            found = _layer_shape(model, path, site["transposed"], where)
            shape = (tensors[f"{path}.applied"].shape[0], tensors[f"{path}.code"].shape[1])
            if found != shape:
                raise FalqonError(path, f"{where} has shape {shape}, the model {found}", _REMEDY)
            for name in ("weight", *STATE):
                expected.pop(f"{path}.{name}", None)
                saved.pop(f"{path}.{name}", None)
        else:
            for name in STATE:
                saved.pop(site["state"] + name)
            _check_base(model, site, tensors, where)
            path = site["base"].rpartition(".")[0]
            for name in (site["base"], *(f"{path}.{name}" for name in STATE)):
                expected.pop(name, None)
    for name in sorted(expected.keys() | saved.keys()):
        if name not in saved:
            raise FalqonError(name, f"it is in the model but not in {where}", _REMEDY)
        if name not in expected:
            raise FalqonError(name, f"it is in {where} but not in the model", _REMEDY)
        if saved[name] != expected[name]:
            raise FalqonError(
                name,
                f"{where} has {_shape(*saved[name])}, the model {_shape(*expected[name])}",
                _REMEDY,
            )


_REMEDY = "Make the model as for the run that was saved: same base, same adapter config"


def _shape(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _layer_shape(model: nn.Module, path: str, transposed: bool, where: str) -> tuple[int, int]:
    """(out, in) of the linear layer at a path."""
    try:
        module: Any = model.get_submodule(path)
    except AttributeError as error:
        raise FalqonError(path, f"it is in {where} but not in the model", _REMEDY) from error
    if isinstance(module, MergedBaseLinear):
        return module.out_features, module.in_features
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        kind = type(module).__name__
        raise FalqonError(path, f"{where} has an FP8 layer there, the model a {kind}", _REMEDY)
    out, features = weight.t().shape if transposed else weight.shape
    return out, features


def _check_base(
    model: nn.Module, site: dict[str, Any], tensors: Mapping[str, Tensor], where: str
) -> None:
    """The base weight that an unprepared model brings must be the one that was merged."""
    path, _, name = site["base"].rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, MergedBaseLinear):
        return  # freed, so there is none to compare
    base = getattr(module, name)
    base = base.t() if site["transposed"] else base
    out, rank = tensors[site["state"] + "applied"].shape
    stored = tensors[site["state"] + "counters"][update.FINGERPRINT_W]
    same = base.shape[0] == out and torch.equal(
        update.fingerprint(update.sample(base)[None])[0].cpu(), stored
    )
    if not same:
        raise FalqonError(
            site["base"],
            f"its contents are not those that {where} was trained on",
            "Load the same base model, in the same dtype",
        )


def _prepare_site(model: nn.Module, site: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A prepared layer of the saved shapes at the site's path; contents follow."""
    path, plan = site["prepared"], SiteSpec(**site["spec"])
    module = model.get_submodule(path)
    shapes = [tensors[f"{path}.{name}"].shape for name in STATE]
    if isinstance(module, MergedBaseLinear) and shapes == [
        getattr(module, name).shape for name in STATE
    ]:
        module.spec, module.scaling = str(plan), site["scaling"]
        return
    state = _empty_state(site, tensors, f"{path}.", next(module.parameters()).device)
    bias: Any = module.bias
    dtype = getattr(torch, site["dtype"])
    merged = MergedBaseLinear(state, bias, dtype, site["transposed"])
    model.set_submodule(path, merged.train(module.training))


def _empty_state(
    site: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str, device: torch.device
) -> MergedAdapter:
    applied = tensors[prefix + "applied"]
    out, rank = applied.shape
    features, plan = tensors[prefix + "code"].shape[1], SiteSpec(**site["spec"])
    return allocate(out, features, rank, applied.dtype, site["scaling"], plan, device)


def _adopt(model: nn.Module, site: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    prefix = site["state"]
    path, _, name = site["base"].rpartition(".")
    module: Any = model.get_submodule(path)
    plan = SiteSpec(**site["spec"])
    if isinstance(module, MergedBaseLinear):  # prepared since
        module.spec, module.scaling = str(plan), site["scaling"]
        state = module.merged()
    else:
        base = getattr(module, name)
        state = _empty_state(site, tensors, prefix, base.device)
    for key, target in state.stored.items():
        target.copy_(tensors[prefix + key])
    if not isinstance(module, MergedBaseLinear):
        a, b = model.get_parameter(site["lora_a"]), model.get_parameter(site["lora_b"])
        state.transposed = site["transposed"]
        registry.adopt(state, base, a, b)


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])


# -- torch.distributed.checkpoint ------------------------------------------------------------------


class CheckpointState:
    """A model, and its optimizer, for `torch.distributed.checkpoint` (its ``Stateful`` protocol):
    ``dcp.save({"falqon": CheckpointState(model, optimizer)}, checkpoint_id=...)``, and ``dcp.load``
    likewise into a model made as for the run that was saved.

    Unlike in `save_checkpoint`, all base weights are in it. ``dcp.load`` reads into the model's
    parameters itself, before anything can be compared. DCP pickles its own metadata: where files
    come from people whom you don't trust, use `load_checkpoint`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model, self.optimizer = unwrap(model), optimizer

    def state_dict(self) -> dict[str, Any]:
        """The model's tensors by name; all else, whose shapes DCP can't know before it loads, as
        the bytes of a safetensors file and text.
        """
        from safetensors.torch import save

        sites, named = collect(self.model)
        packed = {name: t for name, t in named if name.startswith("falqon.")}
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        tree = storage.separate(optimizer, "training", packed)
        return {
            "model": self.model.state_dict(),
            "packed": save(storage.unshared(packed.items())[0]),
            "text": json.dumps({"sites": sites, "optimizer": tree}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Write what ``dcp.load`` has read into the model and the optimizer.

        Raises:
            FalqonError: a checkpoint of another model.
        """
        from safetensors.torch import load

        text, packed = json.loads(state["text"]), load(state["packed"])
        bases = {site.get("base") for site in text["sites"]}
        tensors = {name: t for name, t in state["model"].items() if name not in bases}
        tensors |= {name: t for name, t in packed.items() if name.startswith("falqon.")}
        apply(self.model, text["sites"], tensors, "the checkpoint")
        if self.optimizer is not None:
            self.optimizer.load_state_dict(storage.join(text["optimizer"], packed))
