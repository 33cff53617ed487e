"""The data of a report: what the passes did to each graph, and what `falqon_fx.watch` saw."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import ClassVar

from falqon_fx.errors import printable
from falqon_fx.report.checked import Count, Seconds, Size
from falqon_fx.report.mesh import Mesh
from falqon_fx.site.spec import parse_spec


@dataclass(frozen=True)
class Source:
    """A line of the user's code: the innermost frame outside torch and PEFT."""

    file: str
    line: Count
    function: str
    code: str

    def __str__(self) -> str:
        return printable(f"{self.file}:{self.line}, in {self.function}: {self.code}")


@dataclass(frozen=True)
class Memory:
    """Bytes that a site keeps between steps; A and B are the same before and after.

    Attributes:
        base: the base weight; ``prepare`` frees it, else it stays beside the state.
        state: W in FP8 with its scales; with update="rows" all of W' and what belongs to it.
        adapter: A and B.
        turned: Wᵀ in FP8, where it is kept for dL/dx.
        joined: W in FP8 with room for an adapter, where it is kept for O.
    """

    base: Count
    state: Count
    adapter: Count
    turned: Count = 0
    joined: Count = 0

    @property
    def before(self) -> int:
        return self.base + self.adapter

    @property
    def after(self) -> int:
        """Bytes with ``prepare``; without it, ``base`` comes on top."""
        return self.state + self.turned + self.joined + self.adapter


@dataclass(frozen=True)
class Cost:
    """A prediction of `falqon_fx.cost.model` for one site and step: forward, backward, update.

    Attributes:
        variant: what runs afterwards: "merged" on FP8 matrix units, else "emulated".
        tokens: what the two times, the FLOPs and the bytes moved hold for.
        break_even: tokens from which on the rewrite is never slower; None if it stays slower.
        speedup: time before / time after by number of tokens.
    """

    card: str
    variant: str
    tokens: Count
    seconds_before: Seconds
    seconds_after: Seconds
    flops_before: Count
    flops_after: Count
    moved_before: Count
    moved_after: Count
    break_even: Count | None
    speedup: dict[int, float]

    @property
    def gain(self) -> float:
        """Time before / time after at ``tokens``."""
        return self.seconds_before / self.seconds_after


@dataclass(frozen=True)
class Site:
    """One subgraph that was rewritten: a linear layer with its adapters, or a frozen one alone.

    Attributes:
        adapters: how many are active on it, 0 for a frozen layer alone. ``rank`` is the sum of
            theirs, ``scaling`` the first's and ``dropout`` the largest.
        experts: how many stacked weights [out_features, in_features] it has, each with adapters
            of ``rank``; 0 for a linear layer.
        gathered: rows of x that a stack of experts reads by an index in this call, one for each
            product with an expert; 0 where it reads each row of x once.
        compensate, outliers: the rank that stands for W's cast error, and the channels of x whose
            cast error is added back, where `prepare` had a calibration.
        train_a, train_b: whether any A, any B gets a gradient. W never does.
        spec: the options in force, as the op in the graph carries them.
        x_shape: of the input, symbols by Dynamo's names; ``tokens`` is the product of all but the
            last, ``tokens_hint`` its value in this call.
        group: sites of a graph with equal numbers are siblings: one op computes them.
        device: of the input: "cpu", "cuda", "meta".
        architecture: 90 for sm_90 and so on; 0 where no FP8 kernel runs.
        nodes: names of the nodes that the rewrite replaced.
    """

    path: str
    out_features: Size
    in_features: Size
    rank: Count
    scaling: float
    dropout: float
    out_dtype: str
    spec: str
    source: Source | None = None
    x_shape: tuple[str, ...] = ()
    tokens: str = ""
    tokens_hint: Count = 0
    x_dtype: str = ""
    base_dtype: str = ""
    adapter_dtype: str = ""
    adapters: Count = 1
    experts: Count = 0
    gathered: Count = 0
    compensate: Count = 0
    outliers: Count = 0
    prepared: bool = False
    train_a: bool = False
    train_b: bool = False
    group: Count = 0
    device: str = ""
    architecture: Count = 0
    kernel: str = ""
    kernel_reason: str = ""
    memory: Memory | None = None
    cost: Cost | None = None
    nodes: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, str]:
        """The options in force at this site, by the names of `falqon_fx.FalqonConfig`. Those of
        update="rows" are in `RewriteReport.options`.
        """
        values = asdict(parse_spec(self.spec))
        return {_OPTIONS.get(name, name): str(value) for name, value in values.items()}

    @property
    def trains(self) -> str:
        """What of its adapters gets a gradient: "A, B", "A", "B" or ""."""
        return ", ".join(["A"] * self.train_a + ["B"] * self.train_b)


# a field of SiteSpec -> the option
_OPTIONS = {"grad": "grad_dtype", "adapter": "adapter_dtype", "base": "base_dtype"}


@dataclass(frozen=True)
class Rejected:
    """One subgraph, LoRA-like or a frozen linear layer, that was left exactly as it was."""

    site: str
    reason: str
    remedy: str
    source: Source | None = None

    def __str__(self) -> str:
        return printable(f"{self.site}: {self.reason}. {self.remedy}.")


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph where it did, and at which line of the user's."""

    reason: str
    source: Source | None


@dataclass(frozen=True)
class Line:
    """One node of a graph as text; ``node`` is its name, the same before and after."""

    node: str
    text: str
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Audit:
    """What one write-back did at one site (see `falqon_fx.watch`).

    Norms are Frobenius norms over the rows that were written.

    Attributes:
        step: the site's number of optimizer steps so far.
        asked: |scaling · ΔB · Â|, what the optimizer wanted of W.
        kept: |ΔW|, what the FP8 weight really changed by.
        lost: |asked - kept| as matrices: what rounding and clamping took or added.
        clamped: elements beyond the row's FP8 range.
        pending: Σ|B - applied| over all rows after the write.
        saturated, underflowed: share of written elements at ±448, and of those not 0 that
            became 0.
        rows: indices of the rows written.
        drift: the error of the whole FP8 weight relative to that of its first cast
            (`falqon_fx.rows.drift`); None where rows are cast from the base weight.
    """

    site: str
    step: int
    asked: float
    kept: float
    lost: float
    clamped: int
    pending: float
    saturated: float
    underflowed: float
    out: int
    rows: tuple[int, ...]
    drift: float | None = None


@dataclass(frozen=True)
class CastAudit:
    """What the casts of one site's adapters took after one optimizer step (see `falqon_fx.watch`).

    Attributes:
        step: optimizer steps since watching began.
        lost_a: |dq(Â) - A| / |A| in Frobenius norms, the error of A in FP8.
        lost_b: the same of s·B, in bfloat16, float32 or, with adapter_dtype="fp8", FP8.
        share: |s·B·A| / |W|, how large what was learned is beside the base weight; None for
            stacked experts.
        saturated: elements that adapter_dtype="fp8" has clamped since the start; 0 with
            "bfloat16".
    """

    site: str
    step: int
    lost_a: float
    lost_b: float
    share: float | None
    saturated: int


@dataclass(frozen=True)
class Note:
    """What a pass has to say of one site."""

    site: str
    text: str

    def __str__(self) -> str:
        return printable(f"{self.site}: {self.text}.")


@dataclass(frozen=True)
class CopyOfW:
    """Whether a copy of W of a graph's sites is kept beside W, of ``size`` bytes, on a GPU."""

    kept: bool
    size: Count
    why: str
    how: ClassVar[str]  # it is kept

    def __str__(self) -> str:
        size = f"{self.size / 2**20:.4g} MiB"
        if self.kept:
            return printable(f"W kept {self.how}: {size} more, because {self.why}.")
        return printable(f"W not kept {self.how}, which is {size}: {self.why}.")


@dataclass(frozen=True)
class Transposes(CopyOfW):
    """Wᵀ, for dL/dx."""

    how = "transposed"


@dataclass(frozen=True)
class WithRoom(CopyOfW):
    """W with room behind it for adapters in FP8, for the library's products."""

    how = "with room for adapters"


@dataclass(frozen=True)
class GraphReport:
    """One graph that went through the passes.

    Attributes:
        left: frozen linear layers that stay as they are: heads, routers, small ones.
        notes: what passes say of single sites.
        transposes: whether Wᵀ is kept; None where no FP8 product needs it.
        with_room: whether W is kept with room for adapters; None where no product wants it so.
        ended_by: the graph break behind it, None where the function simply returned.
        before, after: the graph as text (`explain` alone fills them in).
    """

    sites: tuple[Site, ...]
    rejected: tuple[Rejected, ...]
    nodes_before: Count
    nodes_after: Count
    left: tuple[Rejected, ...] = ()
    notes: tuple[Note, ...] = ()
    transposes: Transposes | None = None
    with_room: WithRoom | None = None
    pass_seconds: dict[str, float] = field(default_factory=dict)
    ended_by: GraphBreak | None = None
    before: tuple[Line, ...] = ()
    after: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Graphs:
    """All graphs of a compilation, as `falqon_fx.RewriteReport` describes them."""

    graphs: tuple[GraphReport, ...]
    options: dict[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    mesh: Mesh | None = None
    sensitivity: dict[str, float] = field(default_factory=dict)

    def most_sensitive(self, count: int) -> tuple[str, ...]:
        """The ``count`` sites whose casts cost most, for ``exclude``."""
        return tuple(sorted(self.sensitivity, key=lambda site: -self.sensitivity[site])[:count])

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for graph in self.graphs for site in graph.sites)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return tuple(item for graph in self.graphs for item in graph.rejected)

    @property
    def left(self) -> tuple[Rejected, ...]:
        return tuple(item for graph in self.graphs for item in graph.left)

    @property
    def title(self) -> str:
        """How many layers were rewritten, rejected and left: one that stands twice in the latter
        lists counts once.
        """
        adapted = sum(site.adapters > 0 for site in self.sites)
        rejected, left = (
            len({item.site for item in items}) for items in (self.rejected, self.left)
        )
        rewritten = f"{sites_text(len(self.sites))} rewritten ({adapted} with an adapter)"
        return f"{rewritten}, {rejected} rejected, {left} left"


def sites_text(count: int) -> str:
    """A number of sites in words."""
    return "1 site" if count == 1 else f"{count} sites"
