"""`compile_blocks`: the repeated blocks of a model compiled in place, one graph for all of them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import _compat
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError, printable
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.lora_layers import (
    is_linear,
    linear_layers,
    lora_layers,
    tied_weights,
    unwrap,
)
from falqon_fx.model.prepared_linear import PreparedLinear
from falqon_fx.model.sorting import skip_reason


@dataclass(frozen=True)
class BlocksReport:
    """What `compile_blocks` compiled: the paths of the ``blocks``, and of single ``layers`` outside
    of them; ``cache_off`` where it turned the model's ``use_cache`` off.
    """

    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    cache_off: bool

    def __str__(self) -> str:
        text = f"{len(self.blocks)} blocks compiled one by one"
        if self.layers:
            text += f", and {len(self.layers)} layers outside of them: {', '.join(self.layers)}"
        if self.cache_off:
            text += "; model.config.use_cache is off, model.generate keeps its cache"
        return printable(text)


def compile_blocks(
    model: nn.Module, config: FalqonConfig | None = None, **compile_arguments: Any
) -> BlocksReport:
    """Compile the repeated blocks of a model in place, instead of the whole: blocks that are alike
    share one graph, so that the first step takes a fraction of the time.

    Blocks are the modules of each outermost ``nn.ModuleList`` whose modules are of one class and
    hold linear layers (as in accelerate's ``compile_regions``), or those that a diffusers model
    names. Of what lies outside of them, the layers that run in FP8 are compiled one by one; the
    rest runs uncompiled. The numbers are those of the whole model up to how the rest is rounded.

    Two things would make graphs of their own, and are dealt with. A cache of keys and values holds
    something of each layer: ``use_cache`` of the model's config, of no use in training, is turned
    off, and blocks that are called with a cache all the same, as by ``model.generate``, run
    uncompiled. An input without gradient, which the first block alone has, gets one.

    Blocks that differ are graphs of their own: each with ranks that ``compensate="auto"`` chose, or
    with a layer that ``exclude`` leaves out. Past ``torch._dynamo.config.recompile_limit`` of them
    (8) Dynamo runs the others uncompiled, of which a warning tells.

    Args:
        model: with its adapters on, before or after `prepare`.
        config: options of the backend.
        compile_arguments: handed to ``torch.compile`` (``dynamic``, ``fullgraph``).

    Raises:
        FalqonError: there are no repeated blocks, or one has another ``forward`` than its class.
    """
    config, inner = config or FalqonConfig(), unwrap(model)
    blocks = dict(repeated_blocks(inner))
    if not blocks:
        raise FalqonError(
            type(inner).__name__,
            "it has no repeated blocks (no ModuleList whose modules are of one class)",
            'Compile the whole with model.compile(backend="falqon")',
        )
    layers = _outside(inner, blocks, config)
    arguments = {"backend": "falqon", "options": {"config": config}, **compile_arguments}
    _check_own(blocks | layers)
    _compile(blocks | layers, arguments)
    return BlocksReport(tuple(blocks), tuple(layers), _turn_cache_off(inner))


def repeated_blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The repeated blocks below a module, by path."""
    names = getattr(module, "_repeated_blocks", None)  # of a diffusers model
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if names:
            yield from _named(child, below, names)
        elif _is_repeated(child):
            yield from ((f"{below}.{key}", block) for key, block in child.named_children())
        else:
            yield from repeated_blocks(child, below)


def _named(module: nn.Module, path: str, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    if type(module).__name__ in names:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _named(child, f"{path}.{name}", names)


def _is_repeated(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.ModuleList)
        and len(module) > 1
        and len({type(block) for block in module}) == 1
        and any(is_linear(m) or isinstance(m, PreparedLinear) for m in module[0].modules())
    )


def _outside(
    model: nn.Module, blocks: dict[str, nn.Module], config: FalqonConfig
) -> dict[str, nn.Module]:
    """The layers outside of the blocks that run in FP8: those with an adapter, and frozen ones."""
    inside = {id(module) for block in blocks.values() for module in block.modules()}
    found = {layer.path: layer.module for layer in lora_layers(model)}
    tied, adapted = tied_weights(model), tuple(f"{path}." for path in found)
    for layer in linear_layers(model):
        shared = len(tied[layer.module.weight.data_ptr()]) > 1
        if layer.lora is None and skip_reason(layer, config, shared) is None:
            found[layer.path] = layer.module
    for path, module in model.named_modules():
        if isinstance(module, Fp8Linear) and not path.startswith(adapted):
            found[path] = module
    return {path: module for path, module in found.items() if id(module) not in inside}


def _turn_cache_off(model: nn.Module) -> bool:
    """Whether ``use_cache`` of the model's config, or of a part's, was on."""
    configs = [config for m in model.modules() if (config := vars(m).get("config")) is not None]
    on = [config for config in configs if getattr(config, "use_cache", False)]
    for config in on:
        config.use_cache = False
    return bool(on)


def _compile(modules: Mapping[str, nn.Module], arguments: Mapping[str, Any]) -> None:
    """Give each module a ``forward`` that runs the compiled code of its class."""
    forwards: dict[type, _CompiledForward] = {}
    for module in modules.values():
        kind: Any = type(module)
        if kind not in forwards:
            run = _compat.with_own_code(_run, kind.__name__)
            forwards[kind] = _CompiledForward(kind.forward, torch.compile(run, **arguments))
        # A method: in a copy of the model it is the copy's.
        module.forward = types.MethodType(forwards[kind], module)


def _check_own(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        method = vars(module).get("forward")
        if method and not isinstance(getattr(method, "__func__", None), _CompiledForward):
            raise FalqonError(
                path,
                "something has replaced its forward, as accelerate's hooks do",
                "Compile the blocks before that is done, or the whole model",
            )


class _CompiledForward:
    """The ``forward`` of all blocks of a class; uncompiled where it gets a cache of keys and
    values.
    """

    def __init__(self, original: Callable[..., Any], compiled: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original, self.compiled = original, compiled

    def __call__(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            return self.original(block, *args, **kwargs)
        if args and isinstance(args[0], Tensor):
            args = (_as_in_any_block(args[0], block), *args[1:])
        return self.compiled(block, *args, **kwargs)


def _as_in_any_block(x: Tensor, block: nn.Module) -> Tensor:
    """``x`` with the ``requires_grad`` that the input of a block in the middle has."""
    wanted = torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in block.parameters())
    )
    if x.requires_grad == wanted or not x.is_floating_point():
        return x
    return x.detach().requires_grad_(wanted)


def _run(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).forward(self, *args, **kwargs)
