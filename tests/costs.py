"""What the tests of costs share."""

from __future__ import annotations

from falqon_fx.cost.step.decoder import decoder_of
from falqon_fx.cost.step.figures import figures_for
from falqon_fx.cost.step.layer import Step

SEVEN = decoder_of("llama-7b")
STEP = Step(SEVEN, 1, 4096, 64)
H100 = figures_for("H100")

OURS_WIN = ["own_gemm=1e18", "summed_gemm=1e18"]
