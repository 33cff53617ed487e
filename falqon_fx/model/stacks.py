"""Stacked weights of experts: parameters that are read as properties of their module, and
`Fp8Stack`, what `prepare` puts in the place of one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_plain
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.lora_layers import tied_weights
from falqon_fx.model.prepared_linear import ReadOnly
from falqon_fx.ops.base_linear import stacked_weight
from falqon_fx.ops.experts_lowering import stacked_b
from falqon_fx.passes.match.frozen import why_left
from falqon_fx.site.base import Base, BaseParameter, bases, cast_base
from falqon_fx.site.paths import IN_FP8, stack_path
from falqon_fx.site.sharded import local
from falqon_fx.site.spec import SiteSpec

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# transformers' implementations whose products are found in a graph
GROUPED = ("grouped_mm", "batched_mm")


class Fp8Stack(Fp8Linear):
    """Stacked weights [E, out, in] in FP8, as the matrix [E * out, in] of their rows: a child of
    the module that had them as a parameter, whose name it has with `IN_FP8` behind it.
    """

    def __init__(
        self,
        base: Base,
        experts: int,
        dtype: torch.dtype,
        transposed: bool,
        spec_text: str,
        path: str,
    ) -> None:
        super().__init__(base, None, dtype, transposed, spec_text, path)
        self.experts = experts

    def dequantized(self) -> Tensor:
        """dq(W) in the original dtype and layout: [E, out, in], or [E, in, out] as it was."""
        given = (self.code, self.scale, self.digest, self.experts, self.transposed, self.dtype)
        weight: Tensor = stacked_weight(*given, self.spec_text)
        return weight

    @property
    def weight(self) -> Tensor:
        """The same; writes into it raise a `FalqonError`."""
        weight = self.dequantized()
        return weight if torch.compiler.is_compiling() else ReadOnly.of(weight, self.path)

    def forward(self, x: Tensor) -> Tensor:
        raise FalqonError(
            self.path, "it is a weight, and no layer", "Call the module that it belongs to"
        )


@dataclass(frozen=True)
class StackedWeight:
    """A frozen parameter ``name`` of transformers' experts at ``path``; ``wrapper`` is PEFT's
    ``ParamWrapper`` of it, if it has one.
    """

    path: str
    module: Any
    name: str
    wrapper: Any | None

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.module._parameters[self.name]
        return weight

    @property
    def site(self) -> str:
        """The path that it has in reports."""
        return stack_path(f"{self.path}.{self.name}".lstrip("."), prepared=False)

    @property
    def transposed(self) -> bool:
        return bool(self.module.is_transposed)


def stacked_weights(model: nn.Module) -> Iterator[StackedWeight]:
    """The frozen stacked weights of experts that transformers' interface runs."""
    every: list[Any] = [*model.modules()]
    wrappers = {
        (id(module.get_base_layer()), module.parameter_name): module
        for module in every
        if isinstance(getattr(module, "parameter_name", None), str)
        and hasattr(module, "get_base_layer")
    }
    for path, module in model.named_modules():
        if not is_experts(module):
            continue
        for name, weight in list(module._parameters.items()):
            if weight is None or weight.dim() != 3 or weight.requires_grad:
                continue
            if weight.dtype in _FLOATS:
                yield StackedWeight(path, module, name, wrappers.get((id(module), name)))


def why_not_stacked(
    stack: StackedWeight, config: FalqonConfig, tied: bool, runs: bool = True
) -> str | None:
    """Why a stack is left by `prepare`; "" where that is nothing to report. Without ``runs``
    whatever the model has to be told before it runs is no reason.
    """
    if not config.selects(stack.site):
        return "include= or exclude= leaves it out"
    if stack.wrapper is None and config.frozen == "leave":
        return ""
    if config.granularity != "row" or (config.update == "rows" and stack.wrapper is not None):
        return 'stacked experts have granularity="row" and update="adapter" alone'
    if config.base_dtype != "fp8":
        return 'stacked experts have base_dtype="fp8" alone'
    if not is_plain(stack.weight) or stack.module._is_expert_parallel:
        return "its experts are spread over processes"
    if runs and stack.wrapper is not None and not getattr(stack.wrapper, "traced", False):
        return "call falqon_fx.integrations.peft.trace_param_wrappers(model) before"
    if stack.wrapper is not None and stack.wrapper.merged:
        return "its adapter is merged into the base weight (call unmerge_adapter() first)"
    used = getattr(stack.module.config, "_experts_implementation", None)
    if runs and used not in GROUPED:
        return f'experts run as {used!r} (call model.set_experts_implementation("grouped_mm"))'
    if stack.wrapper is not None:
        return None
    _, first, second = stack.weight.shape
    out, features = (second, first) if stack.transposed else (first, second)
    return why_left(stack.site, out, features, tied)


def sort_stacks(
    model: nn.Module, config: FalqonConfig
) -> tuple[list[StackedWeight], dict[str, str]]:
    """The stacks that `prepare` casts, and why it leaves the others."""
    stacks, skipped = [], {}
    tied = tied_weights(model)
    for stack in stacked_weights(model):
        shared = len(tied[local(stack.weight).data_ptr()]) > 1
        reason = why_not_stacked(stack, config, shared)
        if reason is None:
            stacks.append(stack)
        elif reason:
            skipped[stack.site] = reason
    return stacks, skipped


def cast_stack(stack: StackedWeight, config: FalqonConfig) -> Base:
    """Its FP8 form."""
    rows = BaseParameter(stack.site, stack.weight, stack.transposed).weight
    return cast_base(rows, SiteSpec.from_config(config))


def put_stack(stack: StackedWeight, base: Base, config: FalqonConfig) -> None:
    """Put the FP8 form in the place of the parameter."""
    module, name, weight = stack.module, stack.name, stack.weight
    spec = str(SiteSpec.from_config(config))
    new = Fp8Stack(base, len(weight), weight.dtype, stack.transposed, spec, stack.site)
    bases.forget(weight)
    del module._parameters[name]
    module._modules[name + IN_FP8] = new.train(module.training)
    read_as_property(module, name)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is one of experts that transformers' interface runs."""
    names = ("is_transposed", "has_gate", "_is_expert_parallel")
    return all(name in vars(module) for name in names)  # Dynamo of torch 2.11 traces no `keys()`


def with_dense_stacks(module: Any) -> Any:
    """A module without prepared stacks: itself, or a copy of it."""
    if any(isinstance(child, Fp8Stack) for child in module.modules()):
        module = copy.deepcopy(module)
        restore_stacks(module)
    return module


def restore_stacks(model: nn.Module) -> None:
    """Give prepared stacks their parameters again, dq(W) in the dtype that they had."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, Fp8Stack):
                weight = nn.Parameter(child.dequantized(), requires_grad=False)
                del module._modules[name]
                module._parameters[name.removesuffix(IN_FP8)] = weight
                forget_properties(module)


def stacked_product(b: Tensor, a: Tensor, experts: int) -> Tensor:
    """B · A, of stacked experts that of each, [experts * out, in]."""
    if not experts:
        return b @ a
    return torch.bmm(stacked_b(b, experts), a.reshape(experts, -1, a.shape[1])).flatten(0, 1)


def experts_in(parameter: Tensor) -> int:
    """How many weights a parameter stacks; 0 where it stacks none, as the bytes of NVFP4."""
    return len(parameter) if parameter.dim() == 3 and parameter.is_floating_point() else 0


# -- parameters as properties ----------------------------------------------------------------------


def prepared_stack(module: nn.Module, name: str) -> Fp8Stack | None:
    """What stands for the parameter ``name`` of a module that is prepared."""
    child = module._modules.get(name + IN_FP8)
    return child if isinstance(child, Fp8Stack) else None


def slot(name: str) -> str:
    """Where a module holds what a parameter is while its wrapper runs; None at any other time."""
    return f"_adapted_{name}"


def read_as_property(module: nn.Module, name: str) -> None:
    """Let the attribute ``name`` of a module give what its `slot` holds, the parameter where that
    is None, and the dequantized weight where it is prepared. The state dict stays as it is.
    """
    names = properties(module)
    if name not in names:
        module.__class__ = _with_properties(_plain_class(module), (*names, name))


def forget_properties(module: nn.Module) -> None:
    """Give a module its own class again, as far as nothing needs another."""
    names = properties(module)
    kept = tuple(n for n in names if prepared_stack(module, n) or slot(n) in vars(module))
    if kept != names:
        plain = _plain_class(module)
        module.__class__ = _with_properties(plain, kept) if kept else plain


def properties(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that are properties."""
    names: tuple[str, ...] = vars(type(module)).get("_stacked_parameters", ())
    return names


def _plain_class(module: nn.Module) -> Any:
    """The class that a module had at first."""
    return type(module).__bases__[0] if properties(module) else type(module)


@functools.cache
def _with_properties(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose parameters ``names`` are properties."""
    members: dict[str, Any] = {name: _parameter(name) for name in names}
    members |= dict.fromkeys((slot(name) for name in names), None)
    members |= {"_stacked_parameters": names, "__module__": cls.__module__, "__doc__": cls.__doc__}
    members |= {"__qualname__": cls.__qualname__, "__reduce_ex__": _reduce}
    return cast(type[nn.Module], type(cls.__name__, (cls,), members))


def _parameter(name: str) -> property:
    place = slot(name)

    def parameter(self: nn.Module) -> Any:
        adapted = getattr(self, place)
        if adapted is not None:
            return adapted
        if name in self._parameters:
            return self._parameters[name]
        return self._modules[name + IN_FP8].weight  # type: ignore[union-attr]

    return property(parameter)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Stands for copies and pickles, which find no class that is made while a program runs."""
    return _new, (_plain_class(self), properties(self)), vars(self)


def _new(cls: Any, names: tuple[str, ...]) -> nn.Module:
    return object.__new__(_with_properties(cls, names))
