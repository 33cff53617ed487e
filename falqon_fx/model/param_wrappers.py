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
    is_experts,
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

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module inside with W + s·B·A of this wrapper and of those inside it. Nothing outside
        of the call changes: Dynamo would not trace that in a checkpointed layer.
        """
        base, wrappers = self.get_base_layer(), [*_wrappers(self)]
        alone = all(_has_one_adapter(wrapper) for wrapper in wrappers)
        if kwargs.get("adapter_names") is not None or not alone or not _is_plain_call(base):
            return super().forward(x, *args, **kwargs)
        adapted = {}
        for wrapper in wrappers:
            wrapper._check_forward_args(x, *args, **kwargs)
            if not wrapper.disable_adapters:
                weight = wrapper.get_param()
                # Prepared, it would be dequantized whenever PEFT asks for it.
                with_weight = _With(wrapper, {"get_param": lambda weight=weight: weight})
                name = _active(wrapper)[0]
                factors = type(wrapper).get_delta_factors(with_weight, name)
                adapted[wrapper.parameter_name] = _sum(weight, *factors)
        return type(base).forward(_With(base, adapted), x, *args, **kwargs)

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
            return _sum(weight, *self.get_delta_factors(adapters[0]))
        delta = self.get_delta_weight(adapters[0])
        for name in adapters[1:]:
            delta = delta + self.get_delta_weight(name)
        adapted: Tensor = weight + delta
        return adapted


class _With:
    """A module as its own code sees it, some attributes of which are others."""

    def __init__(self, module: Any, others: dict[str, Any]) -> None:
        self._module, self._others = module, others

    def __getattr__(self, name: str) -> Any:
        others = self._others
        return others[name] if name in others else getattr(self._module, name)


def _sum(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """W + s · B · A of all experts, in the dtype of W."""
    device = weight.device.type
    if not torch.is_autocast_enabled(device):
        return torch.baddbmm(weight, left, right, alpha=scaling)
    with torch.autocast(device, enabled=False):
        return torch.baddbmm(weight, left, right, alpha=scaling)


def _wrappers(module: Any) -> Iterator[Any]:
    """A wrapper and those inside it."""
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer


def _active(wrapper: Any) -> list[str]:
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _has_one_adapter(wrapper: Any) -> bool:
    """Whether it adds one adapter to stacked weights, or is switched off, and has no hooks."""
    if not isinstance(wrapper, TracedParamWrapper) or wrapper.merged or _is_hooked(wrapper):
        return False
    return wrapper.disable_adapters or (len(_active(wrapper)) == 1 and wrapper.num_experts > 1)


def _is_plain_call(module: Any) -> bool:
    """Whether calling a module is calling its class's forward, which needs no instance of it: that
    of transformers' experts.
    """
    own = "forward" in vars(module) or module._compiled_call_impl is not None
    return is_experts(module) and not own and not _is_hooked(module)


def _is_hooked(module: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


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
