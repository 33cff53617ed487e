"""Kernels compiled for AMD's GPUs: what gfx950 does natively, and what blocks gfx942."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.aot import compile_for_amd
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.matrix import kernel_of, matrix

NATIVE = r"v_mfma_f32_\w+_f8f6f4"
DECODED = r"v_mfma_f32_\w+_f16"


def variants():
    """Each kernel once: forms of GEMMs that take pointers, and the others, casts by integers."""
    found: dict[Any, Any] = {}
    for spec, _, where in matrix():
        fields = spec.fields
        if fields.get("memory") == "tma" or fields.get("operands") == "bfloat16" or 90 not in where:
            continue
        if fields.get("cast") == "hardware":
            spec = replace(spec, **{"cast": "integer"})
        names = (
            "x",
            "fp8",
            "x_scale",
            "pieces",
            "a_pieces",
            "layout",
            "k_pieces",
            "granularity",
            "rounding",
        )
        form = (spec.template, bool(fields.get("extra")), *(fields.get(name) for name in names))
        found.setdefault(form, spec)
    return list(found.values())


def assemblies(spec, architecture):
    module, kernel = load(spec), kernel_of(spec)
    for name, signature in kernel.signatures(spec).items():
        warps = kernel.warps(spec, name)
        yield compile_for_amd(getattr(module, name), signature, architecture, warps)


def check(spec, architecture):
    for assembly in assemblies(spec, architecture):
        sizes = re.findall(r"(?:vgpr_spill_count|ScratchSize): *(\d+)", assembly)
        assert sizes
        # Decoded operands take registers: on gfx942 dL/dx of siblings spills.
        assert set(sizes) == {"0"} or architecture == "gfx942"
        if isinstance(spec, GemmSpec) and not spec.packed:  # W in NVFP4 is multiplied in 16 bits
            assert bool(re.search(NATIVE, assembly)) == (architecture == "gfx950")
            assert bool(re.search(DECODED, assembly)) == (architecture == "gfx942")


@pytest.mark.parametrize(
    "spec",
    [
        next(s for s in variants() if isinstance(s, GemmSpec)),
        ActivationCastSpec.for_width(
            4096, input_dtype="bfloat16", granularity="row", cast="integer"
        ),
    ],
    ids=lambda spec: spec.template,
)
def test_gfx950_multiplies_fp8_and_spills_nothing(spec):
    check(spec, "gfx950")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gfx950", "gfx942"])
@pytest.mark.parametrize("spec", variants(), ids=lambda spec: spec.name)
def test_every_kernel_compiles(spec, architecture):
    check(spec, architecture)
