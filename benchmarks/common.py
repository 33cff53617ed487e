"""What the benchmarks share: the examples' code, the machine's description, result files."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "transformers", "peft")

sys.path.insert(0, str(ROOT / "examples"))  # smollm.py and training.py


FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


def machine() -> dict[str, Any]:
    """The CPU, its cores and what makes FP8 or bf16 fast on it."""
    info = _cpuinfo()
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "features": [flag for flag in FEATURES if flag in flags],
        # ATen and oneDNN can be told to do without some of them.
        "told": {name: os.environ[name] for name in LIMITS if name in os.environ},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def _cpuinfo() -> dict[str, str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def versions() -> dict[str, str]:
    """Versions of what was measured, and the commit of this repository."""
    found = {name: _version(name) for name in PACKAGES}
    return {"falqon-fx": _version("falqon-fx"), "commit": _commit(), **found}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """Everything a result needs beside its numbers."""
    told = "".join(f"{name}={value} " for name, value in machine()["told"].items())
    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "command": told + command,
    }


def machine_label() -> str:
    """The machine as a part of a file name, with "avx2" where that is all that its CPU has, or all
    that ATen is told to use.
    """
    found = machine()
    name = re.sub(r"\((r|tm)\)|cpu|processor|@.*", "", found["cpu"].lower())
    alone = {"avx2", "avx512f"} & {*found["features"]} == {"avx2"}
    level = found["told"].get("ATEN_CPU_CAPABILITY", "avx2" if alone else "")
    cpu = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return "-".join(part for part in (cpu, f"{found['cores']}c", level) if part)


def result_path(benchmark: str, suffix: str) -> Path:
    """``results/<benchmark>-<date>-<machine><suffix>``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    return RESULTS / f"{benchmark}-{date}-{machine_label()}{suffix}"


def latest_or_new(benchmark: str) -> Path:
    """The newest JSON result of this machine, or the path of a new one."""
    found = sorted(RESULTS.glob(f"{benchmark}-????-??-??-{machine_label()}.json"))
    return found[-1] if found else result_path(benchmark, ".json")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Any) -> None:
    """Write through a second file, so that an interruption leaves the old content whole."""
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(_finite(content), indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def _finite(value: Any) -> Any:
    """NaN and infinity are no JSON; a diverged run is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per row; the columns are those of the first."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def markdown(
    title: str, about: Mapping[str, Any], header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> str:
    """A result as a page: machine, versions, command, table."""
    cpu = about["machine"]
    lines = [
        f"# {title}",
        "",
        f"- machine: {cpu['cpu']}, {cpu['cores']} cores, {', '.join(cpu['features'])}, "
        f"{cpu['memory_gib']} GiB",
        f"- versions: {', '.join(f'{name} {value}' for name, value in about['versions'].items())}",
        f"- date: {about['date']}",
        f"- command: `{about['command']}`",
        "",
        *markdown_table(header, rows),
        "",
    ]
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
