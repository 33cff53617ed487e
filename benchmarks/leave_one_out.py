"""Does the Fisher column of `falqon_fx.explain` name the layers whose casts cost most?

    python benchmarks/leave_one_out.py

An interrupted run goes on with the layers that are left, from its file of the same day.

SmolLM2-135M-Instruct in float32, untrained. The column is computed on chats of the training split,
a calibration of ``benchmarks/calibration.py``. For each of the 210 layers two things are measured
on held-out chats: the KL per token of the model in which its casts are the only ones ("alone"), and
by how much KL falls where all layers are cast but this one ("left out"). Casts are emulated as in
``benchmarks/forms.py``, products exact. What comes before a layer is computed once.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import calibration
import common
import smollm
import torch
from forms import by_row
from torch import Tensor, nn

from falqon_fx import FalqonConfig
from falqon_fx.model.lora_layers import linear_layers
from falqon_fx.model.sensitivity import cast_costs

SAMPLE = 128  # chats that the column is computed on
WORST = 8


@dataclass(frozen=True)
class Row:
    """One layer: what is expected, and what was measured, in nats per token."""

    site: str
    expected: float
    alone: float
    left_out: float


class Casts:
    """W and x of linear layers in FP8 where they are ``on``, by site."""

    def __init__(self, sites: dict[str, nn.Module]) -> None:
        self.sites, self.on = sites, dict.fromkeys(sites, False)
        self.plain: dict[str, Any] = {site: layer.weight for site, layer in sites.items()}
        self.cast = {
            site: nn.Parameter(by_row(weight.detach()), requires_grad=False)
            for site, weight in self.plain.items()
        }
        for site, layer in sites.items():
            layer.register_forward_pre_hook(self._reads(site))

    def _reads(self, site: str) -> Any:
        return lambda _, given: (by_row(given[0]), *given[1:]) if self.on[site] else given

    def put(self, on: bool, *sites: str) -> None:
        for site in sites:
            self.on[site] = on
            self.sites[site].weight = (self.cast if on else self.plain)[site]

    @contextmanager
    def other(self, site: str) -> Iterator[None]:
        """One layer cast where it is not, or plain where it is cast."""
        self.put(not self.on[site], site)
        try:
            yield
        finally:
            self.put(not self.on[site], site)


class Decoder:
    """The model on some texts, from any of its decoder layers on."""

    def __init__(self, model: Any, texts: Sequence[Tensor]) -> None:
        self.model, self.texts = model, texts
        self.layers = model.model.layers

    def ahead(self) -> list[list[tuple[Any, Any]]]:
        """What each decoder layer is given, by text."""
        found: list[list[tuple[Any, Any]]] = []
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: found[-1].append((args, kwargs)), with_kwargs=True
            )
            for layer in self.layers
        ]
        for ids in self.texts:
            found.append([])
            self.model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def says(self, ahead: list[list[tuple[Any, Any]]], first: int) -> Tensor:
        """Log-probabilities [tokens, vocabulary], computed from decoder layer ``first`` on."""
        said = []
        for given in ahead:
            (hidden, *_), _ = given[first]
            for layer, (args, kwargs) in zip(self.layers[first:], given[first:], strict=True):
                made = layer(hidden, *args[1:], **kwargs)
                hidden = made[0] if isinstance(made, tuple) else made
            logits = self.model.lm_head(self.model.model.norm(hidden))
            said.append(logits.flatten(0, -2).log_softmax(-1))
        return torch.cat(said)


def divergence(wanted: Tensor, found: Tensor) -> float:
    """KL(wanted ‖ found) per token."""
    return float((wanted.exp() * (wanted - found)).sum(-1).double().mean())


def expected(model: nn.Module, tokenizer: Any, chats: Sequence[smollm.Chat]) -> dict[str, float]:
    """The column, by site."""
    picked = random.Random(0).sample(calibration.chats(tokenizer, chats), SAMPLE)
    batches = [{"input_ids": example.ids} for example in calibration.together(picked)]
    layers = [layer for layer in linear_layers(model) if ".layers." in layer.site]
    found = cast_costs(model, layers, batches, FalqonConfig())
    return {site: cost.both for site, cost in found.items()}


@torch.no_grad()
def measure(
    model: Any, column: dict[str, float], texts: Sequence[Tensor], done: set[str]
) -> Iterator[tuple[Row, float]]:
    """A row a layer that is not ``done``, and the KL of all casts."""
    casts = Casts({site: model.get_submodule(site) for site in column})
    decoder = Decoder(model, texts)
    plain = decoder.ahead()
    wanted = decoder.says(plain, 0)
    casts.put(True, *column)
    every = decoder.ahead()
    whole = divergence(wanted, decoder.says(every, 0))
    for site, cost in column.items():
        if site in done:
            continue
        first = int(site.split(".layers.")[1].split(".")[0])
        casts.put(True, *column)
        with casts.other(site):
            without = divergence(wanted, decoder.says(every, first))
        casts.put(False, *column)
        with casts.other(site):
            alone = divergence(wanted, decoder.says(plain, first))
        row = Row(site, cost, alone, whole - without)
        print(f"{site} {cost:.6f} {alone:.6f} {whole - without:+.6f}", flush=True)
        yield row, whole


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.tensor([one, other], dtype=torch.float64))[0, 1])


def ranks(values: Sequence[float]) -> list[float]:
    return torch.tensor(values).argsort().argsort().double().tolist()


def compare(rows: Sequence[Row], what: str) -> dict[str, float]:
    """How well the column tells what was measured: of its size, of its order, and of the worst."""
    found = [getattr(row, what) for row in rows]
    told = [row.expected for row in rows]
    worst = [set(sorted(range(len(rows)), key=lambda i: -of[i])[:WORST]) for of in (told, found)]
    return {
        "pearson": correlation(told, found),
        "spearman": correlation(ranks(told), ranks(found)),
        "worst_in_common": len(worst[0] & worst[1]),
        "sum_expected": sum(told),
        "sum_measured": sum(found),
        "worst_by_column": sum(found[i] for i in worst[0]),
        "worst_by_measurement": sum(found[i] for i in worst[1]),
    }


HEADER = ("layer", "expected", "alone", "left out")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=int, default=20, help="that layers are judged by")
    args = parser.parse_args(argv)
    model, tokenizer = smollm.load_model()
    model = model.float().eval().requires_grad_(False)
    data = smollm.split(smollm.chatterbot_pairs())
    texts = calibration.together(calibration.chats(tokenizer, data.held_out)[: args.chats])
    file = common.result_path("leave_one_out", ".json")
    known: dict[str, Any] = common.read_json(file) if file.exists() else {"rows": []}
    rows = [Row(**row) for row in known["rows"]]
    column = known.get("column") or expected(model, tokenizer, data.train)
    given = [text.ids for text in texts]
    tokens = sum(ids.numel() for ids in given)
    for row, whole in measure(model, column, given, {row.site for row in rows}):
        rows.append(row)
        write(file, rows, column, tokens, whole)


def write(
    file: Path, rows: Sequence[Row], column: dict[str, float], tokens: int, whole: float
) -> None:
    """The results as JSON and as a page, the worst layers first."""
    about = common.environment()
    compared = {what: compare(rows, what) for what in ("alone", "left_out")}
    content = {"environment": about, "tokens": tokens, "all_cast": whole, "compared": compared}
    content["column"] = column
    common.write_json(file, {**content, "rows": [asdict(row) for row in rows]})
    ordered = sorted(rows, key=lambda row: -row.expected)
    cells = [
        (row.site, f"{row.expected:.5f}", f"{row.alone:.5f}", f"{row.left_out:+.5f}")
        for row in ordered
    ]
    title = "What each layer's casts are expected to cost, and what they cost: nats per token"
    page = common.markdown(title, about, HEADER, cells)
    page += f"\n{len(rows)} of {len(column)} layers, {tokens} tokens of held-out chats, "
    page += f"where the casts of all layers cost {whole:.4f}. Against the column:\n\n"
    names = [*compared["alone"]]
    of = [(what, *(f"{found[name]:.4g}" for name in names)) for what, found in compared.items()]
    page += "\n".join(common.markdown_table(("", *names), of)) + "\n"
    file.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
