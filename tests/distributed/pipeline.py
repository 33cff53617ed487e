"""Pipeline parallelism: two stages, 1F1B, against one process that accumulates the micro-batches.

In the exact numbers of `tests.distributed.tensor_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import falqon_fx
from falqon_fx import FalqonConfig
from tests.distributed.tensor_parallel import WIDTH, compiled, integers, trained
from tests.models import Relu

PARTS = 4


def stage(index: int, config: FalqonConfig) -> nn.Module:
    model = Relu(WIDTH, WIDTH)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(integers(tuple(parameter.shape), 1, 10 * index + seed))
    falqon_fx.prepare(model, config, progress=False)
    return model


def differs(config: FalqonConfig) -> list[str]:
    """What isn't, bit for bit, as in one process: the losses, dL/dA and dL/dB of this stage."""
    rank = dist.get_rank()
    x, weight = integers((8, WIDTH), 1, 100), integers((8, WIDTH), 1, 101)

    def loss_of(y: Tensor, weight: Tensor) -> Tensor:
        return (y * weight).sum()

    torch._dynamo.reset()
    models = [stage(index, config) for index in range(2)]
    calls = [compiled(model, config) for model in models]
    losses = []
    for part, own in zip(x.chunk(PARTS), weight.chunk(PARTS), strict=True):
        loss = loss_of(calls[1](calls[0](part)), own)
        loss.backward()
        losses.append(loss.detach())

    torch._dynamo.reset()
    mine = stage(rank, config)
    size = (len(x) // PARTS, WIDTH)
    one = PipelineStage(
        compiled(mine, config),
        rank,
        2,
        torch.device("cpu"),
        input_args=(torch.zeros(size, requires_grad=rank > 0),),
        output_args=(torch.zeros(size, requires_grad=True),),
    )
    schedule = Schedule1F1B(one, PARTS, loss_fn=loss_of, scale_grads=False)
    found: list[Any] = []
    if rank == 0:
        schedule.step(x)
    else:
        schedule.step(target=weight, losses=found)
    wrong = [n for (n, p), (_, q) in zip(trained(mine), trained(models[rank])) if differ(p, q)]
    same = rank == 0 or torch.equal(torch.stack(found).detach(), torch.stack(losses))
    return wrong + ([] if same else ["losses"])


def differ(p: Any, q: Any) -> bool:
    return not torch.equal(p.grad, q.grad)
