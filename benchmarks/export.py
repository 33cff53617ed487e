"""What `restore` and `merge_and_unload` lose with each form of the FP8 scales, and how long
`save_fp8` takes.

    python benchmarks/export.py --nll --time

SmolLM2-135M-Instruct with an adapter on all 210 linear layers whose B is random and moves each
weight by 1%. All errors are relative, in Frobenius norms over all layers:

- cast: dq(W) against base + s B A, what FP8 itself costs, `merge_and_unload` or not;
- merge: what `merge_and_unload` gives in bf16 against dq(W), the model that was trained;
- restore: what `restore` gives in bf16 against dq(W) - s applied Â in float32.

"nll" is the held-out NLL of the plain bf16 model that `merge_and_unload` gives, "export_seconds"
the time of `save_fp8` with its fsyncs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from common import environment, result_path, write_json
from nll import Data
from peft import PeftModel
from rich.console import Console
from torch import Tensor, nn
from training import Trainee, Variant, lora_layers, mean_nll, progress_bar, with_adapter

import falqon_fx

MOVED = 0.01  # |s B A| / |W|


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nll", action="store_true", help="also of the merged models")
    parser.add_argument("--time", action="store_true", help="also save_fp8")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    arguments = parser.parse_args(argv)
    data = Data.load()
    start = with_adapter(Variant("start", "start", 0.0, "falqon"), copy.deepcopy(data.base), 0)
    wanted = move(start)
    rows = []
    for granularity, scale in itertools.product(("row", "tensor"), ("pow2", "amax")):
        model = copy.deepcopy(start)
        config = falqon_fx.FalqonConfig(granularity=granularity, scale=scale)
        falqon_fx.prepare(model, config, progress=False)
        seconds = export(model) if arguments.time else None
        states = falqon_fx.adapters(model)
        merged = {path: state.dequantize()[: len(wanted[path])] for path, state in states.items()}
        base = {path: state.base() for path, state in states.items()}
        restored = falqon_fx.restore(copy.deepcopy(model))
        plain = falqon_fx.merge_and_unload(model)
        row = {
            "granularity": granularity,
            "scale": scale,
            "cast": error(merged, wanted),
            "merge": error(weights(plain, wanted), merged),
            "restore": error(weights(restored, wanted), base),
            "nll": nll(plain, data) if arguments.nll else None,
            "export_seconds": seconds,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
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
        b.copy_(b.bfloat16())  # as `applied` holds it, so that nothing is pending
        wanted[path] = base + scaling * (b @ a)
    return wanted


def export(model: PeftModel) -> float:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        start = time.perf_counter()
        falqon_fx.save_fp8(model, Path(folder, "out"), progress=False)
        return time.perf_counter() - start


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
