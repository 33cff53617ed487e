"""PEFT's adapters of stacked experts, as code that compiles into one graph. Imports PEFT: whoever
needs it imports this when it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from falqon_fx._compat import is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.model.stacks import (
    forget_properties,
    prepared_stack,
    properties,
    read_as_property,
    slot,
)
from falqon_fx.site.paths import stack_path
from falqon_fx.site.sharded import held_by_fsdp

_FP8 = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}


def trace_param_wrappers(model: nn.Module) -> list[str]:
    """Let what PEFT's ``ParamWrapper`` adapts, stacked experts above all, compile into one graph,
    under any backend.

    A ``ParamWrapper`` registers a parametrization in each forward pass and takes it off again. That
    breaks the graph several times a layer and compiles code anew in each step, until Dynamo's
    limit of 8 (https://github.com/huggingface/peft/pull/3304). After this call the parameter is a
    property of its module, which gives W + s·B·A while the wrapper runs it and W at any other
    time: the same numbers bit for bit, and no new names in ``state_dict``.

    Call it before the first step; a second call finds what is new. It changes the class of each
    wrapper and of the module inside, on this model and its copies alone; `untrace_param_wrappers`
    gives both back.

    Returns:
        The paths of the wrappers; none where PEFT adapts layers only.

    Raises:
        FalqonError: other processes hold parts of what is adapted, by tensor or expert parallelism.
    """
    found: list[str] = []
    every = [(p, m) for p, m in model.named_modules() if isinstance(m, ParamWrapper)]
    _refuse_spread(every, held_by_fsdp(model))
    for path, module in every:
        if not _can_trace(module):
            continue
        base, name = module.get_base_layer(), module.parameter_name
        read_as_property(base, name)
        setattr(base, slot(name), None)
        module.__class__ = TracedParamWrapper
        found.append(path)
    return found


def untrace_param_wrappers(model: nn.Module) -> None:
    """Give all that `trace_param_wrappers` changed its own class again.

    PEFT's own code can't run a stack that `falqon_fx.prepare` has put in FP8: call
    `falqon_fx.restore` before.
    """
    plain: Any = ParamWrapper
    for module in model.modules():
        if isinstance(module, TracedParamWrapper):
            module.__class__ = plain
        elif names := properties(module):
            for name in names:
                vars(module).pop(slot(name), None)
            forget_properties(module)


class TracedParamWrapper(ParamWrapper):
    """A ``ParamWrapper`` that registers nothing."""

    traced = True  # for reports

    def _get_name(self) -> str:
        return ParamWrapper.__name__

    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        """What its parameter is while the module inside runs: W + s·B·A, made once."""
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        base, place = self.get_base_layer(), slot(self.parameter_name)
        try:
            weight = self.get_param()
            if not isinstance(weight, nn.Parameter):
                # Prepared: PEFT asks for it again and again, and it is dequantized each time.
                setattr(base, place, weight)
            setattr(base, place, self._adapted(weight, adapters))
            yield
        finally:
            setattr(base, place, None)

    def _adapted(self: Any, weight: Tensor, adapters: list[str]) -> Tensor:
        """The sum, as PEFT makes it: at once of stacked weights and one adapter."""
        if len(adapters) == 1 and self.num_experts > 1:
            left, right, scaling = self.get_delta_factors(adapters[0])
            device = weight.device.type
            if not torch.is_autocast_enabled(device):
                return torch.baddbmm(weight, left, right, alpha=scaling)
            with torch.autocast(device, enabled=False):
                return torch.baddbmm(weight, left, right, alpha=scaling)
        delta = self.get_delta_weight(adapters[0])
        for name in adapters[1:]:
            delta = delta + self.get_delta_weight(name)
        adapted: Tensor = weight + delta
        return adapted


def _refuse_spread(wrappers: list[tuple[str, Any]], by_fsdp: set[int]) -> None:
    """PEFT's sum is of all of W, B and A, and fails at parts of W in the first step."""
    for path, wrapper in wrappers:
        base, name = wrapper.get_base_layer(), wrapper.parameter_name
        weight = base._parameters.get(name)
        cut = weight is not None and is_dtensor(weight) and id(weight) not in by_fsdp
        if cut or getattr(base, "_is_expert_parallel", False):
            raise FalqonError(
                stack_path(f"{path}.{name}", prepared=False),
                "tensor or expert parallelism spreads it over processes, and PEFT adds B · A to "
                "all of it",
                "Leave it out of target_parameters: frozen experts run in FP8 there; or shard the "
                "model by fully_shard",
            )


def _can_trace(wrapper: Any) -> bool:
    """Not what another parametrization has, and no weight in FP8, to which PEFT adds otherwise."""
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    if parametrize.is_parametrized(base, name):
        return False
    weight = base._parameters.get(name)
    if weight is None:
        return prepared_stack(base, name) is not None
    return weight.dtype not in _FP8
