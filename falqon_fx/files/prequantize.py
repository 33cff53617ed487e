"""`prequantize`: casts models whose dense weights don't fit into memory to FP8.

It reads a checkpoint one weight at a time and writes each as a file of its own; a run that was
killed goes on with the weights that are missing. `falqon_fx.files.loading` maps the files in.
"""

from __future__ import annotations

import json
import time
import zlib
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
from falqon_fx.files import atomic, decoded, disk, seals, storage
from falqon_fx.files.checkpoint import versions
from falqon_fx.files.hf import (
    empty_model,
    lora_config,
    new_lora_a,
    read_index,
    read_tensor,
)
from falqon_fx.files.loading import FORMAT, MANIFEST
from falqon_fx.files.model_state import Site
from falqon_fx.files.nvfp4_import import (
    as_published,
    base_of,
    is_nvfp4,
    names_of,
    quantization_of,
    warn_of_a_second_cast,
)
from falqon_fx.files.places import check_places, tied_names
from falqon_fx.files.public_names import PublicNames, without_left_out
from falqon_fx.files.published import check_headers
from falqon_fx.files.stack_files import Checkpoint, StackLayer, stacks_to_cast
from falqon_fx.files.units import Unit, layers_to_cast, units_of
from falqon_fx.files.workers import Admission, Clock, shared_threads
from falqon_fx.model.lora_layers import LinearLayer
from falqon_fx.rows.state import create
from falqon_fx.site.base import cast_base, check_weight, digest
from falqon_fx.site.numerics import scale_bits
from falqon_fx.site.paths import IN_FP8
from falqon_fx.site.spec import RowsSpec, SiteSpec
from falqon_fx.site.svd import init_lora_a_

Layers = Mapping[str, LinearLayer | StackLayer]
DEFAULT = FalqonConfig(init="svd")
_PLAN = "plan.json"
_COPIED = (*seals.CONFIGS, *seals.TOKENIZER, *seals.PAPERS)


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
        model: a folder with config.json and safetensors; dense, or FP8 with one scale per block
            (DeepSeek, Qwen3-FP8) or INT8 with one per row (compressed-tensors' W8A8), which are
            decoded and cast again (`falqon_fx.files.blocks`).
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
    atomic.refuse_existing(out)
    with storage.read_errors_explained(source):
        index = read_index(source)
        others = seals.known_files(source, _COPIED)
        skeleton = empty_model(source, lora_config(lora), len(index))
        index = without_left_out(skeleton.get_base_model(), index)
        settings = quantization_of(source)
        nvfp4 = names_of(index, source) if is_nvfp4(settings, source) else {}
        check_headers(skeleton, source, index, settings, nvfp4)
        config = config or (FalqonConfig(base_dtype="nvfp4") if nvfp4 else DEFAULT)
        weights = index | {f"{path}.weight": index[n.codes] for path, n in nvfp4.items()}
        named = PublicNames(skeleton.get_base_model()).by_own(weights)
        layers: Layers = {
            **layers_to_cast(skeleton, named, config),
            **stacks_to_cast(skeleton, weights, config),
        }
        dtype = skeleton.get_base_model().dtype
        units = units_of(layers, named, source, index, settings, nvfp4, dtype)
        if nvfp4 and config.base_dtype == "nvfp4":
            wholes = (names.whole for names in nvfp4.values())
            config = as_published(config, (read_tensor(source / index[n], n) for n in wholes))
        elif nvfp4:
            warn_of_a_second_cast(source, config.base_dtype, len(nvfp4))
        _check_rest(skeleton, layers, units, source, index)
        decoded.check_scales(units, source, index)
    partial = atomic.working_folder(out)
    atomic.refuse_link(partial)
    clock = Clock()
    start = time.perf_counter()
    with (
        atomic.made_folder(partial),
        disk.lock(partial, wait=False),
        disk.disk_errors_explained(out),
    ):
        _begin(partial, skeleton, config, units)
        done = _run(partial, source, index, layers, config, units, workers, progress, clock)
        described = {unit.file: done[unit][0] for unit in units}
        _finish(partial, out, others, skeleton, layers, config, units, described)
    return PrequantizeReport(
        out,
        sum(unit.layer is not None for unit in units),
        sum(resumed and unit.layer is not None for unit, (_, resumed) in done.items()),
        sum(unit.bytes for unit in units),
        sum(item["bytes"] for item in described.values()),
        time.perf_counter() - start,
        clock.seconds,
    )


def _check_rest(
    skeleton: Any,
    layers: Layers,
    units: list[Unit],
    source: Path,
    index: Mapping[str, str],
) -> None:
    """Refuse a checkpoint whose other tensors `load` would refuse, before hours of casting."""
    rest = decoded.shapes_of(units, source, index)
    names = PublicNames(skeleton.get_base_model()).by_own(rest)
    plain = {name for unit in units if not unit.dtype for name in unit.tensors}
    for several in tied_names(skeleton.get_base_model()):
        held = [names[n] for name in several if (n := name.replace(".base_layer.", ".")) in names]
        if len(held) > 1:  # which is compared
            rest |= {n: read_tensor(source / index[n], n) for n in held if n in plain}
    cast = {
        path.removesuffix(IN_FP8) if isinstance(layer, StackLayer) else f"{path}.weight"
        for path, layer in layers.items()
    }
    check_places(skeleton, cast, Checkpoint(skeleton, rest).placed(rest), str(source))


def _run(
    partial: Path,
    source: Path,
    index: Mapping[str, str],
    layers: Layers,
    config: FalqonConfig,
    units: list[Unit],
    workers: int,
    progress: bool,
    clock: Clock,
) -> dict[Unit, tuple[dict[str, Any], bool]]:
    """Write the file of each unit; it described, and whether an earlier run had written it."""
    done = {}
    with shared_threads(workers), ThreadPoolExecutor(workers) as pool:
        admit = Admission(max(4 * max(unit.bytes for unit in units), 2**28))
        jobs = {pool.submit(_convert, u, source, index, partial, layers, config, clock, admit): u
                for u in units}  # fmt: skip
        columns = (
            TextColumn("prequantizing"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress, transient=True) as bar:
            task = bar.add_task("", total=sum(unit.bytes for unit in units))
            try:
                for job in as_completed(jobs):
                    done[jobs[job]] = job.result()
                    bar.advance(task, jobs[job].bytes)
            except BaseException:  # Ctrl-C too stops the others
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return done


# -- the plan --------------------------------------------------------------------------------------


def _begin(partial: Path, skeleton: Any, config: FalqonConfig, units: list[Unit]) -> None:
    """Start in an empty folder, or see that it is of an interrupted run with the same plan. That
    the weights are the same is seen as they are read (`_convert`).
    """
    for _ in atomic.leftovers(partial):
        pass
    lora = skeleton.peft_config["default"].to_dict()
    del lora["base_model_name_or_path"]  # where the model lies, which may be elsewhere now
    plan = {
        "format": FORMAT,
        "config": str(config),
        "lora": lora,
        "units": [asdict(unit) for unit in units],
    }
    text = json.dumps(plan, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    file = partial / _PLAN
    others = [path for path in partial.iterdir() if not atomic.is_aside(path)]
    if file.read_bytes() != text.encode() if file.is_file() else others:
        raise FalqonError(
            str(partial),
            "it is of another run, with other options or files",
            "Remove it, or name another folder than " + str(partial.with_suffix("")),
        )
    with atomic.atomic_file(file) as aside:
        aside.write_text(text)
    for folder in (partial / "weights", partial / "records"):
        atomic.refuse_link(folder)
        folder.mkdir(exist_ok=True)


# -- one weight ------------------------------------------------------------------------------------


def _convert(
    unit: Unit,
    source: Path,
    index: Mapping[str, str],
    partial: Path,
    layers: Layers,
    config: FalqonConfig,
    clock: Clock,
    admit: Admission,
) -> tuple[dict[str, Any], bool]:
    """Write the file of a unit, then its record; it described, and whether an earlier run wrote it
    from the same weights. They are compared by contents, since copying and touching change times.
    """
    with admit(unit.bytes * _memory_of(unit)):
        with clock("read"):
            tensors = decoded.read(unit, source, index)
            known = {name: storage.digest(tensor) for name, tensor in tensors.items()}
            written = _written(partial, unit, known)
        if written is not None:
            return written, True
        with clock("cast"):
            if unit.layer is not None:
                tensors = _cast(unit, layers[unit.layer], tensors, source, config)
            elif unit.dtype:
                tensors = decoded.left_dense(unit, tensors, source)
        with clock("write"), atomic.aside(partial) as folder:
            described = storage.write_tensors(folder / "tensors", tensors)
            atomic.rename(folder / "tensors", partial / unit.file)
            (folder / "record").write_text(json.dumps({"source": known, "described": described}))
            disk.flush_to_disk(folder / "record")
            atomic.rename(folder / "record", _record(partial, unit))
    return described, False


def _memory_of(unit: Unit) -> int:
    """What casting it takes, in the bytes that it has in the checkpoint."""
    if not unit.dtype:
        return 1
    return 24 if unit.nvfp4 is not None or unit.mxfp4 else 4 if unit.block is None else 12


def _cast(
    unit: Unit,
    layer: LinearLayer | StackLayer,
    tensors: Mapping[str, Tensor],
    source: Path,
    config: FalqonConfig,
) -> dict[str, Tensor]:
    """The layer's tensors (`falqon_fx.files.model_state.make_layer`), and A where
    it has an adapter; those of stacks start as they are loaded.
    """
    tensors = decoded.opened(unit, tensors)
    if isinstance(layer, StackLayer):
        base = layer.cast(tensors, unit.block, SiteSpec.from_config(config), source)
        own = {"code": base.code, "scale": scale_bits(base.scale)}
        return {**own, "digest": digest(base.code, base.scale)}
    spec, adapter = SiteSpec.from_config(config), {}
    weight = decoded.weight_of(unit, layer.site, tensors, source)
    weight = weight.t().contiguous() if layer.transposed else weight
    check_weight(layer.site, weight)
    if layer.lora is not None:
        # Its own, or layers of one width would start alike; the same after an interruption.
        generator = torch.Generator().manual_seed(config.seed ^ zlib.crc32(layer.path.encode()))
        lora_a = new_lora_a((layer.lora.lora_a.shape[0], weight.shape[1]), generator)
        adapter["lora_A"] = lora_a
        if config.update == "rows":
            b = torch.zeros(layer.lora.lora_b.shape, dtype=torch.float32)
            given = (weight, lora_a, b, layer.lora.scaling)
            state = create(layer.site, *given, config, frees_base=True)
            return {**state.stored, **adapter}
        if config.init == "svd":
            init_lora_a_(weight, lora_a, spec, config.seed)
    if unit.nvfp4 is not None and spec.base == "nvfp4" and not layer.transposed:
        base = base_of(layer.site, unit.nvfp4, tensors, source)  # its own bytes
    else:
        base = cast_base(weight, spec)
    own = {"code": base.code, "scale": scale_bits(base.scale)}
    return {**own, "digest": digest(base.code, base.scale), **adapter}


def _record(partial: Path, unit: Unit) -> Path:
    return partial / "records" / (unit.file.removeprefix("weights/") + ".json")


def _written(partial: Path, unit: Unit, known: Mapping[str, str]) -> dict[str, Any] | None:
    """What an earlier run made of the same weights, described; None where it isn't whole."""
    file = _record(partial, unit)
    try:
        record = storage.read_json(file)
        storage.check_form(file, record, "record")
        if record["source"] != known:
            return None
        storage.open_tensors(partial / unit.file, record["described"])
    except storage.DamagedFileError:
        return None
    described: dict[str, Any] = record["described"]
    return described


# -- the whole -------------------------------------------------------------------------------------


def _finish(
    partial: Path,
    out: Path,
    others: list[Path],
    skeleton: Any,
    layers: Layers,
    config: FalqonConfig,
    units: list[Unit],
    described: Mapping[str, Any],
) -> None:
    with atomic.aside(partial) as folder:  # renamed over what an interrupted run left
        seals.copy_files(others, folder)
        skeleton.peft_config["default"].save_pretrained(folder)
        names = sorted(path.name for path in folder.iterdir())
        sealed = seals.seal(folder, names)
        for name in names:
            disk.flush_to_disk(folder / name)
            atomic.rename(folder / name, partial / name)
    sites = [_site(unit, layers[unit.layer], config) for unit in units if unit.layer is not None]
    content = {"format": FORMAT, "versions": versions(), "files": dict(described)}
    storage.write_manifest(partial / MANIFEST, {**content, "others": sealed, "sites": sites})
    for path in partial.iterdir():
        disk.flush_to_disk(path)
    atomic.rename_into_place(partial, out)
    # Last: a run killed before would lack what it goes on with.
    atomic.remove(out / "records")
    atomic.remove(out / _PLAN)


def _site(unit: Unit, layer: LinearLayer | StackLayer, config: FalqonConfig) -> Site:
    """What `falqon_fx.files.model_state.make_layer` needs to know."""
    known: Site = {"prepared": layer.path, "file": unit.file, "dtype": unit.dtype}
    known["transposed"] = layer.transposed
    if isinstance(layer, StackLayer):
        known["experts"] = layer.experts
    elif config.update == "rows" and layer.lora is not None:
        spec = asdict(RowsSpec.from_config(config))
        return {**known, "spec": spec, "scaling": layer.lora.scaling}
    return {**known, "spec": asdict(SiteSpec.from_config(config))}
