"""What `nll.py` trains: LoRA, falqon, and falqon with other options or another form of the base."""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from torch import nn
from training import PUBLIC_CODE, Variant

import falqon_fx
from falqon_fx.site.spec import SiteSpec

# A short list each, around what measured best before.
RATES = {
    "lora": (5e-4, 1e-3, 2e-3),
    "falqon": (5e-4, 1e-3, 2e-3),
    "falqon_calibrated": (5e-4, 1e-3, 2e-3),
    "lora_frozen_a": (1e-3, 3e-3),
    "falqon_frozen_a": (1e-3, 3e-3),
    "falqon_rows": (1e-3, 3e-3),
    "falqon_public_code": (3e-2, 1e-1),
}
ROWS = {"update": "rows", "pending": "hold"}  # the paper
FP8_ADAPTER, INT8, NVFP4 = {"adapter_dtype": "fp8"}, {"base_dtype": "int8"}, {"base_dtype": "nvfp4"}
AMAX, LEFT = {"scale": "amax"}, {"exclude": "sensitive:8"}
TENSOR = {"granularity": "tensor"}
NUMERIC_OPTIONS = (
    *("update", "adapter_dtype", "frozen", "init", "granularity", "scale", "grad_dtype", "dropout"),
    *("pending", "topk", "rounding"),
)


def known_variants(baseline: str, inner: str) -> dict[str, Variant]:
    """Variants by name; the learning rate is set for each run."""
    options = {} if inner == "inductor" else {"inner": inner}
    runs = (
        Variant("lora", "LoRA", 0.0, baseline),
        Variant("lora_frozen_a", "LoRA, A frozen", 0.0, baseline, train_a=False),
        Variant("falqon", "falqon", 0.0, "falqon", options),
        Variant("falqon_calibrated", "calibrated", 0.0, "falqon", options, calibrated=True),
        *(
            Variant(name, title, 0.0, "falqon", options, calibrated=True, terms=terms)
            for name, title, terms in (
                ("falqon_64_channels", "64 channels", {"outliers": 64}),
                ("falqon_64_of_both", "64 of both", {"compensate": 64, "outliers": 64}),
            )
        ),
        Variant("falqon_8_left", "8 left", 0.0, "falqon", LEFT | options, calibrated=True),
        Variant("falqon_fp8_adapter", "FP8 adapters", 0.0, "falqon", FP8_ADAPTER | options),
        Variant("int8", "INT8", 0.0, "falqon", INT8 | options),
        Variant("int8_calibrated", "INT8", 0.0, "falqon", INT8 | options, calibrated=True),
        Variant("nvfp4", "NVFP4", 0.0, "falqon", NVFP4 | options),
        Variant("nvfp4_calibrated", "NVFP4", 0.0, "falqon", NVFP4 | options, calibrated=True),
        Variant("nvfp4_amax", "NVFP4, amax", 0.0, "falqon", NVFP4 | AMAX | options),
        Variant("fp8_amax", "amax", 0.0, "falqon", AMAX | options),
        Variant("fp8_tensor", "tensor", 0.0, "falqon", TENSOR | options),
        Variant("fp8_blocks", "blocks", 0.0, "falqon", options),
        Variant("fp8_blocks_amax", "blocks, amax", 0.0, "falqon", AMAX | options),
        Variant("fp8_blocks_pow2", "blocks, pow2", 0.0, "falqon", options),
        Variant("qlora_nf4", "QLoRA", 0.0, baseline),
        Variant("falqon_frozen_a", "falqon, A frozen", 0.0, "falqon", options, train_a=False),
        Variant("falqon_rows", "rows (hold)", 0.0, "falqon", ROWS | options, train_a=False),
        Variant(
            "falqon_public_code",
            "public code",
            0.0,
            "falqon",
            PUBLIC_CODE | options,
            train_a=False,
        ),
    )
    return {variant.name: variant for variant in runs}


def extra_variant(text: str, inner: str) -> Variant:
    """``name:key=value,key=value``: falqon with these options of FalqonConfig."""
    name, colon, assignments = text.partition(":")
    if not name or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not name:key=value,key=value")
    options: dict[str, Any] = {} if inner == "inductor" else {"inner": inner}
    for assignment in filter(None, assignments.split(",")):
        key, _, value = assignment.partition("=")
        options[key] = _value(value)
    falqon_fx.FalqonConfig.from_options(options)  # complains now, not after an hour
    return Variant(name, name, 0.0, "falqon", options)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def options_text(variant: Variant) -> str:
    """Every option that changes results, so that a changed default is measured anew."""
    if variant.backend != "falqon":
        return "-"
    config = falqon_fx.FalqonConfig.from_options(variant.options)
    # Results that were kept before there was INT8 name no base_dtype.
    names = (*NUMERIC_OPTIONS, *["base_dtype"] * (config.base_dtype != "fp8"))
    values = {name: getattr(config, name) for name in names}
    values["adapter_dtype"] = SiteSpec.from_config(config).adapter  # "auto" on a CPU
    text = " ".join(f"{name}={value}" for name, value in values.items())
    text += f" exclude={','.join(config.exclude)}" if config.exclude else ""
    text += " calibrated" * variant.calibrated
    return text + "".join(f" {name}={value}" for name, value in variant.terms.items())


@torch.no_grad()
def published(name: str, base: nn.Module) -> nn.Module:
    """What the variant starts from: the base, or a copy whose linear layers' W, but for the head's,
    are what the form holds in which others publish them.
    """
    if not name.startswith(("fp8_blocks", "qlora_nf4")):
        return base
    import forms  # loads torchao and bitsandbytes

    scale = "pow2" if name == "fp8_blocks_pow2" else "amax"
    base = copy.deepcopy(base)
    for layer in forms.layers(base).values():
        w = layer.weight.float()
        layer.weight.copy_(forms.nf4(w) if name == "qlora_nf4" else forms.by_block(w, scale))
    return base
