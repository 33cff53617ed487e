"""`prepare`, `restore`, `flush`, `adapters`: what acts on a whole model, module by module."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from falqon_fx import ops, stored
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.merged import MergedAdapter, check_values, create, registry
from falqon_fx.report import deepest_path
from falqon_fx.spec import parse_spec


class MergedBaseLinear(nn.Module):
    """The base layer of a prepared site. Eagerly it is the base layer alone: merged minus applied.

    The FP8 bytes are a uint8 parameter: ``.to(bfloat16)`` would cast a float8 one away, and a
    buffer would be broadcast by DDP in each forward pass.
    """

    def __init__(
        self,
        state: MergedAdapter,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool,
        path: str,
    ) -> None:
        super().__init__()
        self.path = path  # of its LoRA layer, for errors
        self.code, self.scale, self.applied, self.counters, self.writes = (
            nn.Parameter(tensor, requires_grad=False)
            for tensor in (state.code, state.scale, state.applied, state.counters, state.writes)
        )
        self.bias = bias
        self.scaling, self.spec, self.dtype = state.scaling, str(state.plan), dtype
        self.transposed = transposed  # whether the base layer stored its weight [in, out]
        self.out_features, self.rank = state.applied.shape
        self.in_features = state.code.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result: Tensor = ops.base_linear(
            x,
            self.code,
            self.scale,
            self.applied,
            self.counters,
            self.writes,
            self.bias,
            self.scaling,
            self.spec,
        )
        return result

    @property
    def weight(self) -> Tensor:
        """The base weight, dequantized anew at each access, in the original dtype and layout.

        Raises a `FalqonError` where someone writes to it, as PEFT's merge does.
        """
        weight = self._dequantized()
        return weight if torch.compiler.is_compiling() else _ReadOnly.of(weight, self.path)

    def plain(self) -> nn.Module:
        """The base layer as it was before `prepare`, within the casts."""
        weight = self.merged().base().to(self.dtype)
        return plain_layer(weight, self.bias, self.transposed).train(self.training)

    def _dequantized(self) -> Tensor:
        base = self.merged().base().to(self.dtype)
        return base.t().contiguous() if self.transposed else base

    def merged(self) -> MergedAdapter:
        """The state as a `MergedAdapter` (without its B)."""
        return MergedAdapter(
            self.code.detach(),
            self.scale.detach(),
            self.applied.detach(),
            self.counters.detach(),
            self.writes.detach(),
            self.scaling,
            parse_spec(self.spec),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergedBaseLinear:
        """Follow moves between devices, never a cast: the scales are part of the FP8 weight."""
        state = {id(p) for p in (self.code, self.scale, self.applied, self.counters, self.writes)}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) not in state or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        stored.forget()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}, {self.spec}"
        )


class _ReadOnly(Tensor):
    """A dequantized copy of a base weight, and its views: writes into it would be lost."""

    path: str = ""

    @classmethod
    def of(cls, weight: Tensor, path: str) -> _ReadOnly:
        result = weight.as_subclass(cls)
        result.path = path
        return result

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if _writes(func.__name__) and isinstance(args[0], cls):
            raise FalqonError(
                args[0].path,
                "prepare() has merged its base weight, so a write into it would be lost "
                "(merge_adapter, merge_and_unload, an initialization such as PiSSA)",
                "Call falqon_fx.restore(model) first, or falqon_fx.merge_and_unload(model)",
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        own = [arg for arg in args if isinstance(arg, cls)]
        if own and isinstance(result, Tensor) and result.data_ptr() == own[0].data_ptr():
            return cls.of(result, own[0].path)
        return result


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument's values."""
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return in_place or name in _WRITES


_WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` merged, what it left and why, and the bytes of the weights it touched."""

    prepared: tuple[str, ...]
    skipped: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        lines = [
            f"{len(self.prepared)} layers prepared: {self.bytes_before / 2**20:.1f} MiB of base "
            f"weights became {self.bytes_after / 2**20:.1f} MiB"
        ]
        lines += [f"skipped {path}: {reason}" for path, reason in self.skipped.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class LoraLayer:
    """A PEFT-style layer: ``base_layer``, ``lora_A``, ``lora_B`` and ``scaling`` by adapter."""

    path: str
    module: Any
    adapter: str

    @property
    def base(self) -> Any:
        return self.module.base_layer

    @property
    def transposed(self) -> bool:
        """Whether the base weight is stored [in, out]: GPT-2's Conv1D."""
        return bool(getattr(self.module, "fan_in_fan_out", False))

    @property
    def weight(self) -> Tensor:
        """The base weight, [out, in]."""
        weight: Tensor = self.base.weight
        return weight.t() if self.transposed else weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weight, now or before `prepare`."""
        prepared = isinstance(self.base, MergedBaseLinear)
        return self.base.dtype if prepared else self.base.weight.dtype  # type: ignore[no-any-return]

    @property
    def lora_a(self) -> nn.Parameter:
        return self.module.lora_A[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def lora_b(self) -> nn.Parameter:
        return self.module.lora_B[self.adapter].weight  # type: ignore[no-any-return]

    @property
    def scaling(self) -> float:
        return float(self.module.scaling[self.adapter])

    def state(self) -> MergedAdapter:
        """The live state of a prepared layer, with its B."""
        state: MergedAdapter = self.base.merged()
        state.b_ref = weakref.ref(self.lora_b)
        return state


def prepare(
    model: nn.Module, config: FalqonConfig | None = None, *, progress: bool = True
) -> PrepareReport:
    """Merge every LoRA layer in place, one at a time, and free its base weight.

    Optional: without it the base weights stay beside the FP8 ones. Call it after loading the
    adapter and before making the optimizer, with the config that ``torch.compile`` will get.

    Raises:
        FalqonError: a base weight that another module shares, or a layer that can't be merged (NaN,
            Inf, beyond FP8). Nothing has been changed then.
    """
    config = config or FalqonConfig()
    layers, skipped = _sort_layers(unwrap(model), config)
    _check_before(unwrap(model), layers, config)
    before = after = 0
    for layer in _track(layers, progress):
        base = layer.base
        state = create(layer.path, layer.weight, layer.lora_a, layer.lora_b, layer.scaling, config)
        registry.forget(layer.lora_b)
        before += base.weight.nbytes
        after += sum(tensor.nbytes for tensor in state.tensors)
        layer.module.base_layer = MergedBaseLinear(
            state, base.bias, base.weight.dtype, layer.transposed, layer.path
        )
    return PrepareReport(tuple(layer.path for layer in layers), skipped, before, after)


def restore(model: nn.Module) -> nn.Module:
    """Give prepared layers plain base weights again: dq(W) - scaling · applied · dq(A).

    The adapter stays apart, so B is not counted twice. Exact to the rounding of the base dtype on
    top of the FP8 casts. Layers that were not prepared have their base weight still. Works after
    PEFT's ``unload()`` too, which leaves prepared base layers in the model.
    """
    inner = unwrap(model)
    for parameter in inner.parameters():
        registry.forget(parameter)
    for parent in list(inner.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MergedBaseLinear):
                setattr(parent, name, child.plain())
    return model


def plain_layer(weight: Tensor, bias: nn.Parameter | None, transposed: bool) -> nn.Module:
    """A frozen linear layer with ``weight`` [out, in]: GPT-2's Conv1D where it is to be stored
    [in, out], else ``nn.Linear``.
    """
    out, features = weight.shape
    layer: nn.Module
    with torch.device("meta"):  # its parameters are given
        if transposed:
            from transformers.pytorch_utils import Conv1D

            layer, weight = Conv1D(out, features), weight.t().contiguous()
        else:
            layer = nn.Linear(features, out, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", bias)
    return layer


def adapters(model: nn.Module) -> dict[str, MergedAdapter]:
    """The live state of each site by the path of its LoRA layer, for a module or its compiled
    wrapper. Unprepared sites appear after the first compiled call.
    """
    found: dict[str, MergedAdapter] = {}
    inner = unwrap(model)
    for layer in lora_layers(inner):
        if isinstance(layer.base, MergedBaseLinear):
            found[layer.path] = layer.state()
    names: dict[int, list[str]] = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for state, of_state in registry.within(inner.parameters(), names):
        path = deepest_path(of_state)
        found[path if path not in found else of_state[-1][0]] = state
    return found


def flush(model: nn.Module) -> None:
    """Write every pending row of every site into its FP8 weight now."""
    for state in adapters(model).values():
        state.flush()


def lora_path(base_path: str) -> str:
    """The path of the LoRA layer whose base layer lies at ``base_path``."""
    return base_path.removesuffix(".base_layer")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper."""
    return getattr(model, "_orig_mod", model)


def lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    """The LoRA layers in a model, each with its first active adapter."""
    for path, module in model.named_modules():
        parts = ("base_layer", "lora_A", "lora_B", "scaling")
        if not all(hasattr(module, part) for part in parts):
            continue
        if not isinstance(module.lora_A, nn.ModuleDict):  # LoRA by the same names, not PEFT's
            continue
        names = list(getattr(module, "active_adapters", None) or module.lora_A)
        for name in names[:1]:
            if name in module.lora_A and name in module.lora_B:
                yield LoraLayer(path, module, name)


def _sort_layers(model: nn.Module, config: FalqonConfig) -> tuple[list[LoraLayer], dict[str, str]]:
    layers, skipped = [], {}
    for layer in lora_layers(model):
        reason = _skip_reason(layer, config)
        if reason is None:
            layers.append(layer)
        else:
            skipped[layer.path] = reason
    return layers, skipped


def _skip_reason(layer: LoraLayer, config: FalqonConfig) -> str | None:
    if isinstance(layer.base, MergedBaseLinear):
        return "it is prepared already"
    if not _is_linear(layer.base, layer.transposed):
        return f"its base layer is a {type(layer.base).__name__}, not an nn.Linear"
    if layer.base.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its base weight is already quantized ({layer.base.weight.dtype})"
    if layer.base.weight.requires_grad:
        return "its base weight is trained too"
    if getattr(layer.module, "use_dora", {}).get(layer.adapter):
        return "DoRA scales the merged weight by its own norm"
    if getattr(layer.module, "merged", False):
        return "its adapter is merged into the base weight (call unmerge_adapter() first)"
    if len(getattr(layer.module, "active_adapters", [layer.adapter])) > 1:
        return "more than one adapter is active on it"
    if not config.selects(layer.path):
        return "include= or exclude= leaves it out"
    return None


def _is_linear(base: nn.Module, transposed: bool) -> bool:
    if not transposed:
        return type(base) is nn.Linear
    module = sys.modules.get("transformers.pytorch_utils")  # where it is not, there is no Conv1D
    return module is not None and type(base) is module.Conv1D


def _check_before(model: nn.Module, layers: list[LoraLayer], config: FalqonConfig) -> None:
    """All that could fail is looked at before the first layer is changed."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    for layer in layers:
        weight = layer.base.weight
        shared = holders[weight.untyped_storage().data_ptr()]
        if len(shared) > 1 and weight.device.type != "meta":
            raise FalqonError(
                layer.path,
                f"its base weight is tied (also {shared[0]} or {shared[-1]}), so it can't be freed",
                "Leave the layer out with exclude=, or untie the weights",
            )
        config.rows(layer.lora_b.shape[0], layer.path)
        check_values(layer.path, layer.weight, layer.lora_a, layer.lora_b)


def _track(layers: list[LoraLayer], show: bool) -> Iterator[LoraLayer]:
    columns = (TextColumn("merging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, transient=True) as bar:
        yield from bar.track(layers)
