"""What a report says of several processes: what each would hold, and what a step would move."""

from __future__ import annotations

from dataclasses import dataclass

from falqon_fx.report.checked import Count


@dataclass(frozen=True)
class LayerShards:
    """What the processes of a mesh hold of a layer, or of a module beside the layers; in bytes.

    Attributes:
        unit: the path of the module that FSDP gathers it with, "" for the model itself.
        base, scales, a, b, rest: of the whole: W in FP8, its scales and digest, the adapters,
            biases and all else.
        held: by one process.
        gathered: its part of what one gather gives each process; 0 without FSDP.
        cut: how tensor parallelism cuts W: by "columns", by "rows", or "".
        whole: what each process has all of, and why; "" where nothing is.
    """

    path: str
    unit: str
    base: Count = 0
    scales: Count = 0
    a: Count = 0
    b: Count = 0
    rest: Count = 0
    held: Count = 0
    gathered: Count = 0
    cut: str = ""
    whole: str = ""


@dataclass(frozen=True)
class Unit:
    """A module that FSDP gathers at once; in bytes.

    Attributes:
        gathered: what one gather gives each process, its own part included.
        gathered_before: the same with the base weights as they were before `prepare`.
        gathers: how many of them a step has.
        reduced: what its gradients are when they are added up and scattered.
    """

    path: str
    gathered: Count
    gathered_before: Count
    gathers: Count
    reduced: Count


@dataclass(frozen=True)
class Traffic:
    """What one kind of exchange moves in a step of one process.

    Attributes:
        what: "gathers", "gradients" or "activations".
        collective: "all-gather", "reduce-scatter" or "all-reduce".
        axis: of the mesh.
        bytes: the results of gathers, what goes into reductions.
        bytes_before: the same with the base weights as they were before `prepare`.
        link, source: over which it goes, and where its rate is from; "" where nothing is known.
        seconds, seconds_before: at that rate and no other delay.
    """

    what: str
    collective: str
    axis: str
    bytes: Count
    bytes_before: Count
    link: str = ""
    source: str = ""
    seconds: float | None = None
    seconds_before: float | None = None


@dataclass(frozen=True)
class Mesh:
    """What training on a mesh of processes is planned to hold and to move.

    Attributes:
        axes: processes by "ddp" (copies), "fsdp" (shards) and "tp" (tensor parallel).
        held, held_before: bytes of parameters that a process holds, after `prepare` and before it.
        trained: those of them that train; gradients are as many.
        seconds: predicted for the products of the sites of one process, where a card is known.
        notes: what the plan assumes and what it doesn't know.
    """

    axes: dict[str, Count]
    layers: tuple[LayerShards, ...]
    units: tuple[Unit, ...]
    traffic: tuple[Traffic, ...]
    held: Count
    held_before: Count
    trained: Count
    seconds: float | None = None
    notes: tuple[str, ...] = ()
