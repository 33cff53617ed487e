"""What the ranks and the process that trains alone share: models, batches, the loop, its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import falqon_fx
from falqon_fx import FalqonConfig, RewriteReport, RewriteResult, backend
from tests.models import Stack, fill_b, freeze_a

Groups = Sequence[Sequence[int]]
STEPS = 10
_OF_DDP = ("DistributedDataParallel", "set_runtime_stats_and_log")


def make(config: FalqonConfig, *, prepared: bool, train_a: bool = True, **size: Any) -> Any:
    torch.manual_seed(0)
    model = Stack(**{"blocks": 2, "width": 64, "hidden": 96, "rank": 8, **size})
    fill_b(model)
    if not train_a:
        freeze_a(model)
    if prepared:
        falqon_fx.prepare(model, config, progress=False)
    return model


def compile_blocks(model: Any, config: FalqonConfig, **options: Any) -> Any:
    for block in model.blocks:
        block.compile(backend="falqon", options={"config": config}, **options)
    return model


def compiled(model: nn.Module, config: FalqonConfig) -> Any:
    return torch.compile(model, backend="falqon", options=dict[str, Any](config=config))


@dataclass(frozen=True)
class Run:
    """The loss of each part that this process took, all parameters and the optimizer's tensors,
    whole; the graphs compiled after each step, why graphs broke but for DDP's own calls, and the
    sites and what was rejected in all graphs.
    """

    losses: list[float]
    tensors: dict[str, Tensor]
    graphs: list[int]
    breaks: list[str]
    sites: int
    rejected: list[str]


def train(
    call: Callable[[Tensor], Tensor],
    model: nn.Module,
    groups: Groups,
    *,
    batch: int = 8,
    used: int | None = None,
    steps: int = STEPS,
    before: Callable[[bool], None] = lambda last: None,
) -> Run:
    """Train towards model(x) = x / 2.

    Each batch is cut into parts. ``groups`` has the numbers of those that a rank takes, one after
    another: of one rank, or of all for the process that trains alone. Parts from ``used`` on count
    nothing. ``before`` is told before each part whether it is the last of its rank.
    """
    counters.clear()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator, losses, graphs = torch.Generator().manual_seed(1), [], []
    parts = len(groups[0]) * (len(groups) if len(groups) > 1 else dist.get_world_size())
    with rewritten() as reports:
        for _ in range(steps):
            xs = torch.randn(batch, 64, generator=generator).chunk(parts)
            sums: list[Tensor] = []
            for group in groups:
                for i in group:
                    before(i == group[-1])
                    xs[i].requires_grad_()  # as of a block in the middle: one graph for all
                    loss = (call(xs[i]) - xs[i] / 2).float().square().mean()
                    weight = 1 / (len(group) * len(groups)) if used is None or i < used else 0.0
                    (loss * weight).backward()
                    losses.append(loss.item())
                if len(groups) > 1:
                    grads = [p.grad for p in trained if p.grad is not None]
                    sums = list(map(torch.add, sums, grads)) if sums else grads
                    optimizer.zero_grad()
            for p, total in zip(trained, sums):
                p.grad = total
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(counters["stats"]["unique_graphs"])
    breaks = [why for why in counters["graph_break"] if not any(name in why for name in _OF_DDP)]
    sites = sum(len(report.sites) for report in reports)
    rejected = [str(item) for report in reports for item in report.rejected]
    return Run(losses, _tensors(model, optimizer), graphs, breaks, sites, rejected)


@contextmanager
def rewritten() -> Iterator[list[RewriteReport]]:
    """The report of each graph that the backend rewrites meanwhile."""
    reports: list[RewriteReport] = []
    rewrite = backend.rewrite

    def noting(*args: Any, **options: Any) -> RewriteResult:
        result = rewrite(*args, **options)
        reports.append(result.report)
        return result

    with mock.patch.object(backend, "rewrite", noting):
        yield reports


def alone(model: nn.Module, call: Any, ranks: int, each: int = 1, **options: Any) -> Run | None:
    """The run of one process that accumulates what each of the ``ranks`` would compute from
    ``each`` parts; on rank 0 alone.
    """
    if dist.get_rank():
        return None
    torch._dynamo.reset()
    groups = [range(rank * each, (rank + 1) * each) for rank in range(ranks)]
    return train(call, model, groups, **options)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "").removeprefix("module.")
        found[name] = whole(parameter)
        for key, state in optimizer.state.get(parameter, {}).items():
            found[f"{name}:{key}"] = whole(state)
    return found


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def differences(run: Run, expected: Run | None, each: int = 1) -> list[str]:
    """What rank 0 has otherwise than the process alone, bit for bit."""
    if expected is None:
        return []
    stride = len(expected.losses) // len(run.losses) * each
    losses = [
        expected.losses[i + j] for i in range(0, len(expected.losses), stride) for j in range(each)
    ]
    found = [] if run.losses == losses else ["losses"]
    if run.tensors.keys() != expected.tensors.keys():
        return [*found, *(run.tensors.keys() ^ expected.tensors.keys())]
    return found + [
        name for name, value in run.tensors.items() if not _same(value, expected.tensors[name])
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def compared(run: Run, expected: Run | None, each: int = 1) -> dict[str, Any]:
    return {
        "differs": differences(run, expected, each),
        "graphs": run.graphs[-1] - run.graphs[1],  # after step 2
        "breaks": run.breaks,
        "sites": run.sites,
        "rejected": run.rejected,
    }


def shard(model: Any, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)
