"""PEFT's adapters of stacked experts, as code that compiles into one graph."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or not _can_trace(module):
            continue
        base, name = module.get_base_layer(), module.parameter_name
        known = _names(base)
        if name not in known:
            base.__class__ = _with_properties(_plain_class(base), (*known, name))
            setattr(base, _slot(name), None)
        module.__class__ = TracedParamWrapper
        found.append(path)
    return found


def untrace_param_wrappers(model: nn.Module) -> None:
    """Give all that `trace_param_wrappers` changed its own class again."""
    for module in model.modules():
        if isinstance(module, TracedParamWrapper):
            module.__class__ = ParamWrapper
        elif names := _names(module):
            module.__class__ = _plain_class(module)
            for name in names:
                vars(module).pop(_slot(name), None)


class TracedParamWrapper(ParamWrapper):  # type: ignore[misc]
    """A ``ParamWrapper`` that registers nothing."""

    traced = True  # for reports

    def _get_name(self) -> str:
        return ParamWrapper.__name__

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """What its parameter is while the module inside runs: W + s·B·A, made once."""
        adapters = [name for name in active_adapters if name in self.lora_A]
        if not adapters:
            yield
            return
        base, slot = self.get_base_layer(), _slot(self.parameter_name)
        setattr(base, slot, self._adapted(base._parameters[self.parameter_name], adapters))
        try:
            yield
        finally:
            setattr(base, slot, None)

    def _adapted(self, weight: Tensor, adapters: list[str]) -> Tensor:
        """As PEFT computes it: at once where the weights are stacked and the adapter is one."""
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
        return weight + delta


def _can_trace(wrapper: Any) -> bool:
    """Not what another parametrization has, and no weight in FP8, to which PEFT adds otherwise."""
    base, name = wrapper.get_base_layer(), wrapper.parameter_name
    if parametrize.is_parametrized(base, name):
        return False
    weight = base._parameters.get(name)
    return weight is not None and weight.dtype not in _FP8


def _slot(name: str) -> str:
    """Where a module holds what a parameter is while its wrapper runs."""
    return f"_adapted_{name}"


def _names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that are properties."""
    names: tuple[str, ...] = vars(type(module)).get("_traced_parameters", ())
    return names


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had at first."""
    return type(module).__bases__[0] if _names(module) else type(module)


@functools.cache
def _with_properties(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose parameters ``names`` are properties."""
    members: dict[str, Any] = {name: _parameter(name) for name in names}
    members |= {"_traced_parameters": names, "__module__": cls.__module__, "__doc__": cls.__doc__}
    members |= {"__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
    return type(cls.__name__, (cls,), members)


def _parameter(name: str) -> property:
    slot = _slot(name)

    def parameter(self: nn.Module) -> Any:
        adapted = getattr(self, slot)
        return self._parameters[name] if adapted is None else adapted

    return property(parameter)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """For copies and pickles, which find no class that is made while a program runs."""
    return _new, (_plain_class(self), _names(self)), vars(self)


def _new(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    traced = _with_properties(cls, names)
    return traced.__new__(traced)
