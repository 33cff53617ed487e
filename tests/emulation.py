"""An eager model of the same quantized ops, written apart from the library.

Casts are torch's own, FP8 values are kept in float32, scales are applied to the result. Powers of
two commute with every rounding, and the other scales are multiplied in the order that the paper
gives, so that a float32 model is equal bit for bit to what the backend runs.

    twin = emulate(copy.deepcopy(model), falqon_fx.adapters(model), config)

Both updates are covered. With update="adapter" A and s·B are cast from the parameters in each call;
with update="rows" the parts of W' = [W; A] come from the state as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import FalqonConfig, MergedAdapter
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.model.prepare import Adapter

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
DEFAULTS = FalqonConfig()


def cast(
    x: Tensor, dtype: torch.dtype, per_row: bool, pow2: bool, apart: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """(codes, scale): x ≈ codes · scale, codes as float32; zeros in the channels ``apart``."""
    largest = 127.0 if dtype == INT8 else torch.finfo(dtype).max
    if apart:
        x = x.index_fill(1, torch.tensor([*apart]), 0.0)
    if per_row:
        amax = x.abs().amax(1, keepdim=True)
    else:
        amax = x.abs().amax() if x.numel() else torch.zeros(())
    scale = (amax.double() / largest).log2().ceil().exp2().float() if pow2 else amax * (1 / largest)
    scale = torch.where(amax == 0, 1.0, scale)
    scaled = x / scale if pow2 else x * (1 / scale)
    scaled = scaled.clamp(-largest, largest)
    return (scaled.round() if dtype == INT8 else scaled.to(dtype).float()), scale


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def cast_nvfp4(weight: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """(codes, scale) of W [out, in], the codes times the scales of their blocks."""
    blocks, amax = weight.unflatten(1, (-1, 16)), weight.abs().amax()
    scale = (amax.double() / 2688).log2().ceil().exp2().float() if pow2 else amax / 2688
    of_blocks = (blocks.abs().amax(-1, keepdim=True) / (6 * scale)).to(E4M3).float()
    of_blocks = of_blocks.where(of_blocks > 0, 0.125)
    scaled = blocks / (of_blocks * scale)
    middle = (_E2M1[1:] + _E2M1[:-1]) / 2
    down, up = (torch.bucketize(scaled.abs(), middle, right=right) for right in (False, True))
    nearest = _E2M1[torch.where(down % 2 == 0, down, up)]  # of two as near the even one
    return (nearest.copysign(scaled) * of_blocks).flatten(1), scale


def codes_of(weight: Tensor) -> Tensor:
    """What a base has in FP8, INT8 or NVFP4, float32 [out, in]."""
    if weight.dim() < 3:
        return weight.float()
    pairs = weight[:, :8].flatten(1)
    index = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1).int()
    value = _E2M1[index & 7] * (1.0 - 2.0 * (index >> 3))
    return value * weight[:, 8].contiguous().view(E4M3).float().repeat_interleave(16, 1)


def operand(config: FalqonConfig) -> torch.dtype:
    """What x and A are cast to, and W unless it is NVFP4."""
    return INT8 if config.base_dtype == "int8" else E4M3


@dataclass(frozen=True)
class Lora:
    """One adapter: ``x`` is what it reads where that is not the layer's x (dropout); ``codes``,
    ``scale`` are its A in FP8, and ``b`` what is added to the output, None where nothing is.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    codes: Tensor
    scale: Tensor
    b: Tensor | None
    x: Tensor | None = None

    @classmethod
    def of(
        cls, a: Tensor, b: Tensor, scaling: float, config: FalqonConfig, x: Tensor | None = None
    ) -> Lora:
        """From the parameters as they are."""
        row, pow2 = config.granularity == "row", config.scale == "pow2"
        codes, scale = cast(a.detach().float(), operand(config), row, pow2)
        return cls(a, b, scaling, codes, scale, b.detach().float() * scaling, x)

    @classmethod
    def written(cls, a: Tensor, b: Tensor, state: MergedAdapter) -> Lora:
        """From what update="rows" has in W': the rest of B is added with pending="apply", and with
        "hold" in evaluation.
        """
        out, spec = state.applied.shape[0], state.spec
        scale = state.scale[out:] if spec.granularity == "row" else state.scale
        evaluates = spec.pending == "hold" and not torch.is_grad_enabled()
        rest = None
        if spec.pending == "apply" or evaluates:
            rest = (b.detach().float() - state.applied.float()) * state.scaling
        return cls(a, b, state.scaling, state.weight.float()[out:], scale, rest)


@dataclass(frozen=True)
class Layer:
    """A linear layer: W ≈ ``codes`` · ``scale`` [out, in], with its adapters."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None = None
    adapters: tuple[Lora, ...] = ()

    @property
    def per_row(self) -> bool:
        return self.scale.dim() == 2

    @classmethod
    def of(
        cls, weight: Tensor, bias: Tensor | None, adapters: Sequence[Lora], config: FalqonConfig
    ) -> Layer:
        """From a base weight W [out, in]."""
        row, pow2 = config.granularity == "row", config.scale == "pow2"
        wide = weight.detach().float()
        if config.base_dtype == "nvfp4":
            return cls(*cast_nvfp4(wide, pow2), bias, tuple(adapters))
        codes, scale = cast(wide, operand(config), row, pow2)
        return cls(codes, scale, bias, tuple(adapters))

    @classmethod
    def written(cls, state: MergedAdapter, bias: Tensor | None, adapters: Sequence[Lora]) -> Layer:
        """From W' = [W; A] of update="rows"."""
        out, scale = state.applied.shape[0], state.scale
        codes = state.weight.float()[:out]
        return cls(codes, scale[:out] if scale.dim() else scale, bias, tuple(adapters))


def linear(x: Tensor, layers: Sequence[Layer], config: FalqonConfig = DEFAULTS) -> list[Tensor]:
    """The results [..., out_i], float32, of layers that share x [..., in] and became one op."""
    loras = [lora for layer in layers for lora in layer.adapters]
    own = [x if lora.x is None else lora.x for lora in loras]
    own = own if any(lora.x is not None for lora in loras) else []
    biases = [layer.bias for layer in layers if layer.bias is not None]
    given = [x, *own, *(m.lora_a for m in loras), *(m.lora_b for m in loras), *biases]
    return [y.reshape(*x.shape[:-1], -1) for y in _Linear.apply(list(layers), config, *given)]


class _Linear(torch.autograd.Function):
    """On x [..., in], what each adapter reads if that is another, each A, each B, each bias.

    What dL/dx gets from products that no scale follows (all of them with scale="pow2" or INT8, else
    those of the adapters) is one GEMM; other products are summed before it in the layers' order.
    """

    @staticmethod
    def forward(
        ctx: Any, layers: list[Layer], config: FalqonConfig, x: Tensor, *rest: Tensor
    ) -> Any:
        row, pow2 = config.granularity == "row", config.scale == "pow2"
        loras = [lora for layer in layers for lora in layer.adapters]
        own = rest[: len(loras)] if any(lora.x is not None for lora in loras) else ()
        shape = x.shape
        own = tuple(t.reshape(-1, shape[-1]) for t in own)
        x = x.reshape(-1, shape[-1])
        codes, s_x = cast(x, operand(config), row, pow2)
        read = [cast(x_j, operand(config), row, pow2) for x_j in own] or [(codes, s_x)] * len(loras)
        # One GEMM where all A read the same: a library may sum one column in another order than
        # several.
        if own:
            sums = [q @ lora.codes.t() for (q, _), lora in zip(read, loras, strict=True)]
        elif loras:
            product = codes @ torch.cat([lora.codes for lora in loras]).t()
            sums = list(product.split([len(lora.codes) for lora in loras], dim=1))
        else:
            sums = []
        scaled = [
            o * s * (lora.scale.t() if row else lora.scale)
            for o, (_, s), lora in zip(sums, read, loras, strict=True)
        ]
        out_a = torch.cat(scaled, 1).split([o.shape[1] for o in scaled], 1) if scaled else ()
        parts, results = iter(out_a), []
        for layer in layers:
            y = codes @ layer.codes.t() * s_x * (layer.scale.t() if layer.per_row else layer.scale)
            for lora in layer.adapters:
                part = next(parts)
                if lora.b is not None:
                    y = torch.addmm(y, part, lora.b.t())
            results.append(y if layer.bias is None else y + layer.bias)
        ctx.layers, ctx.config, ctx.apart, ctx.shape = layers, config, len(own), shape
        ctx.read, ctx.out_a = read, out_a
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        config, numbers = ctx.config, iter(range(len(ctx.out_a)))
        row, pow2 = config.granularity == "row", config.scale == "pow2"
        fp8 = E5M2 if config.grad_dtype == "e5m2" else E4M3
        products: list[Tensor] = []
        through: list[tuple[Tensor, Tensor]] = []  # of W
        besides: list[tuple[Tensor, Tensor]] = []  # of the adapters
        grad_a: list[Tensor | None] = [None] * len(ctx.out_a)
        grad_b, own, bias = [*grad_a], [None] * ctx.apart, []
        reached: dict[int, tuple[Lora, Tensor]] = {}
        for layer, grad in zip(ctx.layers, grads, strict=True):
            mine = [(next(numbers), lora) for lora in layer.adapters]
            of_rows = layer.per_row
            if layer.bias is not None:
                bias.append(None if grad is None else grad.sum(0))
            if grad is None:
                continue
            if config.base_dtype == "int8":
                turned = layer.scale.t() if of_rows else layer.scale
                through.append((grad * turned, layer.codes))
            elif pow2:
                codes, s_g = cast(grad * layer.scale.t() if of_rows else grad, fp8, row, pow2)
                through.append((codes * s_g, layer.codes * (1.0 if of_rows else layer.scale)))
            else:
                codes, s_g = cast(grad * layer.scale.t() if of_rows else grad, fp8, row, pow2)
                products.append(codes @ layer.codes * s_g * (1.0 if of_rows else layer.scale))
            for j, lora in mine:
                grad_b[j] = grad.t() @ ctx.out_a[j] * lora.scaling
                d = grad @ (lora.lora_b * lora.scaling if lora.b is None else lora.b)
                reached[j] = lora, d
                if lora.b is None:
                    continue
                if ctx.apart:
                    own[j] = (d @ (lora.codes * lora.scale)).reshape(ctx.shape)
                else:
                    besides.append((d * (lora.scale.t() if row else lora.scale), lora.codes))
        for group in _made_together(reached, ctx.apart):
            q, s_x = ctx.read[group[0]]
            made = (torch.cat([reached[j][1] for j in group], 1) * s_x).t() @ q
            for j, part in zip(group, made.split([reached[j][1].shape[1] for j in group])):
                grad_a[j] = part
        pairs = [*through, *besides]
        if pairs:  # one GEMM: a library may sum two in another order
            products.append(torch.cat([a for a, _ in pairs], 1) @ torch.cat([b for _, b in pairs]))
        grad_x = functools.reduce(torch.add, products).reshape(ctx.shape) if products else None
        return None, None, grad_x, *own, *grad_a, *grad_b, *bias


def _made_together(reached: dict[int, tuple[Lora, Tensor]], apart: int) -> list[list[int]]:
    """The adapters whose dL/dA is one GEMM: all, where they read one x, each trains A and B, and
    all A have one dtype.
    """
    of_a = [j for j, (lora, _) in reached.items() if lora.lora_a.requires_grad]
    of_b = [j for j, (lora, _) in reached.items() if lora.lora_b.requires_grad]
    one_dtype = len({reached[j][0].lora_a.dtype for j in of_a}) == 1
    return [of_a] if not apart and of_a == of_b and one_dtype else [[j] for j in of_a]


def emulate(
    model: nn.Module,
    states: Mapping[str, Adapter | MergedAdapter],
    config: FalqonConfig | None = None,
    frozen: Iterable[str] = (),
) -> nn.Module:
    """Make the LoRA layers at the paths of ``states``, as `falqon_fx.adapters` gives them for the
    model or for its original, and the linear layers at ``frozen`` compute what the backend does.

    PEFT's layers follow `set_adapter`, `scale_layer` and dropout, and parameters keep their names.
    ``config``: the options that the model was compiled with; those of update="rows" are in its
    states. Don't copy a model that has been through this.
    """
    for path, state in states.items():
        _replace_forward(model.get_submodule(path), state, config or _config_of(state))
    for path in frozen:
        _replace_frozen(model.get_submodule(path), config or DEFAULTS)
    return model


def _config_of(state: Adapter | MergedAdapter) -> FalqonConfig:
    if not isinstance(state, MergedAdapter):
        return DEFAULTS
    spec: Any = state.spec
    return FalqonConfig(granularity=spec.granularity, scale=spec.scale, grad_dtype=spec.grad)


def _replace_frozen(module: Any, config: FalqonConfig) -> None:
    if isinstance(module, Fp8Linear):
        base = module.base()
        layer = Layer(codes_of(base.weight), base.scale, module.bias)
    else:
        layer = Layer.of(module.weight, module.bias, (), config)
    module.forward = lambda x: linear(x, [layer], config)[0]


def _replace_forward(module: Any, state: Any, config: FalqonConfig) -> None:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        loras: list[Lora] = []
        bias = module.base_layer.bias
        for a, b, scaling, dropout in active(module):
            if isinstance(state, MergedAdapter):
                loras.append(Lora.written(a, b, state))
            else:
                drops = dropout is not None and dropout.p and dropout.training
                loras.append(Lora.of(a, b, scaling, config, dropout(x) if drops else None))
        if isinstance(state, MergedAdapter):
            layer = Layer.written(state, bias, loras)
        else:
            layer = Layer(codes_of(state.weight), state.scale, bias, tuple(loras))
        return linear(x, [layer], config)[0]

    module.forward = forward


def active(module: Any) -> list[tuple[Any, Any, float, Any]]:
    """(A, B, scaling, dropout) of the adapters that a layer adds now: PEFT's, or one of tests/."""
    if not isinstance(module.lora_A, nn.ModuleDict):
        return [(module.lora_A.weight, module.lora_B.weight, module.scaling, None)]
    if module.disable_adapters:
        return []
    names = [name for name in module.active_adapters if name in module.lora_A]
    return [
        (
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            module.scaling[name],
            module.lora_dropout[name]
            if isinstance(module.lora_dropout[name], nn.Dropout)
            else None,
        )
        for name in names
    ]
