"""Compiled code of the activation cast, for GPUs that need not be here."""

import re
from collections import Counter

import pytest

from falqon_fx.kernels.activation_cast.launch import signatures
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.aot import ARCHITECTURES, compile_ahead
from falqon_fx.kernels.loader import load

CASES = {
    "row": ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="row"),
    "wide row": ActivationCastSpec.for_width(11008, input_dtype="float32", granularity="row"),
    "looped row": ActivationCastSpec.for_width(
        32768, input_dtype="float16", granularity="row", fp8="e5m2", scale="pow2"
    ),
    "narrow row": ActivationCastSpec.for_width(128, input_dtype="bfloat16", granularity="row"),
    "tensor": ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="tensor"),
}


def compile_all(spec, architecture):
    module = load(spec, interpret=False)
    return {
        name: compile_ahead(getattr(module, name), signature, architecture, spec.num_warps)
        for name, signature in signatures(spec).items()
    }


def instructions(ptx, prefix):
    return Counter(re.findall(rf"^\s*(?:@\S+\s+)?({re.escape(prefix)}\S*)", ptx, re.MULTILINE))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_compiles_to_wide_memory_access_and_the_fp8_instruction(spec, architecture):
    per_thread = spec.block_rows * spec.block_width // (32 * spec.num_warps)
    for name, compiled in compile_all(spec, architecture).items():
        ptx = compiled.ptx
        assert compiled.stack_bytes == 0, f"{name} spills"
        assert "local" not in ptx
        loads = instructions(ptx, "ld.global")
        # x: 16 bytes a load. (The partial maxima, 4 KB a program, come as they come.)
        size = 4 if spec.input_dtype == "float32" else 2
        passes = 2 if spec.loop else 1
        assert loads.pop("ld.global.v4.b32") == passes * per_thread * size // 16
        assert set(loads) == ({"ld.global.b32"} if name == "cast_tiles" else set())
        if name == "amax_tiles":
            continue
        casts = instructions(ptx, "cvt.rn.satfinite")
        assert casts == {f"cvt.rn.satfinite.{spec.fp8}x2.f32": per_thread // 2}
        stores = instructions(ptx, "st.global")
        assert stores["st.global.v4.b32"] == per_thread // 16
        assert set(stores) <= {"st.global.v4.b32", "st.global.b32"}  # the latter: the scale
        assert instructions(ptx, "div"), "1 / scale is a division"
        assert set(instructions(ptx, "div.")) <= {"div.rn.f32", "div.s32"}
        assert "ftz" not in ptx, "subnormals are kept"


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_integer_cast_serves_gpus_without_fp8(granularity):
    spec = ActivationCastSpec.for_width(
        4096, input_dtype="bfloat16", granularity=granularity, cast="integer"
    )
    for compiled in compile_all(spec, 80).values():
        assert compiled.stack_bytes == 0
        assert not instructions(compiled.ptx, "cvt.rn.satfinite")
        # A multiplication and an addition joined into one would round once instead of twice.
        assert not instructions(compiled.ptx, "fma")
