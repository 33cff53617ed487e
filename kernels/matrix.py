"""`make kernels`: every kernel that may run, compiled ahead of time and inspected.

    python -m falqon_fx.kernels.matrix [--accept] [--only TEXT]

Prints registers, spilled bytes, shared memory and tensor-core instructions of each kernel on each
architecture, and fails where compiled code breaks a rule (`problems`) or is worse than in the
committed table, `kernels/compiled.csv`. --accept writes what was compiled into that table.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from falqon_fx.kernels.activation_cast import examples as activation_cast
from falqon_fx.kernels.adapter_cast import examples as adapter_cast
from falqon_fx.kernels.adapter_fp8 import examples as adapter_fp8
from falqon_fx.kernels.adapter_grads import examples as adapter_grads
from falqon_fx.kernels.aot import ARCHITECTURES, CompiledKernel, compile_ahead
from falqon_fx.kernels.gemm import examples as gemm
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.grad_out_a import examples as grad_out_a
from falqon_fx.kernels.grouped_gemm import examples as grouped_gemm
from falqon_fx.kernels.grouped_outer import examples as grouped_outer
from falqon_fx.kernels.hardware import FP8
from falqon_fx.kernels.kernel import Kernel
from falqon_fx.kernels.loader import load
from falqon_fx.kernels.spec import KernelSpec, Sizes
from falqon_fx.kernels.tails import examples as tails
from falqon_fx.kernels.transpose import examples as transpose
from falqon_fx.kernels.update import examples as update

KERNELS: tuple[Kernel[Any], ...] = (
    gemm.KERNEL,
    transpose.KERNEL,
    transpose.STORED,
    adapter_grads.KERNEL,
    grad_out_a.KERNEL,
    grouped_gemm.KERNEL,
    grouped_outer.KERNEL,
    adapter_cast.KERNEL,
    adapter_fp8.KERNEL,
    tails.KERNEL,
    update.KERNEL,
    activation_cast.KERNEL,
)
COMMITTED = Path(__file__).with_name("compiled.csv")
# Shared memory that a program may take, bytes (CUDA C++ Programming Guide, compute capabilities).
_SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_TENSOR_COLUMNS = 512
_WITHOUT_FP8 = 12  # kernels of each kind that are compiled for GPUs without FP8, which take others
_FP8_INSTRUCTION = {
    80: r"mma\.sync\S*bf16",
    89: r"mma\.sync\S*e[45]m[23]",
    90: r"wgmma\.mma_async\S*e[45]m[23]",
    100: r"tcgen05\.mma\S*f8f6f4",
    120: r"mma\.sync\S*mxf8f6f4\.block_scale\S*e[45]m[23]",
}
_INT8_INSTRUCTION = r"mma\.sync\S*s32\.s8\.s8\.s32"
_FLOAT16_INSTRUCTION = r"(mma\.sync|wgmma)\S*f32\.f16\.f16|tcgen05\.mma\S*kind::f16"


@dataclass(frozen=True)
class Line:
    """One kernel on one architecture."""

    spec: str
    sizes: str
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
    def key(self) -> tuple[str, str, str, int]:
        return self.spec, self.sizes, self.kernel, self.architecture


def matrix() -> list[tuple[KernelSpec, Sizes, tuple[int, ...]]]:
    """Specs, sizes, and the architectures that may run them, each pair once."""
    found: dict[tuple[KernelSpec, Sizes], list[int]] = {}
    for kernel in KERNELS:
        for architecture in (80, *ARCHITECTURES):
            most = None if architecture >= FP8 else _WITHOUT_FP8
            for pair in islice(kernel.ahead(architecture), most):
                found.setdefault(pair, []).append(architecture)
    return [(*pair, tuple(dict.fromkeys(where))) for pair, where in found.items()]


def kernel_of(spec: KernelSpec) -> Kernel[Any]:
    """What the folder of a spec says of it."""
    (kernel,) = (kernel for kernel in KERNELS if type(spec) is kernel.spec)
    return kernel


def compile_lines(
    spec: KernelSpec, architecture: int, sizes: Sizes = "aligned"
) -> Iterator[tuple[Line, CompiledKernel]]:
    """Each kernel of ``spec``, compiled for sm_``architecture`` and such sizes."""
    module, kernel = load(spec, interpret=False), kernel_of(spec)
    for name, signature in kernel.types(spec, sizes).items():
        compiled = compile_ahead(
            getattr(module, name),
            signature,
            architecture,
            kernel.warps(spec, name),
            int(spec.fields.get("num_stages", 3)),
        )
        yield _line(spec, sizes, name, compiled), compiled


def _line(spec: KernelSpec, sizes: Sizes, name: str, compiled: CompiledKernel) -> Line:
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
        sizes,
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
    kind = r"m\d+n\d+k\d+|e[45]m[23]|bf16|tf32|f16|s8|kind::\w+"
    kept = [part for part in parts if re.fullmatch(kind, part)]
    return " ".join([parts[0], *kept])


def problems(spec: KernelSpec, line: Line) -> list[str]:
    """The rules that a kernel's compiled code breaks."""
    kernel, found = kernel_of(spec), []
    if line.spilled:
        found.append(f"{line.spilled} bytes spilled")
    if line.shared > _SHARED[line.architecture]:
        found.append(f"{line.shared} bytes of shared memory, the chip has less")
    if line.tensor_columns > _TENSOR_COLUMNS:
        found.append(f"{line.tensor_columns} columns of tensor memory, the chip has less")
    if line.byte_accesses and line.kernel not in kernel.bytewise:
        found.append(f"{line.byte_accesses} loads or stores of single bytes")
    if not line.wide_loads and line.kernel not in kernel.narrow:
        found.append("no 16-byte loads")
    return found


def instruction_problems(spec: KernelSpec, line: Line, compiled: CompiledKernel) -> list[str]:
    """Whether a GEMM multiplies with what it is meant to, and is not serialized (sm_90)."""
    if not isinstance(spec, GemmSpec):
        return []
    found = []
    kind, wanted = "FP8", _FP8_INSTRUCTION[line.architecture]
    if spec.x == "int8":
        kind, wanted = "INT8", _INT8_INSTRUCTION
    elif spec.operands == "float16":
        kind, wanted = "float16", _FLOAT16_INSTRUCTION
    if not re.search(wanted, compiled.ptx):
        found.append(f"no {kind} tensor-core instruction")
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


def read(path: Path = COMMITTED) -> tuple[str, dict[tuple[str, str, str, int], Line]]:
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


def _write(lines: Iterable[Line]) -> None:
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
    version, committed = read(COMMITTED)
    comparable = version == triton.__version__
    if args.accept and args.only and not comparable:
        parser.error(f"the table is of Triton {version or 'none'}: accept it as a whole")
    work = [
        (spec, sizes, architecture)
        for spec, sizes, where in matrix()
        for architecture in where
        if args.only in spec.name
    ]
    lines, wrong = [], []
    for spec, sizes, architecture in track(work, description="compiling", console=console):
        for line, compiled in compile_lines(spec, architecture, sizes):
            lines.append(line)
            bad = problems(spec, line) + instruction_problems(spec, line, compiled)
            if comparable and line.key in committed and not args.accept:
                bad += worse(line, committed[line.key])
            wrong += [
                f"sm_{architecture} {spec.name} {sizes} {line.kernel}: {text}" for text in bad
            ]
    console.print(_table(lines))
    specs = len({line.spec for line in lines})
    console.print(f"{len(lines)} kernels of {specs} specs, Triton {triton.__version__}")
    if not comparable:
        console.print(f"The committed table is Triton {version or 'none'}'s: not compared.")
    for text in wrong:
        console.print(text, style="red", markup=False)
    if args.accept:
        wanted = {(spec.name, sizes, on) for spec, sizes, where in matrix() for on in where}
        table = (committed if comparable else {}) | {line.key: line for line in lines}
        kept = {line: (line.spec, line.sizes, line.architecture) for line in table.values()}
        _write(line for line, place in kept.items() if place in wanted)
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
