"""The channels of x that a calibration picks: how many, by what, and where W_S stands in W.

    python benchmarks/channels.py

SmolLM2-135M-Instruct, untrained, in float32; texts and labels are those of
``benchmarks/calibration.py``, the calibration reads 128 chats of its first sample.

- "casts": KL per label with x alone cast in all linear layers, products exact, and the picked
  channels of x left as they are: in INT8 they don't count for a token's scale.
- "weights": how far the outputs of layers of four blocks are off over the held-out chats with the
  weights that ``prepare`` leaves outside of compiled code, ‖(Ŵ - W) · x‖ / ‖W · x‖: with
  Ŵ = dq(W) + B_c · A_c, and with W_S in its channels.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import calibration
import common
import forms
import torch
from forms import Cast, by_row, int8
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.config import BaseDtype
from falqon_fx.model.fp8_linear import Fp8Linear
from falqon_fx.site.compensate import heaviest_channels

SAMPLE, CHATS = 0, 128
BEYOND = 4  # root mean squares of a token
BLOCKS = (0, 10, 20, 29)
Sites = dict[str, nn.Linear]


@dataclass
class Seen:
    """Sums over tokens of what a layer reads, [in] each: x², how often |x| is beyond `BEYOND` root
    mean squares of its token, and by how much.
    """

    squares: Tensor | float = 0.0
    often: Tensor | float = 0.0
    excess: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:
        beyond = x.abs() - BEYOND * x.square().mean(-1, keepdim=True).sqrt()
        self.squares += x.square().sum(0)
        self.often += (beyond > 0).float().sum(0)
        self.excess += beyond.clamp(min=0).sum(0)


Score = Callable[[Seen, Tensor], Any]  # of the channels, from what was seen and W


def of_x(seen: Seen, weight: Tensor) -> Any:
    return seen.squares


def of_outputs(seen: Seen, weight: Tensor) -> Any:
    return seen.squares * weight.square().sum(0)


@dataclass(frozen=True)
class Variant:
    """How x is cast, and the ``count`` channels with the largest score that are not."""

    title: str
    cast: Cast
    count: int = 0
    score: Score = of_x


VARIANTS = (
    Variant("INT8, one step for all channels", int8),
    *(Variant(f"INT8, {n} with the largest E[x_c²] left out", int8, n) for n in (4, 8, 16, 32)),
    Variant(f"INT8, 16 most often beyond {BEYOND} rms", int8, 16, lambda seen, _: seen.often),
    Variant(f"INT8, 16 most beyond {BEYOND} rms", int8, 16, lambda seen, _: seen.excess),
    Variant("FP8", by_row),
    Variant("FP8, 16 with the largest E[x_c²] · ‖W_c‖² left out", by_row, 16, of_outputs),
)


@dataclass(frozen=True)
class Judged:
    """KL per label and its standard error."""

    variant: str
    chats: tuple[float, float, int]
    reviews: tuple[float, float, int]


@dataclass(frozen=True)
class Layer:
    """The error of a layer's outputs, with W_S in its weight and without."""

    base_dtype: str
    site: str
    with_columns: float
    without: float

    @property
    def ratio(self) -> float:
        return self.with_columns / self.without


@torch.no_grad()
def read(model: nn.Module, sites: Sites, batches: Sequence[Any], see: Any) -> None:
    """Call ``see(site, x)`` with what each site reads, [tokens, in]."""

    def hook(name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            see(name, given[0].flatten(0, -2))

        return keep

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in sites.items()]
    for batch in batches:
        model(**batch)
    for of_layer in hooks:
        of_layer.remove()


# ---------------------------------------------------------------- the cast of x


def leaving(cast: Cast, picked: Tensor) -> Any:
    """A hook that casts x but for the channels picked."""

    def hook(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = given[0]
        return (cast(x.index_fill(-1, picked, 0)).index_copy(-1, picked, x[..., picked]),)

    return hook


def casts(bench: calibration.Bench, batches: Sequence[Any]) -> Iterator[Judged]:
    sites = forms.layers(bench.base)
    seen = {name: Seen() for name in sites}
    read(bench.base, sites, batches, lambda name, x: seen[name].add(x))
    for variant in VARIANTS:
        hooks = []
        for name, layer in sites.items():
            score = variant.score(seen[name], layer.weight)
            picked = heaviest_channels(score, None, variant.count)[0].long()
            hooks.append(layer.register_forward_pre_hook(leaving(variant.cast, picked)))
        said = [
            calibration.log_probabilities(bench.base, e) for e in (bench.held_out, bench.reviews)
        ]
        for hook in hooks:
            hook.remove()
        chats, reviews = map(calibration.divergence, bench.wanted, said)
        yield Judged(variant.title, chats, reviews)


# ---------------------------------------------------------------- W_S in W


def moments(bench: calibration.Bench) -> dict[str, Tensor]:
    """Σ x · xᵀ over the held-out chats, of what each layer of `BLOCKS` reads."""
    every = forms.layers(bench.base).items()
    sites = {n: m for n, m in every if any(f".layers.{b}." in n for b in BLOCKS)}
    sums = {n: torch.zeros(m.in_features, m.in_features) for n, m in sites.items()}
    batches = [{"input_ids": e.ids} for e in bench.held_out]
    read(bench.base, sites, batches, lambda name, x: sums[name].addmm_(x.t(), x))
    return sums


@torch.no_grad()
def weights(
    bench: calibration.Bench,
    base_dtype: BaseDtype,
    batches: Sequence[Any],
    held_out: dict[str, Tensor],
) -> Iterator[Layer]:
    model = copy.deepcopy(bench.base)
    config = FalqonConfig(inner="eager", base_dtype=base_dtype, include=tuple(held_out))
    falqon_fx.prepare(model, config, calibration=batches, progress=False)
    for name, moment in held_out.items():
        weight, layer = bench.base.get_parameter(f"{name}.weight"), model.get_submodule(name)
        assert isinstance(layer, Fp8Linear)
        terms: dict[str, Tensor] = dict(layer.terms)
        product = terms["error_b"].float() @ terms["error_a"].float()
        without = layer.base().dequantize() + product
        put = without.index_copy(1, terms["channels"].long(), terms["columns"].float())
        sizes = [float(((m @ moment) * m).sum()) for m in (put - weight, without - weight, weight)]
        with_columns, alone = (math.sqrt(size / sizes[2]) for size in sizes[:2])
        yield Layer(base_dtype, name, with_columns, alone)


# ---------------------------------------------------------------- report


def page(judged: Sequence[Judged], layers: Sequence[Layer]) -> str:
    def kl(of: tuple[float, float, int]) -> str:
        return f"{of[0]:.4f} ± {of[1]:.4f}"

    rows = [[of.variant, kl(of.chats), kl(of.reviews)] for of in judged]
    header = ("cast of x", "KL of chats", "KL of reviews")
    title = "The channels of x that a calibration picks"
    text = common.markdown(title, common.environment(), header, rows)
    for of in judged[:1]:
        text += (
            f"\n{of.chats[2]} labels of chats, {of.reviews[2]} of reviews; ± is a standard error."
        )
    text += "\n\nErrors of outputs outside of compiled code:\n\n"
    columns = ("base_dtype", "layers", "without W_S", "with W_S", "ratio", "of each layer")
    rows = []
    for kind in dict.fromkeys(of.base_dtype for of in layers):
        own = [of for of in layers if of.base_dtype == kind]
        ratios = [of.ratio for of in own]
        without = statistics.geometric_mean(of.without for of in own)
        put = statistics.geometric_mean(of.with_columns for of in own)
        each = f"{min(ratios):.3f} to {max(ratios):.3f}"
        errors = [f"{without:.5f}", f"{put:.5f}", f"{put / without:.3f}"]
        rows.append([kind, str(len(own)), *errors, each])
    text += "\n".join(common.markdown_table(columns, rows))
    return text + f"\n\nBlocks {', '.join(map(str, BLOCKS))}; geometric means over layers.\n"


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(argv)
    bench = calibration.Bench(CHATS)
    batches = bench.sample(SAMPLE, CHATS)
    layers, judged = list[Layer](), list[Judged]()
    held_out = moments(bench)
    for kind in get_args(BaseDtype):
        for layer in weights(bench, kind, batches, held_out):
            print(layer, f"{layer.ratio:.3f}", flush=True)
            layers.append(layer)
        write(judged, layers)
    for of in casts(bench, batches):
        print(of, flush=True)
        judged.append(of)
        write(judged, layers)


def write(judged: Sequence[Judged], layers: Sequence[Layer]) -> None:
    """The results as JSON and as a page."""
    file = common.result_path("channels", ".json")
    found = {"casts": [asdict(of) for of in judged], "weights": [asdict(of) for of in layers]}
    common.write_json(file, {"environment": common.environment(), **found})
    file.with_suffix(".md").write_text(page(judged, layers), encoding="utf-8")


if __name__ == "__main__":
    main()
