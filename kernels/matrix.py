"""`make kernels`: every kernel that may run, compiled ahead of time and inspected.

    python -m falqon_fx.kernels.matrix [--accept] [--only TEXT]

Prints registers, spilled bytes, shared memory and tensor-core instructions of each kernel on each
architecture, and fails where compiled code breaks a rule (`problems`) or is worse than in the
committed table, `kernels/compiled.csv`. --accept writes that table anew.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from falqon_fx.config import Granularity
from falqon_fx.kernels.activation_cast import launch as activation_cast
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.aot import ARCHITECTURES, CompiledKernel, compile_ahead
from falqon_fx.kernels.gemm import launch as gemm
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.gemm.tiles import GemmProblem, gemm_specs
from falqon_fx.kernels.grad_b import launch as grad_b_launch
from falqon_fx.kernels.grad_b.spec import GradBSpec
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import Fp8Format, KernelSpec
from falqon_fx.kernels.transpose import kept as stored
from falqon_fx.kernels.transpose import launch as transpose_launch
from falqon_fx.kernels.transpose.spec import StoredSpec, TransposeSpec
from falqon_fx.kernels.update import launch as update
from falqon_fx.kernels.update.spec import UpdateSpec

COMMITTED = Path(__file__).with_name("compiled.csv")
# Shared memory that a program may take, bytes (CUDA C++ Programming Guide, compute capabilities).
_SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_TENSOR_COLUMNS = 512
_FP8_INSTRUCTION = {
    80: r"mma\.sync\S*bf16",
    89: r"mma\.sync\S*e[45]m[23]",
    90: r"wgmma\.mma_async\S*e[45]m[23]",
    100: r"tcgen05\.mma\S*f8f6f4",
    120: r"mma\.sync\S*e[45]m[23]",
}


@dataclass(frozen=True)
class Line:
    """One kernel on one architecture."""

    spec: str
    kernel: str
    architecture: int
    registers: int
    spilled: int
    shared: int
    tensor_columns: int
    matrix_instructions: str
    wide_loads: int
    byte_accesses: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.spec, self.kernel, self.architecture


def matrix() -> list[tuple[KernelSpec, tuple[int, ...]]]:
    """Specs and the architectures that may run them, each spec once."""
    found: dict[KernelSpec, list[int]] = {}
    for architecture in (80, *ARCHITECTURES):
        for problem in _gemm_problems(architecture):
            for product in gemm_specs(problem, architecture):
                found.setdefault(product, []).append(architecture)
    for spec in _others():
        found[spec] = list(ARCHITECTURES)
    for spec in _others():
        found.setdefault(_below_fp8(spec), []).insert(0, 80)
    return [(spec, tuple(dict.fromkeys(where))) for spec, where in found.items()]


def _gemm_problems(architecture: int) -> Iterator[GemmProblem]:
    """Llama's shapes in every form that the plan gives them."""
    site = GemmProblem(
        n=4096,
        k=4096,
        rows=(4096, 64),
        a_pieces=1,
        x="e4m3",
        x_scale="row",
        w_scale="row",
        out_dtype="bfloat16",
        a_dtype="bfloat16",
        one_tensor=True,
    )
    only_a = replace(site, rows=(64,))
    frozen = replace(site, rows=(4096,), a_pieces=0)
    adapted = replace(site, rows=(4096,), a_pieces=0, rank=64)
    grad_x = replace(site, rows=(4096,), a_pieces=0, x="e5m2", w_scale="none")
    yield site
    yield only_a
    yield frozen
    yield adapted
    yield grad_x
    yield replace(grad_x, rank=64)
    if architecture == 80:
        return
    yield replace(site, x_scale="tensor", w_scale="tensor")
    yield replace(grad_x, x_scale="tensor", w_scale="tensor")
    yield replace(adapted, rank=16)
    yield replace(adapted, bias="bfloat16")
    yield replace(site, bias="bfloat16")
    yield replace(site, out_dtype="float16", a_dtype="float32")
    # q, k, v of a grouped-query model and gate, up: weights apart, so pointers.
    yield replace(site, rows=(4096, 1024, 1024, 64, 64, 64), a_pieces=3, one_tensor=False)
    yield replace(adapted, rows=(4096, 1024, 1024), one_tensor=False)
    yield replace(only_a, rows=(64, 64, 64), a_pieces=3, one_tensor=False)
    yield replace(grad_x, rank=192, more_k=(1024, 1024))
    # Some of them frozen: k and v, k alone beside two adapters, all three.
    yield replace(frozen, rows=(1024, 1024), one_tensor=False)
    yield replace(only_a, rows=(64, 64), a_pieces=2, one_tensor=False)
    yield replace(grad_x, rank=64, more_k=(1024, 1024))
    yield replace(grad_x, more_k=(1024, 1024))
    yield replace(site, rows=(11008, 11008, 64, 64), a_pieces=2, one_tensor=False)
    yield replace(adapted, rows=(11008, 11008), one_tensor=False)
    yield replace(grad_x, rank=128, more_k=(11008,))
    yield replace(adapted, rank=128)
    yield replace(adapted, rank=256)
    yield replace(adapted, x_scale="tensor", w_scale="tensor")
    # float16 and float32 models.
    yield replace(adapted, out_dtype="float16", a_dtype="float32")
    yield replace(only_a, out_dtype="float16", a_dtype="float32")
    yield replace(site, out_dtype="float32", a_dtype="float32")
    yield replace(grad_x, out_dtype="float32", a_dtype="float32")
    yield replace(grad_x, out_dtype="float32", a_dtype="float32", more_k=(1024, 1024))
    if architecture == 90:
        yield replace(site, accumulation="promoted")
    if architecture == 100:
        yield replace(grad_x, layout="kn")
        yield replace(grad_x, x="e4m3")


def _below_fp8(spec: KernelSpec) -> KernelSpec:
    """The same for sm_80, which casts by integer steps."""
    if isinstance(spec, UpdateSpec | ActivationCastSpec):
        return replace(spec, cast="integer")
    return spec


def _others() -> Iterator[KernelSpec]:
    yield TransposeSpec()
    yield StoredSpec()
    for rank in (16, 64, 128, 256):
        yield GradBSpec.for_rank(rank, grad_dtype="bfloat16", a_dtype="bfloat16", b_dtype="float32")
    yield GradBSpec.for_rank(64, grad_dtype="float16", a_dtype="float32", b_dtype="float32")
    row = UpdateSpec(
        b_dtype="float32",
        a_dtype="float32",
        applied_dtype="bfloat16",
        base_dtype="none",
        granularity="row",
        scale="pow2",
        rounding="stochastic",
        drop=False,
        cast="hardware",
        rank=64,
        aligned=True,
        base_aligned=False,
        rows=1,
        width=4096,
        loop=False,
        num_warps=8,
    )
    yield row
    pieces = replace(row, rows=4, width=1024, loop=True, num_warps=4)
    yield pieces
    yield replace(pieces, base_dtype="bfloat16", base_aligned=True)
    yield replace(row, b_dtype="bfloat16", a_dtype="bfloat16", rank=16)
    tensor = replace(row, granularity="tensor", scale="amax", rounding="nearest")
    yield replace(tensor, drop=True, applied_dtype="float32")
    for granularity in get_args(Granularity):
        for fp8 in get_args(Fp8Format):
            yield ActivationCastSpec.for_width(
                4096,
                input_dtype="bfloat16",
                fp8=fp8,
                granularity=granularity,
                scale="pow2",
            )


def compile_lines(spec: KernelSpec, architecture: int) -> Iterator[tuple[Line, CompiledKernel]]:
    """Each kernel of ``spec``, compiled for sm_``architecture``."""
    module = load(spec, interpret=False)
    for name, signature in _signatures(spec).items():
        compiled = compile_ahead(
            getattr(module, name),
            signature,
            architecture,
            4 if name in _FOUR_WARPS else int(spec.fields["num_warps"]),
            int(spec.fields.get("num_stages", 3)),
        )
        yield _line(spec, name, compiled), compiled


def _signatures(spec: KernelSpec) -> Mapping[str, Mapping[str, str]]:
    if isinstance(spec, GemmSpec):
        return gemm.signatures(spec)
    if isinstance(spec, UpdateSpec):
        return update.signatures(spec)
    if isinstance(spec, StoredSpec):
        return stored.signatures(spec)
    if isinstance(spec, GradBSpec):
        return grad_b_launch.signatures(spec)
    if isinstance(spec, TransposeSpec):
        return transpose_launch.signatures(spec)
    assert isinstance(spec, ActivationCastSpec)
    return activation_cast.signatures(spec)


def _line(spec: KernelSpec, name: str, compiled: CompiledKernel) -> Line:
    ptx = compiled.ptx
    products = re.findall(
        r"^\s*(?:@\S+\s+)?((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*)", ptx, re.M
    )
    counts = sorted({_short(m): 0 for m in products})
    text = " ".join(f"{c} x{sum(_short(m) == c for m in products)}" for c in counts)
    wide = re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg|cp\.async\.bulk\.tensor", ptx)
    narrow = re.findall(r"(?:ld|st)\.(?:global|shared)\S*\.[bu]8\b", ptx)
    return Line(
        spec.name,
        name,
        compiled.architecture,
        compiled.registers,
        compiled.stack_bytes,
        compiled.shared_bytes,
        compiled.tensor_columns,
        text,
        len(wide),
        len(narrow),
    )


def _short(instruction: str) -> str:
    """``wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3`` → ``wgmma m64n8k32 e4m3 e4m3``."""
    parts = instruction.split(".")
    kind = r"m\d+n\d+k\d+|e[45]m[23]|bf16|tf32|f16|kind::\w+"
    kept = [part for part in parts if re.fullmatch(kind, part)]
    return " ".join([parts[0], *kept])


def problems(spec: KernelSpec, line: Line) -> list[str]:
    """The rules that a kernel's compiled code breaks."""
    found = []
    if line.spilled:
        found.append(f"{line.spilled} bytes spilled")
    if line.shared > _SHARED[line.architecture]:
        found.append(f"{line.shared} bytes of shared memory, the chip has less")
    if line.tensor_columns > _TENSOR_COLUMNS:
        found.append(f"{line.tensor_columns} columns of tensor memory, the chip has less")
    if line.byte_accesses and line.kernel != "refresh":  # columns of bytes, few in a step
        found.append(f"{line.byte_accesses} loads or stores of single bytes")
    if not line.wide_loads and line.kernel not in _NARROW:
        found.append("no 16-byte loads")
    return found


_FOUR_WARPS = {"fingerprint", "score", "select", "add_up"}
# These read addresses and sizes out of a table, or a few numbers a row; 0.2% of a step in all.
_NARROW = {"fingerprint", "score", "select", "cast_tiles", "refresh", "seal"}


def instruction_problems(spec: KernelSpec, line: Line, compiled: CompiledKernel) -> list[str]:
    """Whether a GEMM multiplies with what it is meant to, and is not serialized (sm_90)."""
    if not isinstance(spec, GemmSpec):
        return []
    found = []
    if not re.search(_FP8_INSTRUCTION[line.architecture], compiled.ptx):
        found.append("no FP8 tensor-core instruction")
    if line.architecture == 90 and "serialized" in assembler_log(compiled):
        found.append("wgmma is serialized")
    return found


def assembler_log(compiled: CompiledKernel) -> str:
    """What ptxas says about the PTX; Triton itself drops it, and keeps none with its cache."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.ptx)
        suffix = "a" if compiled.architecture >= 90 else ""
        tool = "ptxas_blackwell" if compiled.architecture >= 100 else "ptxas"
        command = [getattr(triton.knobs.nvidia, tool).path, "-v"]
        command += [f"--gpu-name=sm_{compiled.architecture}{suffix}", str(source)]
        command += ["-o", str(Path(folder, "kernel.cubin"))]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    return run.stdout + run.stderr


def worse(line: Line, before: Line) -> list[str]:
    """What got worse since the committed table."""
    return [
        f"{name} {getattr(before, name)} -> {getattr(line, name)}"
        for name in ("registers", "spilled", "shared", "tensor_columns", "byte_accesses")
        if getattr(line, name) > getattr(before, name)
    ]


def read(path: Path = COMMITTED) -> tuple[str, dict[tuple[str, str, int], Line]]:
    """(Triton version, lines) of a table."""
    if not path.exists():
        return "", {}
    version, *rows = path.read_text().splitlines()
    kinds = {field.name: field.type for field in fields(Line)}
    lines = [
        Line(**{k: int(v) if kinds[k] == "int" else v for k, v in row.items()})  # type: ignore[arg-type]
        for row in csv.DictReader(rows)
    ]
    return version.removeprefix("# Triton "), {line.key: line for line in lines}


def _write(lines: list[Line]) -> None:
    with COMMITTED.open("w", newline="") as stream:
        stream.write(f"# Triton {triton.__version__}\n")
        writer = csv.DictWriter(stream, [field.name for field in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where something is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m falqon_fx.kernels.matrix", description=__doc__)
    parser.add_argument("--accept", action="store_true", help="write the committed table")
    parser.add_argument("--only", default="", help="specs whose name holds this text")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 200)
    version, committed = read()
    comparable = version == triton.__version__
    work = [
        (spec, architecture)
        for spec, where in matrix()
        for architecture in where
        if args.only in spec.name
    ]
    lines, wrong = [], []
    for spec, architecture in track(work, description="compiling", console=console):
        for line, compiled in compile_lines(spec, architecture):
            lines.append(line)
            bad = problems(spec, line) + instruction_problems(spec, line, compiled)
            if comparable and line.key in committed and not args.accept:
                bad += worse(line, committed[line.key])
            wrong += [f"sm_{architecture} {spec.name} {line.kernel}: {text}" for text in bad]
    console.print(_table(lines))
    specs = len({line.spec for line in lines})
    console.print(f"{len(lines)} kernels of {specs} specs, Triton {triton.__version__}")
    if not comparable:
        console.print(f"The committed table is Triton {version or 'none'}'s: not compared.")
    for text in wrong:
        console.print(text, style="red", markup=False)
    if args.accept and not args.only:
        _write(lines)
    return 1 if wrong else 0


def _table(lines: list[Line]) -> Table:
    table = Table(box=None, pad_edge=False)
    for field in fields(Line):
        number: Any = "right" if field.type == "int" else "left"
        table.add_column(field.name.replace("_", " "), justify=number, overflow="fold")
    for line in lines:
        table.add_row(*(str(value) for value in asdict(line).values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
