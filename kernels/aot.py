"""Ahead-of-time compilation of generated kernels, for GPUs that this machine need not have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (89, 90, 100, 120)  # sm_103 runs the code of sm_100; of sm_121 see `hardware`


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture: its PTX and what the assembler made of it.

    ``stack_bytes`` counts what was spilled from registers, or never fitted there.
    ``tensor_columns`` is what it takes of a sm_100's tensor memory, 0 elsewhere.
    """

    name: str
    architecture: int
    ptx: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_columns: int = 0


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    architecture: int,
    num_warps: int,
    num_stages: int = 3,
) -> CompiledKernel:
    """Compiles ``kernel`` (loaded with ``interpret=False``) for sm_``architecture``.

    ``signature`` gives each argument's Triton type (``"*bf16"``, ``"i32"``); a type that ends in
    ``:16``, the form that Triton uses itself, is a pointer or integer divisible by 16.
    """
    target = GPUTarget("cuda", architecture, 32)
    compiled = _compile(kernel, signature, target, num_warps, num_stages)
    usage = _resource_usage(compiled.asm["cubin"])
    return CompiledKernel(
        name=kernel.__name__,
        architecture=architecture,
        ptx=compiled.asm["ptx"],
        registers=usage["REG"],
        stack_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def compile_for_amd(
    kernel: Any,
    signature: Mapping[str, str],
    architecture: str,
    num_warps: int,
    num_stages: int = 2,
) -> str:
    """The assembly of ``kernel`` for "gfx942", "gfx950" and so on; Triton has AMD's compiler in it.

    Kernels cast to FP8 by ``cast="integer"`` there: the other is written in PTX, at which AMD's
    compiler ends the process. gfx950 multiplies E4M3 and E5M2 as they are; the FP8 formats of
    gfx942 are others ("fnuz"), so that Triton decodes ours to float16 and nothing is gained but
    memory.
    """
    target = GPUTarget("hip", architecture, 64)
    return str(_compile(kernel, signature, target, num_warps, num_stages).asm["amdgcn"])


def _compile(
    kernel: Any, signature: Mapping[str, str], target: GPUTarget, num_warps: int, num_stages: int
) -> Any:
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.endswith(":16")
    }
    return triton.compile(
        ASTSource(fn=kernel, signature=types, attrs=attributes),
        target=target,
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    # The assembler's own log is empty when Triton finds the kernel in its cache; this is not.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
