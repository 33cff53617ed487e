"""`prequantize`: casts models whose dense weights don't fit into memory to FP8.

It reads a checkpoint one weight at a time and writes each as a file of its own; a run that was
killed goes on with the weights that are missing. `falqon_fx.files.loading` maps the files in.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.files import atomic, storage
from falqon_fx.files.checkpoint import versions
from falqon_fx.files.hf import empty_model, lora_config, new_lora_a, read_index, read_tensor
from falqon_fx.files.loading import FORMAT, INDEX, MANIFEST
from falqon_fx.files.model_state import Site
from falqon_fx.files.workers import Admission, Clock, shared_threads
from falqon_fx.model.lora_layers import LinearLayer, linear_layers
from falqon_fx.model.prepare import skip_reason
from falqon_fx.rows import model as rows_model
from falqon_fx.rows.state import create
from falqon_fx.site.base import cast_base, check_weight, digest
from falqon_fx.site.spec import RowsSpec, SiteSpec
from falqon_fx.site.svd import init_lora_a_

_PLAN = "plan.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_SMALL = 1 << 20  # bytes; tensors below go into one file together
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class PrequantizeReport:
    """What `prequantize` wrote, and how fast: seconds are summed over workers."""

    directory: Path
    layers: int
    resumed: int
    bytes_read: int
    bytes_written: int
    seconds: float
    profile: dict[str, float]

    def __str__(self) -> str:
        rate = self.bytes_read / 2**30 / max(self.seconds, 1e-9) * 60
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in self.profile.items())
        resumed = f", {self.resumed} of them from an earlier run" if self.resumed else ""
        return (
            f"{self.directory}: {self.layers} layers in FP8{resumed}; "
            f"{self.bytes_read / 2**30:.2f} GiB became {self.bytes_written / 2**30:.2f} GiB "
            f"in {self.seconds:.1f} s ({rate:.1f} GiB/min; {parts})"
        )


@dataclass(frozen=True)
class _Unit:
    """What one file holds: a weight in FP8, or tensors as they are."""

    file: str
    tensors: tuple[str, ...]
    layer: str | None  # path of the linear layer in the PEFT model
    bytes: int
    dtype: str = ""  # of the weight that is cast


def prequantize(
    model: str | Path,
    out: str | Path,
    lora: Any = None,
    config: FalqonConfig | None = None,
    *,
    workers: int = 1,
    progress: bool = True,
) -> PrequantizeReport:
    """Cast the linear weights of a transformers checkpoint to FP8, one at a time: those that
    `prepare` would cast.

    Args:
        model: a folder with config.json and safetensors.
        out: a new folder; `load` makes the model from it. Until it is whole it is called
            ``out.partial``; the same call goes on with that after it was interrupted.
        lora: a PEFT ``LoraConfig``; by default rank 16 on all linear layers.
        config: as for `prepare`. Here init="svd" is the default: the rows of A are the top right
            singular vectors of the cast's error.
        workers: threads that cast weights side by side, each with its share of torch's threads.
        progress: show a bar.

    Raises:
        FalqonError: no such checkpoint, weights that FP8 can't hold, a folder that exists, or a
            full disk (what is done until then is kept in ``out.partial``).
    """
    source, out = Path(model), Path(out)
    config = config or FalqonConfig(init="svd")
    atomic.refuse_existing(out)
    index = read_index(source)
    skeleton = empty_model(source, lora_config(lora), len(index))
    layers = _layers(skeleton, index, config)
    units = _units(layers, source, index)
    partial = atomic.partial(out)
    with atomic.lock(partial, wait=False), atomic.disk_errors_explained(out):
        _begin(partial, source, skeleton, config, units)
        return _run(out, partial, source, index, skeleton, layers, config, units, workers, progress)


def _run(
    out: Path,
    partial: Path,
    source: Path,
    index: Mapping[str, str],
    skeleton: Any,
    layers: Mapping[str, LinearLayer],
    config: FalqonConfig,
    units: list[_Unit],
    workers: int,
    progress: bool,
) -> PrequantizeReport:
    clock = Clock()
    start = time.perf_counter()
    waiting = [unit for unit in units if not _done(partial, unit)]
    with shared_threads(workers), ThreadPoolExecutor(workers) as pool:
        admit = Admission(max(4 * max(unit.bytes for unit in units), 2**28))
        jobs = [pool.submit(_convert, u, source, index, partial, layers, config, clock, admit)
                for u in waiting]  # fmt: skip
        columns = (
            TextColumn("prequantizing"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=sum(unit.bytes for unit in waiting))
            try:
                for job in as_completed(jobs):
                    bar.advance(task, job.result())
            except BaseException:  # Ctrl-C too stops the others
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    described = {u.file: json.loads(_record(partial, u).read_text()) for u in units}
    _finish(partial, out, skeleton, layers, config, units, described)
    return PrequantizeReport(
        out,
        sum(unit.layer is not None for unit in units),
        sum(unit.layer is not None for unit in units) - sum(u.layer is not None for u in waiting),
        sum(unit.bytes for unit in waiting),
        sum(item["bytes"] for item in described.values()),
        time.perf_counter() - start,
        clock.seconds,
    )


# -- the plan --------------------------------------------------------------------------------------


def _layers(
    skeleton: Any, index: Mapping[str, str], config: FalqonConfig
) -> dict[str, LinearLayer]:
    """The linear layers to cast, by path."""
    found = {}
    for layer in linear_layers(skeleton):
        tied = _tensor(layer) not in index  # a checkpoint holds a tied weight once
        left = skip_reason(layer, config, tied)
        if config.update == "rows" and layer.lora is not None:
            left = rows_model.skip_reason(layer.lora, config)
        if left is not None:
            continue
        if tied:
            raise FalqonError(
                layer.site,
                f"the checkpoint has no tensor {_tensor(layer)!r}",
                "Load the model with transformers and save it again; leave tied layers out",
            )
        found[layer.path] = layer
    return found


def _tensor(layer: LinearLayer) -> str:
    """The name of its weight in the checkpoint."""
    return layer.path.removeprefix("base_model.model.").removesuffix(".base_layer") + ".weight"


def _units(
    layers: Mapping[str, LinearLayer], source: Path, index: Mapping[str, str]
) -> list[_Unit]:
    sizes = _sizes(source, index)
    cast: list[_Unit] = []
    for path, layer in layers.items():
        size, dtype = sizes[_tensor(layer)]
        if dtype not in _DTYPES:
            raise FalqonError(
                layer.site, f"its weight is {dtype} already", "falqon_fx.load takes FP8 as it is"
            )
        file = f"weights/{layer.site}.safetensors"
        cast.append(_Unit(file, (_tensor(layer),), path, size, _DTYPES[dtype]))
    if not cast:
        raise FalqonError(str(source), "none of its layers is to be cast", "Check the LoraConfig")
    taken = {unit.tensors[0] for unit in cast}
    rest = [name for name in index if name not in taken]
    small = tuple(name for name in rest if sizes[name][0] < _SMALL)
    units = cast + [
        _Unit(f"weights/{name}.safetensors", (name,), None, sizes[name][0])
        for name in rest
        if name not in small
    ]
    if small:
        units.append(
            _Unit("weights/small.safetensors", small, None, sum(sizes[n][0] for n in small))
        )
    # The largest first, so that workers end together.
    return sorted(units, key=lambda unit: -unit.bytes)


def _sizes(source: Path, index: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Bytes and dtype of each tensor, from the headers alone."""
    sizes = {}
    for file in sorted(set(index.values())):
        if not (source / file).is_file():
            raise FalqonError(str(source), f"{INDEX} names {file}, which is missing", "Fetch it")
        for name, entry in storage.read_header(source / file).items():
            if index.get(name) == file:
                start, end = entry["data_offsets"]
                sizes[name] = (end - start, entry["dtype"])
    for name in index.keys() - sizes.keys():
        raise FalqonError(name, f"{INDEX} says that {index[name]} holds it", "Fetch both again")
    return sizes


def _begin(
    partial: Path, source: Path, skeleton: Any, config: FalqonConfig, units: list[_Unit]
) -> None:
    """Make the folder to work in, or see that it is of an interrupted run with the same plan."""
    files = [(path.name, path.stat()) for path in sorted(source.glob("*.safetensors"))]
    plan = {
        "config": str(config),
        "lora": skeleton.peft_config["default"].to_dict(),
        "units": [asdict(unit) for unit in units],
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files],
    }
    text = json.dumps(plan, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    file = partial / _PLAN
    others = {path.name for path in partial.iterdir()} - {"weights", "records", ".partial"}
    if file.read_text() != text if file.is_file() else others:
        raise FalqonError(
            str(partial), "it is of another run, with other options or files", "Remove it"
        )
    for name in ("weights", "records"):
        atomic.make_folder(partial / name)
    with atomic.atomic_file(file) as aside:
        aside.write_text(text)


# -- one weight ------------------------------------------------------------------------------------


def _convert(
    unit: _Unit,
    source: Path,
    index: Mapping[str, str],
    partial: Path,
    layers: Mapping[str, LinearLayer],
    config: FalqonConfig,
    clock: Clock,
    admit: Admission,
) -> int:
    with admit(unit.bytes if unit.layer is None else 4 * unit.bytes):
        with clock("read"):
            tensors = {name: read_tensor(source / index[name], name) for name in unit.tensors}
        if unit.layer is not None:
            with clock("cast"):
                tensors = _cast(layers[unit.layer], tensors[unit.tensors[0]], config)
        with clock("write"):
            folder = partial / "writing" / unit.file.replace("/", "_")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            described = storage.write_tensors(folder / "tensors", tensors)
            atomic.flush_to_disk(folder / "tensors")
            os.replace(folder / "tensors", partial / unit.file)
            (folder / "record").write_text(json.dumps(described))
            atomic.flush_to_disk(folder / "record")
            os.replace(folder / "record", _record(partial, unit))
            shutil.rmtree(folder)
    return unit.bytes


def _cast(layer: LinearLayer, weight: Tensor, config: FalqonConfig) -> dict[str, Tensor]:
    """The layer's tensors (`falqon_fx.files.model_state.make_layer`), and A where
    it has an adapter.
    """
    if weight.shape != layer.module.weight.shape:
        wanted = list(layer.module.weight.shape)
        problem = f"its weight is {list(weight.shape)}, by config.json {wanted}"
        raise FalqonError(layer.site, problem, "Fetch the folder again")
    weight = weight.t().contiguous() if layer.transposed else weight
    check_weight(layer.site, weight)
    spec, adapter = SiteSpec.from_config(config), {}
    if layer.lora is not None:
        generator = torch.Generator().manual_seed(config.seed)
        lora_a = new_lora_a((layer.lora.lora_a.shape[0], weight.shape[1]), generator)
        adapter["lora_A"] = lora_a
        if config.update == "rows":
            b = torch.zeros(layer.lora.lora_b.shape)
            given = (weight, lora_a, b, layer.lora.scaling)
            state = create(layer.site, *given, config, frees_base=True)
            return {**state.stored, **adapter}
        if config.init == "svd":
            init_lora_a_(weight, lora_a, spec, config.seed)
    base = cast_base(weight, spec)
    own = {"code": base.code, "scale": base.scale.view(torch.int32)}
    return {**own, "digest": digest(base.code, base.scale), **adapter}


def _record(partial: Path, unit: _Unit) -> Path:
    return partial / "records" / (unit.file.removeprefix("weights/") + ".json")


def _done(partial: Path, unit: _Unit) -> bool:
    record = _record(partial, unit)
    if not record.is_file() or not (partial / unit.file).is_file():
        return False
    stated: int = json.loads(record.read_text())["bytes"]
    return (partial / unit.file).stat().st_size == stated


# -- the whole -------------------------------------------------------------------------------------


def _finish(
    partial: Path,
    out: Path,
    skeleton: Any,
    layers: Mapping[str, LinearLayer],
    config: FalqonConfig,
    units: list[_Unit],
    described: Mapping[str, Any],
) -> None:
    source = Path(skeleton.get_base_model().config._name_or_path)
    for path in source.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and path.name != INDEX:
            shutil.copyfile(path, partial / path.name)
    skeleton.peft_config["default"].save_pretrained(partial)
    sites = [_site(unit, layers[unit.layer], config) for unit in units if unit.layer is not None]
    storage.write_manifest(
        partial / MANIFEST,
        {"format": FORMAT, "versions": versions(), "files": dict(described), "sites": sites},
    )
    for path in partial.iterdir():
        atomic.flush_to_disk(path)
    atomic.rename_into_place(partial, out)
    # Last: a run killed before would lack what it goes on with.
    shutil.rmtree(out / "records")
    shutil.rmtree(out / "writing", ignore_errors=True)
    (out / _PLAN).unlink()


def _site(unit: _Unit, layer: LinearLayer, config: FalqonConfig) -> Site:
    """What `falqon_fx.files.model_state.make_layer` needs to know."""
    known: Site = {"prepared": layer.path, "file": unit.file, "dtype": unit.dtype}
    known["transposed"] = layer.transposed
    if config.update == "rows" and layer.lora is not None:
        spec = asdict(RowsSpec.from_config(config))
        return {**known, "spec": spec, "scaling": layer.lora.scaling}
    return {**known, "spec": asdict(SiteSpec.from_config(config))}
