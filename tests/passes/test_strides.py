"""Whether O may be a view: what the rest of a graph does with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from falqon_fx.passes.match import match
from falqon_fx.passes.normalize import normalize
from falqon_fx.passes.strides import may_be_strided
from tests.models import LoraLinear
from tests.sites import randn


@torch.library.custom_op("falqon_test::reads_memory", mutates_args=())
def reads_memory(x: Tensor) -> Tensor:
    return x.clone()


@reads_memory.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


READERS = {
    "pointwise": (lambda o: F.silu(o) * o, True),
    "heads": (lambda o: o.view(2, 5, 4, 8).transpose(1, 2) * 1, True),
    "attention": (lambda o: F.scaled_dot_product_attention(*[o.view(2, 5, 4, 8)] * 3), True),
    "chunks": (lambda o: F.silu(o.chunk(2, dim=-1)[0]) * o.chunk(2, dim=-1)[1], True),
    "in place": (lambda o: o.add_(1) * 2, True),
    "next linear": (lambda o: F.linear(o, torch.ones(3, 32)), True),
    "reshape": (lambda o: o.reshape(-1) * 2, True),  # copies where it has to
    "flat view": (lambda o: o.view(-1) * 2, False),
    "flat view of a view": (lambda o: o.view(2, 5, 4, 8).view(2, 160) * 2, False),
    "view behind in place": (lambda o: o.relu_().view(320) * 2, False),
    "flat view of a copy": (lambda o: (o * 2).view(-1), True),
    "output": (lambda o: o, False),
    "view as output": (lambda o: o[..., :4], False),
    "others' kernel": (lambda o: reads_memory(o), False),
    "others' kernel of a view": (lambda o: reads_memory(o.view(10, 32)), False),
    "others' kernel of a copy": (lambda o: reads_memory(o * 2), True),
    "checkpoint": (lambda o: checkpoint(torch.sin, o, use_reentrant=False), False),
}


class Reads(nn.Module):
    def __init__(self, reader) -> None:
        super().__init__()
        self.layer, self.reader = LoraLinear(16, 32, 4), reader

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.layer(x))


@pytest.mark.parametrize("name", READERS)
def test_only_readers_that_take_gaps_between_rows_see_them(name):
    reader, expected = READERS[name]
    found = []

    def look(gm, inputs):
        matches, _ = match(normalize(gm, inputs))
        found.extend(may_be_strided(m.anchor, 4) for m in matches)
        return gm

    torch._dynamo.reset()
    model, x = Reads(reader), randn(2, 5, 16)
    torch.compile(model, backend=look, fullgraph=True)(x)
    assert found == [expected]
    if not expected or name == "in place":
        return
    # And so it is: the reader computes the same from a tensor with gaps.
    o = model.layer(x).detach()
    wide = torch.full((2, 5, 36), torch.nan)
    wide[..., :32] = o
    torch.testing.assert_close(reader(wide[..., :32]), reader(o.clone()), rtol=0, atol=0)
