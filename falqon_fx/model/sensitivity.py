"""How much each layer's casts cost: the expected rise of the loss, by Fisher information.

Of a small change δO_t of a layer's output at the tokens t of a sequence, the KL divergence of what
the model says to what it said is, to second order,

    ½ · E[(Σ_t ⟨dL/dO_t, δO_t⟩)²]       L = -Σ log p(y), y drawn from the model's own p

and here δO = dq(q(x)) · dq(q(W))ᵀ - x · Wᵀ. One forward and one backward pass tell of all layers;
their sum neglects that errors of several layers meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.config import FalqonConfig
from falqon_fx.errors import FalqonError
from falqon_fx.model.agreement import check_same_on_all_ranks, has_others
from falqon_fx.model.batches import Tell, batches_of, input_of, quietly, run_batch
from falqon_fx.model.lora_layers import LinearLayer
from falqon_fx.ops.lowering import cast_operand
from falqon_fx.site.base import Base, cast_base, check_weight
from falqon_fx.site.numerics import without_autocast
from falqon_fx.site.spec import SiteSpec

_LOGITS = (
    "Give a model that returns logits [batch, tokens, classes] or [batch, classes], or has them as "
    ".logits"
)


@dataclass(frozen=True)
class CastCost:
    """The expected rise of the loss per label, in nats, by the casts of a layer, and what it would
    be by the cast of W or of x alone.
    """

    both: float
    of_weight: float
    of_x: float


def sensitivity(costs: Mapping[str, CastCost]) -> dict[str, float]:
    """What both casts cost, by site; the largest first."""
    return dict(sorted(((s, c.both) for s, c in costs.items()), key=lambda item: -item[1]))


def cast_costs(
    model: nn.Module,
    layers: Sequence[LinearLayer],
    batches: Iterable[Any],
    config: FalqonConfig,
    *,
    together: bool = False,
    show: Tell = lambda text: None,
) -> dict[str, CastCost]:
    """What the casts of each of ``layers`` cost, by site; of one that no gradient reaches nothing.
    Labels are drawn with the config's seed, at all tokens but those that ``labels`` or
    ``attention_mask`` of a batch leave out. The model is as it was afterwards. With ``together``
    all processes call it, each with batches of its own, and get the same.

    Raises:
        FalqonError: no layers, no batch, one that the model can't take, a result without logits,
            NaN or Inf in a weight or a gradient, layers that are cut over processes.
    """
    check_any(layers)
    for layer in layers:
        if is_dtensor(layer.module.weight):
            problem = "its base weight is cut over processes"
            raise FalqonError(layer.site, problem, "Look at the model in one process")
        check_weight(layer.site, layer.module.weight)
    look = _Look(SiteSpec.from_config(config))
    generators: dict[torch.device, torch.Generator] = {}
    labels = 0
    with quietly(model, grad=True), look.at(layers):
        for number, batch in enumerate(batches_of(batches)):
            logits = _logits(run_batch(model, batch, number), number)
            device = logits.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(config.seed)
            loss, count = _sampled_loss(logits, batch, generators[device])
            look.meet(loss)
            labels += count
            show(f"{number + 1} batches, {labels} labels: what casts cost")
    if together:
        labels = _add_up(look.totals, labels, layers[0].weight.device)
    if not labels:
        raise FalqonError("calibration", "there is no label in its batches", _LOGITS)
    for site, total in look.totals.items():
        if not bool(total.isfinite().all()):
            problem = "the gradient of its output in the calibration holds NaN or Inf"
            raise FalqonError(site, problem, "Look at the batches")
    return {site: CastCost(*(total / labels).tolist()) for site, total in look.totals.items()}


def check_any(layers: Sequence[LinearLayer]) -> None:
    """Raise where there is nothing to calibrate."""
    if not layers:
        raise FalqonError(
            "calibration",
            "the model has no layer that is to be cast: its base weights are gone, or left out",
            "Calibrate a model that has its base weights, before or with prepare",
        )


def _add_up(totals: dict[str, Tensor], labels: int, device: torch.device) -> int:
    """The sums over all processes; the labels of all."""
    if not has_others():
        return labels
    check_same_on_all_ranks("\n".join(totals))
    every = torch.stack([torch.full((3,), labels, dtype=torch.float64), *totals.values()])
    every = every.to(device)
    dist.all_reduce(every)
    totals.update(zip(totals, every[1:].cpu(), strict=True))
    return int(every[0, 0])


class _Look:
    """Keeps the output of each layer in a batch with its errors, until the gradients come."""

    def __init__(self, spec: SiteSpec) -> None:
        self.spec = spec
        self.totals: dict[str, Tensor] = {}  # by both casts, W's, x's; float64 [3]
        self._seen: list[tuple[str, Tensor, tuple[Tensor, Tensor]]] = []  # site, O, δO of W and x
        self._backward = False  # where activation checkpoints call the layers once more
        self._bases: dict[str, Base] = {}  # by site

    @contextmanager
    def at(self, layers: Sequence[LinearLayer]) -> Iterator[None]:
        hooks = [
            layer.module.register_forward_hook(self._hook(layer), with_kwargs=True)
            for layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, layer: LinearLayer) -> Any:
        def seen(
            module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor
        ) -> Tensor:
            if not torch.is_grad_enabled():  # the model's own choice: nothing leads on from here
                return output
            # Where nothing before it trains, the gradient's way begins here.
            result = output if output.requires_grad else output.detach().requires_grad_()
            if not self._backward:
                errors = self._errors(layer, input_of(given, named).detach())
                self._seen.append((layer.site, result, errors))
            return result.clone()  # what comes next may write into it

        return seen

    @without_autocast
    def _errors(self, layer: LinearLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the casts of W and of x do to O, float32 [n, out] each: x · (Ŵ - W)ᵀ and
        (x̂ - x) · Ŵᵀ.
        """
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        cast = cast_operand(flat, self.spec, torch.float32)
        weight = layer.weight.detach()
        if layer.site not in self._bases:  # the same in each batch
            self._bases[layer.site] = cast_base(weight, self.spec)
        dequantized = self._bases[layer.site].dequantize()
        of_x = (cast.value * cast.rest - flat) @ dequantized.t()
        return flat @ dequantized.sub_(weight).t(), of_x

    def meet(self, loss: Tensor) -> None:
        """The end of a batch: ½ · (Σ_t ⟨dL/dO_t, δO_t⟩)² of each sequence, over all calls of a
        layer.
        """
        moved: dict[str, list[Tensor]] = {}
        for (site, out, errors), grad in zip(self._seen, self._grads(loss), strict=True):
            if grad is not None:
                sequences = len(out) if out.dim() > 2 else 1
                flat = grad.reshape(errors[0].shape).to(torch.float32)
                of_w, of_x = ((flat * e).reshape(sequences, -1).sum(1) for e in errors)
                each = torch.stack([of_w + of_x, of_w, of_x]).double()
                moved.setdefault(site, []).append(each)
        for site, calls in moved.items():
            alike = len({each.shape for each in calls}) == 1
            each = torch.stack(calls).sum(0) if alike else torch.cat(calls, 1)
            total = 0.5 * each.square().sum(1).cpu()
            self.totals[site] = self.totals.get(site, 0.0) + total
        self._seen.clear()

    def _grads(self, loss: Tensor) -> Sequence[Tensor | None]:
        """dL/dO of what was seen."""
        self._backward = True
        try:
            return torch.autograd.grad(loss, [out for _, out, _ in self._seen], allow_unused=True)
        except RuntimeError as error:
            problem = f"the model's gradients can't be had ({error})"
            remedy = "Look at the batches; checkpoint activations with use_reentrant=False alone"
            raise FalqonError("calibration", problem, remedy) from error
        finally:
            self._backward = False


def _logits(result: Any, number: int) -> Tensor:
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        raise FalqonError("calibration", f"the model returns a {type(result).__name__}", _LOGITS)
    if not logits.requires_grad:
        raise FalqonError("calibration", "no layer to be cast leads to the model's logits", _LOGITS)
    if not bool(logits.isfinite().all()):
        problem = f"the model's logits of its batch {number} hold NaN or Inf"
        raise FalqonError("calibration", problem, "Look at the batches, and at the model's weights")
    return logits


def _sampled_loss(logits: Tensor, batch: Any, generator: torch.Generator) -> tuple[Tensor, int]:
    """-Σ log p(y) of labels drawn from p, and how many there are."""
    flat = logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
    drawn = torch.multinomial(flat.detach().exp(), 1, generator=generator)
    kept = _kept(logits, batch).reshape(-1)
    return -(flat.gather(1, drawn)[:, 0] * kept).sum(), int(kept.sum())


def _kept(logits: Tensor, batch: Any) -> Tensor:
    """Which tokens predict something: those before a label, or all that are no padding. Of
    sequences that are classified each has its label.
    """
    every = torch.ones(logits.shape[:-1], dtype=torch.float32, device=logits.device)
    given = batch if isinstance(batch, Mapping) else {}
    labels, mask = given.get("labels"), given.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == every.shape and every.dim() == 1:
        every *= (labels != -100).to(every)
    elif isinstance(labels, Tensor) and labels.shape == every.shape:
        every[..., :-1] = (labels[..., 1:] != -100).to(every)
        every[..., -1] = 0
    elif isinstance(mask, Tensor) and mask.shape == every.shape:
        every *= mask.to(every)
    return every
