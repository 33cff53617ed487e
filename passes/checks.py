"""What a match must be to become a site."""

from __future__ import annotations

import torch

from falqon_fx._compat import hint, is_fsdp, value_of
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.kernels.hardware import int8_architecture
from falqon_fx.kernels.spec import MAX_INT8
from falqon_fx.passes.adapter_dtype import why_not
from falqon_fx.passes.match.dataflow import Match
from falqon_fx.passes.modes import may_autocast
from falqon_fx.passes.terms import (
    AddLinear,
    BaseLinear,
    Experts,
    Linear,
    Param,
    Prepared,
    PreparedStack,
    RowsBaseLinear,
)
from falqon_fx.site.spec import SiteSpec, parse_spec


def weights_of(found: Match) -> tuple[Param, ...]:
    """The base weight, or what stands for a prepared one."""
    base = found.base
    if isinstance(base, Experts) and isinstance(base.weight, PreparedStack):
        code = base.weight.code
        return (Param(value_of(found.scope.outer(code)), code),)
    if isinstance(base, BaseLinear | RowsBaseLinear):
        code = base.code if isinstance(base, BaseLinear) else base.state[0]
        return (Param(value_of(found.scope.outer(code)), code),)
    assert isinstance(base.weight, Param)
    return (base.weight,)


def params_of(found: Match) -> tuple[Param, ...]:
    """The same, and each A and B."""
    adapters = [p for a in found.adapters for p in (a.lora_a, a.lora_b)]
    return (*weights_of(found), *adapters)


def check(found: Match, path: str, config: FalqonConfig) -> None:
    """A site can be trained rightly as asked.

    Raises:
        FalqonError: parameters that are sharded, on several devices, in dtypes that don't go
            together, or prepared with other options.
    """
    x = value_of(found.x)
    for param in params_of(found):
        if x is not None and param.value.device != x.device:
            raise FalqonError(
                path,
                f"a parameter is on {param.value.device}, its input on {x.device}",
                "Move the whole model to one device",
            )
    if config.base_dtype == "int8":
        _check_int8(found, path)
    if config.adapter_dtype == "fp8" and (why := why_not(found)):
        raise FalqonError(path, f'adapter_dtype="fp8" {why}', 'Set adapter_dtype="bfloat16"')
    _check_dtypes(found, path)
    _check_gathered(found, path, config)
    base: object = found.base
    if isinstance(base, Experts):
        base = base.prepared
    if isinstance(base, BaseLinear | RowsBaseLinear | PreparedStack):
        _check_prepared(base, path, config, adapted=bool(found.adapters))


def why_not_experts(found: Match, config: FalqonConfig) -> tuple[str, str] | None:
    """The reason and the remedy where options ask for what a stack of experts can't do."""
    asked = {
        'granularity="tensor"': config.granularity != "row",
        f'base_dtype="{config.base_dtype}"': config.base_dtype != "fp8",
        'update="rows"': config.update == "rows" and bool(found.adapters),
        'adapter_dtype="fp8"': config.adapter_dtype == "fp8" and bool(found.adapters),
        'init="svd"': config.init == "svd" and bool(found.adapters),
    }
    for option, is_asked in asked.items():
        if is_asked:
            return (
                f"{option} is not built for stacked experts",
                "It runs as it was; leave the option out, or the experts with exclude=",
            )
    result = value_of(found.anchor)
    if result.device.type == "cuda" and result.dtype != torch.bfloat16:
        return (
            f"its result is {result.dtype}: a GPU multiplies groups in bfloat16",
            "It runs as it was; load the model in bfloat16",
        )
    (weight,), sharded = weights_of(found), False
    if weight.node is not None and not _is_prepared_stack(found):
        sharded = is_fsdp(found.scope.outer(weight.node))
    if sharded:
        return (
            "FSDP shards its stacked weights, which are not in FP8",
            "It runs as it was; call falqon_fx.prepare(model) before fully_shard",
        )
    return None


def _is_prepared_stack(found: Match) -> bool:
    return isinstance(found.base, Experts) and isinstance(found.base.weight, PreparedStack)


def _check_int8(found: Match, path: str) -> None:
    """Integers can be multiplied there, and their sums are integers of 32 bits."""
    device, features = value_of(found.x).device, value_of(found.x).shape[-1]
    why = ""
    on_amd = device.type == "cuda" and torch.version.hip is not None
    if device.type not in ("cpu", "cuda", "meta") or on_amd:
        why = f"computes on CPUs and on NVIDIA's GPUs alone, and this is on {device}"
    elif device.type == "cuda" and torch.cuda.is_available() and not int8_architecture(device):
        why = f"wants the INT8 tensor cores of sm_75 and later, which {device} has not"
    elif hint(features) > MAX_INT8:
        why = f"adds up {MAX_INT8} products at most, and this has {features}"
    if why:
        raise FalqonError(path, f'base_dtype="int8" {why}', 'Set base_dtype="fp8"')


def _check_gathered(found: Match, path: str, config: FalqonConfig) -> None:
    """What FSDP gathers for a call is gone after it: casts and writes would be, too."""
    (weight, *_) = weights_of(found)
    if weight.node is None or not is_fsdp(found.scope.outer(weight.node)):
        return
    if isinstance(found.base, RowsBaseLinear):
        raise FalqonError(
            path,
            'update="rows" writes into its FP8 weight, which FSDP shards: the writes would be lost',
            'Use update="adapter", or DDP',
        )
    if not isinstance(found.base, BaseLinear) and not _is_prepared_stack(found):
        raise FalqonError(
            path,
            "FSDP shards its base weight, which is not in FP8 yet: each call would gather it whole",
            "Call falqon_fx.prepare(model) before fully_shard, with the config of the backend: "
            "torch 2.12 or newer can shard it then",
        )
    if config.transpose == "store":
        raise FalqonError(
            path,
            'transpose="store" would keep its FP8 weight, which FSDP shards, whole beside it',
            'Set transpose="auto"',
        )


def _check_dtypes(found: Match, path: str) -> None:
    """Torch multiplies operands of one dtype alone, which Dynamo's fake tensors don't look at."""
    scope, device = found.scope, value_of(found.anchor).device.type
    if may_autocast(scope.mode(found.anchor), device):
        return
    for node in found.nodes:
        term = scope.term(node)
        if isinstance(term, Linear | AddLinear):
            given, own = value_of(term.x).dtype, term.weight.value.dtype
            if given != own:
                raise FalqonError(
                    path,
                    f"one of its weights is {own}, the input of it {given}",
                    "Cast the whole model to one dtype, or run it under torch.autocast",
                )


def _cast_by(spec: SiteSpec) -> str:
    """The options that decide the bytes of a base."""
    kind = "" if spec.base == "fp8" else f"base_dtype={spec.base!r}, "
    return f"{kind}granularity={spec.granularity!r}, scale={spec.scale!r}"


def _check_prepared(
    base: Prepared | PreparedStack, path: str, config: FalqonConfig, adapted: bool
) -> None:
    done, asked = parse_spec(base.spec_text), SiteSpec.from_config(config)
    if _cast_by(done) != _cast_by(asked):
        raise FalqonError(
            path,
            f"prepare() used {_cast_by(done)}; the backend is asked for {_cast_by(asked)}",
            "Give prepare() and torch.compile() the same config",
        )
    made = "rows" if isinstance(base, RowsBaseLinear) else "adapter"
    if made != config.update and adapted:  # what has no adapter is the same in both
        remedy = "Give prepare() and torch.compile() the same config"
        if made == "adapter":
            remedy += "; where the adapter is not PEFT's, prepare() sees a layer without one: use "
            remedy += 'update="adapter"'
        raise FalqonError(
            path,
            f"prepare() made it for update={made!r}, the backend is asked for {config.update!r}",
            remedy,
        )
