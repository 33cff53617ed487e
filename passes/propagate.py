"""Fake propagation: the shape, dtype and device of what each node computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from falqon_fx._compat import fake_mode, fake_mode_of
from falqon_fx.errors import FalqonError


def propagate(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
    """Give every node a value, by fake tensors."""

    class Propagation(FakeTensorProp):
        def run_node(self, n: fx.Node) -> Any:
            try:
                return super().run_node(n)
            except RuntimeError as error:
                _check_devices(gm, n, self.fetch_args_kwargs_from_env(n)[0])
                raise error

    mode = fake_mode_of(example_inputs) or fake_mode(allow_non_fake_inputs=True)
    Propagation(gm, mode).propagate(*example_inputs)


def _check_devices(gm: fx.GraphModule, node: fx.Node, args: tuple[Any, ...]) -> None:
    """Why a call failed, if its parameters and inputs lie on several devices."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    inputs = {arg.device for arg in args if isinstance(arg, Tensor)}
    own = {p.device for p in module.parameters()} if module is not None else set()
    if len(inputs | own) > 1:
        devices = ", ".join(sorted(map(str, inputs | own)))
        raise FalqonError(
            str(node.target) if module is not None else node.name,
            f"a parameter is on another device than its input ({devices})",
            "Move the whole model to one device",
        )
