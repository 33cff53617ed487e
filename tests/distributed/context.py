"""Context parallelism: each process has a part of the tokens; attention gathers keys and values.

In the exact numbers of `tests.distributed.tensor_parallel`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from falqon_fx import FalqonConfig
from tests.distributed.tensor_parallel import WIDTH, compiled, gather, integers, mesh, trained
from tests.models import LoraLinear


class Attention(nn.Module):
    """Attention by zeros and ones; q and k join the sum, so that all four layers get gradients."""

    def __init__(self, over: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (LoraLinear(WIDTH, WIDTH) for _ in range(4))
        self.over = over

    def everywhere(self, part: Tensor) -> Tensor:
        """All tokens' keys or values; their gradient is what all processes find."""
        if self.over is None:
            return part
        cut = DTensor.from_local(part, self.over, (Shard(1),), run_check=False)
        all_of = cut.redistribute(placements=(Replicate(),))
        result: Tensor = all_of.to_local(grad_placements=(Partial(),))
        return result

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = (q.detach() @ self.everywhere(k.detach()).mT > 0).to(v.dtype)
        result: Tensor = self.o(scores @ self.everywhere(v) + q + k)
        return result


def differs(config: FalqonConfig) -> list[str]:
    """What isn't, bit for bit, as in one process: y, dL/dx and dL/dA, dL/dB of all layers."""
    found = []
    for over in (None, mesh()):
        torch._dynamo.reset()
        model = Attention(over)
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                parameter.copy_(integers(tuple(parameter.shape), 1, seed))
        x, weight = integers((2, 8, WIDTH), 1, 100), integers((2, 8, WIDTH), 1, 101)
        if over is not None:
            x, weight = (t.chunk(dist.get_world_size(), 1)[dist.get_rank()] for t in (x, weight))
        x = x.clone().requires_grad_()
        graphs: list[Any] = []
        y = compiled(model, config, graphs)(x)
        (y * weight).sum().backward()
        assert [len(graph.report.sites) for graph in graphs] == [4]
        assert x.grad is not None
        named = {"y": y.detach(), "x.grad": x.grad}
        grads = {name: p.grad for name, p in trained(model)}
        if over is not None:
            named = {name: gather(tensor, 1) for name, tensor in named.items()}
            for grad in grads.values():  # as DDP or FSDP over the mesh of context parallelism does
                dist.all_reduce(grad)
        found.append({**named, **grads})
    one, cut = found
    return [name for name, tensor in one.items() if not torch.equal(tensor, cut[name])]
