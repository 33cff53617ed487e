"""`explain`: what the backend would rewrite in a model and why not, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from falqon_fx._compat import fake_mode, tree_map
from falqon_fx.backend import rewrite
from falqon_fx.config import FalqonConfig
from falqon_fx.prepare import unwrap
from falqon_fx.report import GraphReport, RewriteReport


def explain(
    model: nn.Module, *args: Any, config: FalqonConfig | None = None, **kwargs: Any
) -> RewriteReport:
    """What ``torch.compile(model, backend="falqon")`` would do with this call; compiles nothing.

    The model runs through Dynamo and the passes on fake tensors: no parameter, buffer or random
    state changes, and no memory for activations is needed.

    Raises:
        FalqonError: what compiling would raise.
    """
    inner = unwrap(model)
    config = config or FalqonConfig()
    graphs: list[GraphReport] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.extend(rewrite(gm, example_inputs, config).report.graphs)
        return gm.forward

    with fake_mode() as mode:

        def fake(value: Any) -> Any:
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        tensors = {name: fake(t) for name, t in _tensors(inner)}
        args, kwargs = tree_map(fake, (args, kwargs))

        def call() -> Any:
            return torch.func.functional_call(inner, tensors, args, kwargs)

        torch.compile(call, backend=look)()
    return RewriteReport(tuple(graphs))


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]
