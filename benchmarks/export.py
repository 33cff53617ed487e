"""What each form of the base costs once an adapter is merged, in that form (`save_fp8`) and in bf16
(`merge_and_unload`), and how long `save_fp8` takes.

    python benchmarks/export.py --nll --time
    python benchmarks/export.py --nll --bases fp8 int8 --defaults

SmolLM2-135M-Instruct with an adapter on all 210 linear layers whose B is random and moves each
weight by 1%. All errors are relative, in Frobenius norms over all layers:

- trained: dq(W) + s B A, what ran in training, against W + s B A, what FP8 itself costs;
- once: the weights that `save_fp8` casts from the original ones, against W + s B A;
- twice: those that it casts from dq(W), where `prepare` has freed the original ones, likewise;
- left: how much of s B A is left then, ⟨cast - dq(W), s B A⟩ / |s B A|²;
- merge: what `merge_and_unload` gives in bf16, against dq(W) + s B A;
- restore: what `restore` gives in bf16, against dq(W).

"nll" is the held-out NLL of the plain bf16 model that `merge_and_unload` gives, "nll_once" and
"nll_twice" those of the exported weights; "export_seconds" the time of `save_fp8` from the original
weights, with its fsyncs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from common import environment, result_path, write_json
from nll import Data
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from training import Trainee, Variant, lora_layers, mean_nll, progress_bar, with_adapter

import falqon_fx
from falqon_fx.config import BaseDtype
from falqon_fx.site import nvfp4

MOVED = 0.01  # |s B A| / |W|


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nll", action="store_true", help="also of the merged models")
    parser.add_argument("--time", action="store_true", help="also save_fp8")
    kinds = get_args(BaseDtype)
    parser.add_argument("--bases", nargs="+", choices=kinds, default=["fp8"], help="what W is")
    parser.add_argument("--defaults", action="store_true", help="the default scales of each base")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args(argv)
    data = Data.load()
    start = with_adapter(Variant("start", "start", 0.0, "falqon"), copy.deepcopy(data.base), 0)
    wanted = move(start)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data.base.save_pretrained(Path(folder, "base"))
        choices = itertools.product(arguments.bases, ("row", "tensor"), ("pow2", "amax"))
        for kind, granularity, scale in choices:
            if kind != "fp8" and granularity == "tensor":
                continue
            how = {"base_dtype": kind, "granularity": granularity, "scale": scale}
            config = falqon_fx.FalqonConfig(**how)
            if arguments.defaults and config != falqon_fx.FalqonConfig(base_dtype=kind):
                continue
            row = measure(start, config, wanted, data, Path(folder), arguments)
            rows.append({**how, **row})
            print(json.dumps(rows[-1]), flush=True)
    dense = nll(start.merge_and_unload(), data) if arguments.nll else None
    result = {**environment(), "moved": MOVED, "nll_of_bf16": dense, "forms": rows}
    write_json(arguments.out or result_path("export", ".json"), result)
    print(json.dumps(result, indent=1))
    return 0


@torch.no_grad()
def move(model: PeftModel) -> dict[str, Tensor]:
    """Give each site a random B; returns base + s B A, float32, by path."""
    generator, wanted = torch.Generator().manual_seed(0), {}
    for path, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        base, scaling = layer.get_base_layer().weight.float(), layer.scaling["default"]
        b.normal_(generator=generator)
        b *= MOVED * base.norm() / (scaling * (b @ a)).norm()
        wanted[path] = base + scaling * (b @ a)
    return wanted


def measure(
    start: PeftModel,
    config: falqon_fx.FalqonConfig,
    wanted: Mapping[str, Tensor],
    data: Data,
    folder: Path,
    arguments: argparse.Namespace,
) -> dict[str, float | None]:
    """The errors of one form of scales, and what else was asked for."""
    model = copy.deepcopy(start)
    falqon_fx.prepare(model, config, progress=False)
    began = time.perf_counter()
    once, _ = exported(model, folder / "once", base=folder / "base")
    seconds = time.perf_counter() - began
    twice, left = exported(model, folder / "twice")
    sites = falqon_fx.adapters(model)
    trained = {path: site.merged() for path, site in sites.items()}
    base = {path: site.base() for path, site in sites.items()}
    restored = falqon_fx.restore(copy.deepcopy(model))
    plain = falqon_fx.merge_and_unload(model)
    found: dict[str, float | None] = {
        "trained": error(trained, wanted),
        "once": error(once, wanted),
        "twice": error(twice, wanted),
        "left": left,
        "merge": error(weights(plain, wanted), trained),
        "restore": error(weights(restored, wanted), base),
        "export_seconds": seconds if arguments.time else None,
    }
    for name, of in {"nll": None, "nll_once": once, "nll_twice": twice}.items():
        for path, weight in (of or {}).items():
            layer = plain.get_submodule(path.removeprefix("base_model.model."))
            layer.weight.data.copy_(weight)
        found[name] = nll(plain, data) if arguments.nll else None
    return found


def exported(
    model: PeftModel, folder: Path, **options: Path
) -> tuple[dict[str, Tensor], float | None]:
    """The weights that `save_fp8` writes, float32, by the paths of the LoRA layers, and how much is
    left of the adapters.
    """
    report = falqon_fx.save_fp8(model, folder, progress=False, **options)
    tensors = load_file(folder / "model.safetensors")
    shutil.rmtree(folder)
    found = {}
    for path in (n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")):
        scale = tensors[f"{path}.weight_scale"]
        if f"{path}.weight" in tensors:
            weight = tensors[f"{path}.weight"].float() * scale
        else:
            packed = nvfp4.joined(tensors[f"{path}.weight_packed"], scale.view(torch.uint8))
            whole = 1 / tensors[f"{path}.weight_global_scale"].reshape(())
            weight = nvfp4.decode(packed, whole, torch.float32)
        found[f"base_model.model.{path}"] = weight
    return found, report.left


def weights(model: nn.Module, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain weights at the paths of the LoRA layers, float32."""
    found = {}
    for path in wanted:
        inner = path if isinstance(model, PeftModel) else path.removeprefix("base_model.model.")
        layer = model.get_submodule(inner)
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        found[path] = layer.weight.detach().float()
    return found


def error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """|found - exact| / |exact| over all layers."""
    off = sum(float((found[path] - exact[path]).double().square().sum()) for path in exact)
    return float((off / sum(float(t.double().square().sum()) for t in exact.values())) ** 0.5)


def nll(model: nn.Module, data: Data) -> float:
    with progress_bar(Console(stderr=True)) as progress:
        return mean_nll(Trainee(model, model, model), data.held_out, progress, "NLL")


if __name__ == "__main__":
    sys.exit(main())
