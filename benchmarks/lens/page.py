"""Results as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import common

from lens.host import Host
from lens.launches import Launch
from lens.lens import Seen

MIB = 2**20


def summary(seen: Mapping[str, Seen]) -> list[str]:
    """A table of all runs."""
    peft = seen.get("inductor")
    rows = []
    for name, run in seen.items():
        share = f"{run.kept_bytes / peft.kept_bytes:.2f}" if peft else ""
        rows.append(
            (
                name,
                f"{len(run.forward.launches)} + {len(run.backward.launches)}",
                len(run.launches),
                len(run.python_ops),
                run.count("pass"),
                run.count("cast"),
                f"{run.kept_bytes / MIB:.0f}",
                share,
                f"{run.host_us:.0f}",
                f"{sum(t.reads for t in run.launches) / MIB:.0f}",
                f"{sum(t.writes for t in run.launches) / MIB:.0f}",
            )
        )
    header = (
        "run",
        "forward + backward",
        "launches",
        "Python ops",
        "passes",
        "casts",
        "kept, MiB",
        "of PEFT's",
        "host, us a layer",
        "read, MiB",
        "written, MiB",
    )
    return common.markdown_table(header, rows)


def listing(name: str, run: Seen) -> Iterator[str]:
    """All launches of a run, in order."""
    for what, direction in (("forward", run.forward), ("backward", run.backward)):
        yield f"## {name}, {what}: {len(direction.launches)} launches"
        yield ""
        yield (
            f"{direction.inputs} inputs, {direction.static_inputs} static, "
            f"{len(direction.mutated_inputs)} mutated ({len(direction.mutated_not_static)} of them "
            f"not static); against a CUDA graph: {direction.no_cuda_graph or 'nothing'}"
        )
        yield ""
        yield _host(direction.host)
        yield ""
        yield "```"
        yield from _lines(direction.launches)
        yield "```"
        yield ""
    yield f"Kept by {name}: " + ", ".join(
        f"{dtype}{list(shape)} {size / MIB:.1f}" for dtype, shape, size in run.kept
    )
    yield ""


def _host(host: Host) -> str:
    """What the host does around the launches, and what some of it takes."""
    does = ", ".join(f"{count} {part}" for part, count in host.calls.items())
    takes = [f"{us:.0f} us without {part}" for part, us in host.without.items()]
    return f"Host: {does}" + (f"; {host.us:.0f} us, {', '.join(takes)}" if takes else "")


def _lines(launches: Sequence[Launch]) -> Iterator[str]:
    for launch in launches:
        kind = launch.kind.upper() if launch.kind in ("pass", "cast") else ""
        size = f"{launch.reads / MIB:9.2f} -> {launch.writes / MIB:8.2f} MiB"
        yield f"{launch.kernel:90s} {size} {kind}".rstrip()
