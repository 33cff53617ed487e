"""Ways to round W and to choose what a calibration buys back: KL per label of the untrained model.

    python benchmarks/roundings.py --keep FOLDER
    python benchmarks/roundings.py --keep FOLDER --seeds 0 --variants plain gptq

SmolLM2-135M-Instruct in float32, the casts emulated as in ``benchmarks/forms.py``: bytes that this
library could hold, products exact. Calibrated on 128 chats a sample (``--chats``; a folder for each
number), judged on all held-out chats and on twice the reviews of ``benchmarks/calibration.py``,
since a few labels make most of a KL's error. Differences are paired: the mean over labels of one
variant's KL minus another's, and its standard error, so that what is hard to say for both is not
counted as noise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import calibration
import common
import smollm
import torch
from forms import by_row, layers
from torch import Tensor, nn
from weighted import (
    Factors,
    Rounding,
    Seen,
    along,
    gptq,
    heaviest,
    low_rank,
    nearest,
    of_gradients,
    of_inputs,
    of_units,
    read,
    searched,
)

CHATS = 128  # of a sample
REVIEWS = 80
LEFT = 8


@dataclass(frozen=True)
class Variant:
    """``first``: the product of low rank is found for nearest rounding, and the rest is rounded."""

    rounding: Rounding = nearest
    factors: Factors | None = None
    channels: Rounding | None = None
    first: bool = False
    calibrated: bool = True
    leave: str = ""  # `LEFT` layers that aren't cast, by what their casts cost "before" or "after"


LOW, HEAVY = low_rank(of_inputs), heaviest(of_inputs)
LOW_UNITS, HEAVY_UNITS = low_rank(of_units), heaviest(of_units)
LOW_GRAD, HEAVY_GRAD = low_rank(of_gradients), heaviest(of_gradients)
LOW_BOTH, HEAVY_BOTH = low_rank(of_gradients, "all"), heaviest(of_gradients, "all")
VARIANTS = {
    "plain": Variant(calibrated=False),
    "searched": Variant(searched),
    "gptq": Variant(gptq(of_inputs)),
    "gptq, units": Variant(gptq(of_units)),
    "gptq, gradients": Variant(gptq(of_gradients)),
    "both": Variant(nearest, LOW, HEAVY),
    "both, units": Variant(nearest, LOW_UNITS, HEAVY_UNITS),
    "both, gradients": Variant(nearest, LOW_GRAD, HEAVY_GRAD),
    "both, gradients and outputs": Variant(nearest, LOW_BOTH, HEAVY_BOTH),
    "both, outputs": Variant(nearest, low_rank(of_inputs, "all"), heaviest(of_inputs, "all")),
    "both, sizes of outputs": Variant(
        nearest, low_rank(of_inputs, "sizes"), heaviest(of_inputs, "sizes")
    ),
    "8 ranks, 32 channels": Variant(
        nearest, low_rank(of_inputs, ranks=8), heaviest(of_inputs, count=32)
    ),
    "both, 8 left": Variant(nearest, LOW, HEAVY, leave="before"),
    "both, 8 left by the rest": Variant(nearest, LOW, HEAVY, leave="after"),
    "searched, both": Variant(searched, LOW_UNITS, HEAVY_UNITS),
    "gptq, both": Variant(gptq(of_units), LOW_UNITS, HEAVY_UNITS),
    "both, gptq": Variant(gptq(of_units), LOW_UNITS, HEAVY_UNITS, first=True),
    "both, along x": Variant(along(of_inputs), None, HEAVY),
}


@dataclass(frozen=True)
class Cast:
    """Ŵ with what was added to it, and the channels of x that are brought back."""

    weight: Tensor
    picked: Tensor = torch.empty(0, dtype=torch.int64)  # noqa: RUF009  no one writes it


def cast(weight: Tensor, variant: Variant, seen: Seen | None) -> Cast:
    if seen is None:
        return Cast(by_row(weight))
    target, product = weight, torch.zeros(())
    if variant.factors:
        rounding = nearest if variant.first else variant.rounding
        a, b = variant.factors(weight - rounding(weight, seen), seen)
        product = b.bfloat16().float() @ cast_row(a)
        target = weight - product if variant.first else weight
    whole = variant.rounding(target, seen) + product
    return Cast(whole, variant.channels(weight, seen)) if variant.channels else Cast(whole)


def cost(weight: Tensor, of: Cast, seen: Seen) -> float:
    """The expected rise of the loss a token, ½ · E[(g · δO)²], as if g and x were independent but
    for their sizes, and the cast error of x one of 2.6% of each channel.
    """
    moment, grads = of_gradients(seen), seen.outputs / seen.tokens
    error = of.weight - weight
    of_weight = float(((grads @ error) * (error @ moment)).sum())
    channels = (weight * (grads @ weight)).sum(0) * moment.diagonal()
    channels[of.picked] = 0
    return 0.5 * (of_weight + 0.026**2 * float(channels.sum()))


def cast_row(values: Tensor) -> Tensor:
    """A_c as it is multiplied: in bf16, then in FP8."""
    return by_row(values.bfloat16().float())


class Bench:
    """The model, the texts, what the model says of them, and W as it was."""

    def __init__(self, folder: Path, count: int = CHATS) -> None:
        self.folder, self.count = folder, count
        base, self.tokenizer = smollm.load_model()
        self.base = base.float().eval().requires_grad_(False)
        data = smollm.split(smollm.chatterbot_pairs())
        self.train = data.train
        texts = calibration.chats(self.tokenizer, data.held_out)
        texts_reviews = calibration.reviews(self.tokenizer, REVIEWS)
        self.texts = [calibration.together(t) for t in (texts, texts_reviews)]
        file = folder / "wanted.pt"
        if not file.exists():
            torch.save(self.said(), file)
        self.wanted: list[list[Tensor]] = torch.load(file)
        self.sites = layers(self.base)
        self.weights = {name: m.weight.detach().clone() for name, m in self.sites.items()}

    def said(self) -> list[list[Tensor]]:
        return [calibration.log_probabilities(self.base, t) for t in self.texts]

    @functools.cache  # noqa: B019  there is but one
    def seen(self, seed: int) -> dict[str, Seen]:
        """What the layers read in a sample."""
        file = self.folder / f"seen-{seed}.pt"
        if not file.exists():
            fitting = calibration.chats(self.tokenizer, self.train)
            picked = random.Random(seed).sample(fitting, self.count)
            batches = [{"input_ids": example.ids} for example in calibration.together(picked)]
            torch.save(
                {n: asdict(s) for n, s in read(self.base, self.sites, batches).items()}, file
            )
        return {name: Seen(**given) for name, given in torch.load(file, mmap=True).items()}

    @torch.no_grad()
    def put(self, variant: Variant, seen: dict[str, Seen]) -> Iterator[Any]:
        """The variant's casts in the place of the layers' own; the hooks."""
        casts = {n: cast(w, variant, seen.get(n)) for n, w in self.weights.items()}
        costs: dict[str, dict[str, float]] = {"": {}, "before": {}, "after": {}}
        for name, own in seen.items() if variant.leave else ():
            weight = self.weights[name]
            costs["before"][name] = cost(weight, Cast(nearest(weight, own)), own)
            costs["after"][name] = cost(weight, casts[name], own)
        of = costs[variant.leave]
        left = sorted(of, key=lambda name: -of[name])[:LEFT]
        for name in left:
            print(name, *(f"{costs[when][name]:.5f}" for when in ("before", "after")))
        for name, layer in self.sites.items():
            if name not in left:
                layer.weight.copy_(casts[name].weight)
                outliers = Outliers(casts[name].picked, self.weights[name])
                yield layer.register_forward_pre_hook(outliers.before)
                yield layer.register_forward_hook(outliers.after)

    @torch.no_grad()
    def each(self, name: str, seed: int) -> list[list[float]]:
        """KL of every label, of chats and of reviews."""
        variant = VARIANTS[name]
        seed = seed if variant.calibrated else -1
        file = self.folder / f"{name.replace(' ', '_')}-{seed}.json"
        if file.exists():
            found: list[list[float]] = common.read_json(file)
            return found
        hooks = [*self.put(variant, self.seen(seed) if variant.calibrated else {})]
        said = self.said()
        for hook in hooks:
            hook.remove()
        for site, layer in self.sites.items():
            layer.weight.copy_(self.weights[site])
        found = [
            torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(*pair, strict=True)]).tolist()
            for pair in zip(self.wanted, said, strict=True)
        ]
        common.write_json(file, found)
        return found


class Outliers:
    """Hooks of a layer that reads x̂: the cast error of x in a few channels is added to O."""

    def __init__(self, picked: Tensor, weight: Tensor) -> None:
        self.picked, self.columns = picked, weight[:, picked]
        self.error = torch.empty(0)

    def before(self, _: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = by_row(given[0])
        self.error = (given[0] - x)[..., self.picked]
        return (x,)

    def after(self, _: nn.Module, given: Any, out: Tensor) -> Tensor:
        return out + self.error @ self.columns.t() if len(self.picked) else out


# ---------------------------------------------------------------- report


@dataclass(frozen=True)
class Judged:
    """KL per label and its standard error; the same of the differences from "plain" and from "both"
    of the same sample, over the same labels; and of the difference of √KL from "both"'s: a label in
    a thousand makes a tenth of a mean KL, and little of that.
    """

    variant: str
    seed: int
    texts: str
    labels: int
    kl: tuple[float, float]
    from_plain: tuple[float, float]
    from_both: tuple[float, float] | None
    roots_from_both: tuple[float, float] | None


def mean_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def judge(bench: Bench, name: str, seed: int) -> Iterator[Judged]:
    """Of chats and of reviews."""
    own, plain = bench.each(name, seed), bench.each("plain", seed)
    both = bench.each("both", seed) if VARIANTS[name].calibrated else None
    for i, texts in enumerate(("chats", "reviews")):
        kl, unaided = torch.tensor(own[i]), torch.tensor(plain[i])
        of_both = of_roots = None
        if both is not None:
            other = torch.tensor(both[i])
            of_both = mean_error(kl - other)
            of_roots = mean_error(kl.clamp(min=0).sqrt() - other.clamp(min=0).sqrt())
        of_plain = mean_error(kl - unaided)
        yield Judged(name, seed, texts, len(kl), mean_error(kl), of_plain, of_both, of_roots)


HEADER = ("variant", "sample", "texts", "KL", "- plain", "- both", "√KL - both")


def row(of: Judged) -> list[str]:
    def text(given: tuple[float, float] | None) -> str:
        return f"{given[0]:+.4f} ± {given[1]:.4f}" if given else ""

    differences = [text(d) for d in (of.from_plain, of.from_both, of.roots_from_both)]
    return [of.variant, str(of.seed), of.texts, text(of.kl)[1:], *differences]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="*", default=[*VARIANTS], choices=[*VARIANTS])
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--chats", type=int, default=CHATS, help="of a sample")
    parser.add_argument("--keep", type=Path, required=True, help="folder of what was computed")
    args = parser.parse_args(argv)
    args.keep.mkdir(parents=True, exist_ok=True)
    bench, judged = Bench(args.keep, args.chats), list[Judged]()
    for seed, name in itertools.product(args.seeds, args.variants):
        if VARIANTS[name].calibrated or seed == args.seeds[0]:
            judged += judge(bench, name, seed)
            print(*(" | ".join(row(of)) for of in judged[-2:]), sep="\n", flush=True)
            write(judged)


def write(judged: Sequence[Judged]) -> None:
    """The results as JSON and as a page."""
    order = [*VARIANTS]
    rows = sorted(judged, key=lambda of: (order.index(of.variant), of.texts, of.seed))
    file = common.result_path("roundings", ".json")
    runs = [asdict(of) for of in rows]
    common.write_json(file, {"environment": common.environment(), "runs": runs})
    title = "KL per label of the untrained model, by how W is rounded and what is added to it"
    page = common.markdown(title, common.environment(), HEADER, [row(of) for of in rows])
    page += "\n± is a standard error over labels; differences are those of the same labels.\n"
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
