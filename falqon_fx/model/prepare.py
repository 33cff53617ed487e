"""`prepare`, `restore`, `adapters`: what acts on a whole model, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.agreement import check_same_on_all_ranks
from falqon_fx.model.calibration import Asked, Calibration
from falqon_fx.model.fp8_linear import IN_ONE_PROCESS, Fp8Linear
from falqon_fx.model.lora_layers import (
    LinearLayer,
    check_fit,
    check_untied,
    lora_layers,
    tied_weights,
    unwrap,
)
from falqon_fx.model.parts import cast_part, check_part, check_together, cut_like, move_hooks
from falqon_fx.model.prepare_report import PrepareReport, track
from falqon_fx.model.sensitivity import sensitivity
from falqon_fx.model.sorting import skipped_adapters, skipped_quantized, sort_layers
from falqon_fx.model.stacks import (
    Fp8Stack,
    StackedWeight,
    cast_stack,
    experts_in,
    put_stack,
    restore_stacks,
    sort_stacks,
    stacked_product,
)
from falqon_fx.ops.fp8_adapter import clamped
from falqon_fx.rows import model as rows_model
from falqon_fx.rows.state import MergedAdapter
from falqon_fx.site.base import Base, Place, bases, check_weight, place
from falqon_fx.site.numerics import as_code, as_scale
from falqon_fx.site.paths import deepest_path, stack_path
from falqon_fx.site.sharded import local, refuse_fsdp, settle, whole
from falqon_fx.site.spec import SiteSpec
from falqon_fx.site.svd import init_where_new

BEFORE = "Call falqon_fx.prepare(model) before fully_shard, and after parallelize_module"


@torch.inference_mode(False)  # what is prepared is to be trained
def prepare(
    model: nn.Module,
    config: FalqonConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    compensate: Asked | None = None,
    outliers: Asked | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Cast every frozen linear layer of a model to FP8 (or INT8, or NVFP4) in place, one at a time,
    and free its weight.

    Optional: without it the weights stay beside the FP8 ones. Layers under an adapter are cast, and
    with ``frozen="fp8"`` those without one that compiled code would run in FP8. Adapters stay as
    they are, so that any may be added, activated or loaded afterwards. Call it with the config that
    ``torch.compile`` will get; in a distributed run on every rank, before the model is wrapped or
    sharded.

    With ``calibration`` the model runs over its batches once, and what the casts cost along these
    inputs is bought back. Of W's cast error a fixed product of low rank beside the FP8 weight takes
    most (`falqon_fx.site.compensate` has the equation and its source); what is left of W is rounded
    so that the errors of its columns make up for each other (`falqon_fx.site.rounding`). Of x's it
    is those channels that weigh most. The adapters are not touched: they stay adapters of the plain
    base. Stacked experts get neither.

    Args:
        model: with adapters or without, or its compiled wrapper.
        config: what ``torch.compile`` will get.
        calibration: batches of the model's inputs, some thousand tokens of what it will be trained
            on: dicts (keyword arguments), tuples or lists (positional ones), or tensors. Of each
            tensor that layers read 4 · in² bytes are held, at most half the bytes of the weights
            (or 1 GiB) at a time: with more of them the model runs over the batches several times.
            The bytes of layers wait in the CPU's memory until all have been looked at.
        compensate: the rank r of the product, 2 · r · (in + out) bytes a layer; 16 where a
            calibration is given. 0: none, and W is cast to nearest. "auto" spends as many bytes as
            16 would take where they are expected to lower the loss most
            (`falqon_fx.model.sensitivity`), for which the model runs forward and backward over the
            batches first.
        outliers: the channels c of x whose cast error is added back, 2 · c · out bytes a layer; 16
            where a calibration is given. 0: none. "auto" as with ``compensate``; where both are,
            they share their bytes. With base_dtype="int8" it is 16: all that read x share its step.
        progress: show bars.

    Raises:
        FalqonError: a base weight that another module shares, that is sharded already or that FP8
            can't hold (NaN, Inf, beyond FP8); an adapter that doesn't fit it; ranks that ask
            for different things; a calibration that is empty, that the model can't run or in which
            a layer reads NaN or Inf, or more ranks or channels than a layer has. Nothing has been
            changed then.
    """
    config, inner = config or FalqonConfig(), unwrap(model)
    wanted = Calibration.asked(calibration, compensate, outliers, config)
    refuse_fsdp(inner, "prepare", BEFORE)
    texts = [f"{name}={value}" for name, value in config.texts().items()]
    texts += [f"compensate={wanted.ranks}", f"outliers={wanted.channels}"]
    check_same_on_all_ranks("\n".join(texts))
    if config.update == "rows":
        wanted.refuse('update="rows" writes into its FP8 weights, and has no place beside them')
        return _prepare_rows(inner, config, progress)
    config = _leaving(inner, config, wanted, progress)
    layers, skipped = sort_layers(inner, config)
    skipped |= skipped_adapters(inner, layers, skipped) | skipped_quantized(inner, config)
    stacks, left = sort_stacks(inner, config)
    _check_before(inner, layers, config, stacks)
    wanted.read(inner, layers, config, progress)
    before, after = _convert(inner, layers, config, progress, wanted)
    of_stacks = _convert_stacks(stacks, config, progress)
    before, after = before + of_stacks[0], after + of_stacks[1]
    frozen = tuple(layer.path for layer in layers if layer.lora is None)
    frozen += tuple(stack.site for stack in stacks if stack.wrapper is None)
    prepared = tuple(layer.site for layer in layers) + tuple(stack.site for stack in stacks)
    return PrepareReport(
        prepared,
        frozen,
        skipped | left,
        before,
        after,
        wanted.tokens,
        wanted.left,
        config,
        wanted.bought,
    )


def _leaving(
    model: nn.Module, config: FalqonConfig, wanted: Calibration, progress: bool
) -> FalqonConfig:
    """The config with the names of the layers that exclude="sensitive:8" stands for: those that
    cost most beside what the calibration buys back of them.
    """
    if not config.sensitive() or wanted.batches is None:
        return config  # which raises where a layer is asked for
    every = config.leaving(())
    found = sensitivity(wanted.rest(model, sort_layers(model, every)[0], every, progress))
    return config.leaving(tuple(found)[: config.sensitive()])


def _prepare_rows(model: nn.Module, config: FalqonConfig, progress: bool) -> PrepareReport:
    """Sites become merged layers that can be written; frozen layers beside them as ever."""
    done, skipped, before, after = rows_model.prepare(
        model, config, lambda layers: track(layers, progress)
    )
    layers, others = sort_layers(model, config)
    others |= skipped_quantized(model, config)
    layers = [layer for layer in layers if layer.lora is None]
    _check_before(model, layers, config)
    more_before, more_after = _convert(model, layers, config, progress, Calibration())
    frozen = tuple(layer.path for layer in layers)
    before, after = before + more_before, after + more_after
    return PrepareReport(
        (*done, *frozen), frozen, {**others, **skipped}, before, after, config=config
    )


def _convert(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    config: FalqonConfig,
    progress: bool,
    wanted: Calibration,
) -> tuple[int, int]:
    """Cast layers and put them in place; the bytes of their weights before and after."""
    before = after = 0
    for layer in track(layers, progress):
        base, terms = _cast(layer, config, wanted), wanted.terms(layer)
        before += local(layer.module.weight).nbytes
        after += base.nbytes + sum(term.nbytes for term in terms.values())
        _replace(model, layer, base, config, terms)
    return before, after


def _convert_stacks(
    stacks: Sequence[StackedWeight], config: FalqonConfig, progress: bool
) -> tuple[int, int]:
    """The same for stacked experts."""
    before = after = 0
    for stack in track(stacks, progress):
        base = cast_stack(stack, config)
        before, after = before + stack.weight.nbytes, after + base.nbytes
        put_stack(stack, base, config)
    return before, after


def _cast(layer: LinearLayer, config: FalqonConfig, wanted: Calibration) -> Base:
    if config.init == "svd" and layer.lora is not None:
        for a, b, _ in layer.lora.each():
            init_where_new(layer.weight, a, b, config)
    return wanted.base(layer) or cast_part(layer.weight, SiteSpec.from_config(config))


def _replace(
    model: nn.Module,
    layer: LinearLayer,
    base: Base,
    config: FalqonConfig,
    terms: Mapping[str, Tensor],
) -> None:
    old = layer.module
    new = Fp8Linear(
        base,
        old.bias,
        old.weight.dtype,
        layer.transposed,
        str(SiteSpec.from_config(config)),
        layer.site,
    )
    new.set_terms(terms)
    cut_like(new, old.weight)
    move_hooks(old, new)
    bases.forget(local(old.weight))
    for parent in list(model.modules()):  # a module may be shared by several
        for name, child in list(parent._modules.items()):
            if child is not None and child is old:
                setattr(parent, name, new.train(child.training))


@torch.inference_mode(False)
def restore(model: nn.Module) -> nn.Module:
    """Give prepared layers plain base weights again, dq(W) in the dtype that they had.

    Exact to the rounding of that dtype on top of the FP8 cast. Layers that were not prepared have
    their base weight still. Works after PEFT's ``unload()`` too, which leaves prepared base layers
    in the model.

    Raises:
        FalqonError: FSDP has spread the model over processes.
    """
    inner = unwrap(model)
    refuse_fsdp(inner, "restore", IN_ONE_PROCESS)
    rows_model.restore(inner)
    restore_stacks(inner)
    for parent in list(inner.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Fp8Linear):
                plain = child.plain()
                move_hooks(child, plain)
                setattr(parent, name, plain)
    return model


@dataclass(frozen=True)
class Adapter:
    """The live state of one site: its FP8 base, and the adapters that are added to it. Where
    processes hold parts of it, all of them call `base` and `merged`, which gather this site.

    Attributes:
        experts: how many weights are stacked, 0 for a linear layer; ``out`` counts the rows of all.
        weight: W, float8_e4m3fn or int8 [out, in], or NVFP4 as `falqon_fx.site.nvfp4` packs it.
        scale: float32 [out, 1] or []; multiplies on dequantize.
        adapters: (A [r, in], B [out, r], scaling) of each active adapter, the parameters
            themselves.
    """

    weight: Tensor
    scale: Tensor
    adapters: tuple[tuple[Tensor, Tensor, float], ...]
    experts: int = 0

    def base(self) -> Tensor:
        """dq(W), float32 [out, in]: constant."""
        code = whole(as_code(self.weight))
        return Base(code, as_scale(whole(self.scale.view(torch.int32)))).dequantize()

    @property
    def saturated(self) -> int:
        """Elements that adapter_dtype="fp8" has clamped since the start; 0 with "bfloat16"."""
        return clamped.of(*(b for _, b, _ in self.adapters))

    @torch.no_grad()
    def merged(self) -> Tensor:
        """base() + Σ scaling · B · A, float32 [out, in]."""
        merged = self.base()
        for a, b, scaling in self.adapters:
            merged += scaling * stacked_product(whole(b).float(), whole(a).float(), self.experts)
        return merged


def adapters(model: nn.Module) -> dict[str, Adapter | MergedAdapter]:
    """The live state of each site by the path of its LoRA layer, for a module or its compiled
    wrapper; with update="rows" a `MergedAdapter`. Unprepared sites appear after the first compiled
    call. Of a sharded model PEFT's layers appear, and their tensors are DTensors.
    """
    inner = unwrap(model)
    settle(inner)
    found: dict[str, Any] = dict(rows_model.adapters(inner))
    seen = {id(layer.base): layer for layer in lora_layers(inner)}
    for layer in seen.values():
        base = _base_of(layer.base)
        if base is not None and layer.path not in found:
            found[layer.path] = Adapter(base.weight, base.scale, tuple(layer.each()))
    held = _by_place(inner)
    for module in inner.modules():
        for owner in module.parameters(recurse=False):
            experts = module.experts if isinstance(module, Fp8Stack) else experts_in(owner)
            if id(module) in seen and not experts:
                continue
            base = module.base() if isinstance(module, Fp8Linear) else _first(bases.of(owner))
            known = [k for k in bases.adapters_of(owner) if k[0] in held and k[1] in held]
            if base is None or not known:
                continue
            names, _ = held[place(owner)]
            sites: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
            for a, b, scaling in known:  # a tied W has several sites
                (names_a, lora_a), (names_b, lora_b) = held[a], held[b]
                site = deepest_path([names, names_a, names_b])
                if experts:
                    site = stack_path(names[0], prepared=isinstance(module, Fp8Stack))
                sites.setdefault(site, []).append((lora_a, lora_b, scaling))
            for site, each in sites.items():
                adapter = Adapter(base.weight, base.scale, tuple(each), experts)
                found.setdefault(site, adapter)
    return found


def _base_of(module: Any) -> Base | None:
    if isinstance(module, Fp8Linear):
        return module.base()
    weight = getattr(module, "weight", None)
    return _first(bases.of(weight)) if isinstance(weight, Tensor) else None


def _first(found: Sequence[Base]) -> Base | None:
    return found[-1] if found else None


def _by_place(model: nn.Module) -> Mapping[Place, tuple[list[str], Tensor]]:
    """The names of each parameter and the parameter, by where it lies."""
    held: dict[Place, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(place(parameter), ([], parameter))[0].append(name)
    return held


def flush(model: nn.Module) -> None:
    """Write every pending row of every site of update="rows" into its FP8 weight now. With
    update="adapter" nothing is ever pending.
    """
    rows_model.flush(unwrap(model))


def _check_before(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    config: FalqonConfig,
    stacks: Sequence[StackedWeight] = (),
) -> None:
    """All that could fail is looked at before the first layer is changed; where processes hold
    parts of one model, on all of them.
    """
    problem = None
    try:
        _check_each(model, layers, config)
        for stack in stacks:
            check_weight(stack.site, stack.weight)
    except FalqonError as error:
        problem = error
    check_together([layer.module.weight for layer in layers], problem)


def _check_each(model: nn.Module, layers: Sequence[LinearLayer], config: FalqonConfig) -> None:
    holders = tied_weights(model)
    for layer in layers:
        weight = layer.module.weight
        check_part(layer.site, weight, config)
        check_untied(layer.site, weight, holders)
        check_weight(layer.site, local(weight))
        if layer.lora is not None:
            check_fit(layer.lora)
