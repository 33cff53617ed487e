"""What AOTAutograd's partitioner keeps of W for backward: its FP8 form alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from falqon_fx import FalqonConfig, rewrite
from falqon_fx._compat import native_bf16
from falqon_fx.ops.decompositions import decompositions
from falqon_fx.passes.recompute_weights import recompute_weights
from tests.parameters import each_pair
from tests.sites import randn
from tests.spellings import HandWritten, Spelling

OUT, FEATURES, RANK = 48, 32, 4
WIDE = (OUT * FEATURES, (OUT + RANK) * FEATURES)
UPDATES = {"adapter": {}, "rows": {"update": "rows", "topk": 2}}


@dataclass
class Partitioned:
    """A backend: the passes, AOTAutograd with the ops opened as for a GPU or opaque as on a CPU,
    and the joint pass before the partitioner if asked.
    """

    mark: bool = True
    opened: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    joint: fx.Graph | None = None
    kept: list[Tensor] = field(default_factory=list)  # for backward, fake

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        result = rewrite(gm, inputs, FalqonConfig(**self.options))
        compiled = aot_function(
            result.gm.forward,
            fw_compiler=lambda gm, _: make_boxed_func(gm),
            bw_compiler=self.backward,
            partition_fn=self.partition,
            decompositions=decompositions() if self.opened else {},
        )
        return lambda *args: compiled(*result.bind(args))

    def partition(self, gm: fx.GraphModule, args: Any, **kwargs: Any) -> Any:
        if self.mark:
            recompute_weights(gm.graph)
        self.joint = gm.graph
        return min_cut_rematerialization_partition(gm, args, **kwargs)

    def backward(self, gm: fx.GraphModule, _: Sequence[Any]) -> Any:
        self.kept = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
        return make_boxed_func(gm)

    def train(self) -> tuple[Any, Any]:
        """dL/dx and dL/dB of a site with few tokens: W looks dear to make and cheap to keep."""
        model = HandWritten(Spelling(out=OUT, features=FEATURES, rank=RANK, dtype=torch.bfloat16))
        model.lora_a.requires_grad_(self.options.get("update") != "rows")
        x = randn(3, FEATURES).bfloat16().requires_grad_()
        torch._dynamo.reset()
        torch.compile(model, backend=self)(x).float().sum().backward()
        return x.grad, model.lora_b.weight.grad


@each_pair(opened=[False, True], mark=[False, True], granularity=["tensor", "row"], update=UPDATES)
def test_w_is_kept_for_backward_as_fp8_alone(update, granularity, mark, opened):
    backend = Partitioned(mark, opened, {"granularity": granularity, **update})
    backend.train()
    kept = [(t.dtype, t.numel()) for t in backend.kept]
    small = {t.dtype for t in backend.kept if t.numel() == 3 * RANK}
    assert small  # O_A: its GEMM does not run again
    wide = {dtype for dtype, size in kept if size in WIDE}
    if mark or not opened:
        assert wide == {torch.float8_e4m3fn}
    elif native_bf16():  # a decoded W looks dear to make and cheap to keep; less so in float32
        assert wide == {torch.bfloat16}


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_what_is_made_from_a_written_weight_is_marked_and_nothing_else(granularity):
    backend = Partitioned(options={"granularity": granularity, **UPDATES["rows"]})
    backend.train()
    assert backend.joint is not None
    nodes = list(backend.joint.nodes)
    (update,) = (n for n in nodes if n.args[:1] == (torch.ops.falqon.proxy_update_.default,))
    weight = next(n for n in update.users if n.meta["val"].dtype == torch.float8_e4m3fn)
    marked = [n for n in nodes if n.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE]
    made: set[fx.Node] = set()  # all that is made from the weight, up to the products
    for node in nodes:
        from_weight = weight in node.all_input_nodes or made & set(node.all_input_nodes)
        is_product = str(node.target) in ("aten.mm.default", "aten.addmm.default")
        if from_weight and node.op == "call_function" and not is_product:
            made.add(node)
    assert set(marked) == made
    assert made


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_marking_changes_no_value(update):
    plain, marked = (Partitioned(mark, options=update).train() for mark in (False, True))
    for left, right in zip(plain, marked, strict=True):
        assert torch.equal(left, right)
