"""x may be cast before it is gathered: its cast is left as it is by every later one."""

from __future__ import annotations

import torch
from torch import Tensor

from falqon_fx import FalqonConfig
from falqon_fx.ops.gather_tokens import EXACT
from falqon_fx.ops.lowering import cast_fp8
from falqon_fx.site.numerics import E4M3, decode_fp8
from falqon_fx.site.spec import SiteSpec

SPEC = SiteSpec.from_config(FalqonConfig())


def rows() -> Tensor:
    """Tokens of all sizes, with zeros, outliers, and what is subnormal beside them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    x *= torch.exp2(torch.randint(-60, 60, (512, 1), generator=generator).float())
    x[::3] *= torch.exp2(torch.randint(-20, 1, (171, 64), generator=generator).float())
    x[1::7] *= torch.rand(73, 64, generator=generator) < 0.1
    x[5] = 0
    x[6], x[7] = 448.0, 224.0 * (1 + 2**-9)  # amax on the edges of a scale
    return x


def test_a_cast_of_a_cast_is_the_cast():
    for dtype in EXACT:
        first = cast_fp8(rows().to(dtype), E4M3, SPEC, torch.float32, keep=True)
        assert first.code is not None
        read = decode_fp8(first.code.view(torch.uint8), first.scale, dtype)
        again = cast_fp8(read, E4M3, SPEC, torch.float32, keep=True)
        assert torch.equal(read.float(), first.value)
        assert torch.equal(again.value, first.value)
