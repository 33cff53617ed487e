"""``falqon-fx cost``: the cost model's answer for one layer on one card, and calibration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from falqon_fx.config import BaseDtype
from falqon_fx.cost import cards, stacks, variants
from falqon_fx.cost import model as cost
from falqon_fx.cost.cards import Card
from falqon_fx.cost.step.decoder import decoder_of
from falqon_fx.cost.step.layer import AdapterDtype, Transpose
from falqon_fx.errors import FalqonError
from falqon_fx.kernels.hardware import reads_columns
from falqon_fx.kernels.spec import MAX_TAIL
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.report.text import pays_from
from falqon_fx_cli.exit_codes import DONE
from falqon_fx_cli.output import print_json
from falqon_fx_cli.step import WholeStep

_TOKENS = [2**i for i in range(6, 15)]


@dataclass(frozen=True)
class Cost:
    """What was given on the command line (`falqon_fx_cli.commands.cost`)."""

    card: str | None
    cards: bool
    calibrate: Literal["cpu", "cuda"] | None
    features: int
    out: int
    rank: int
    frozen_a: bool
    siblings: int
    experts: int
    top_k: int | None
    tokens: list[int] | None
    adapter_dtype: Literal["float32", "bfloat16", "fp8"] | None
    base_dtype: BaseDtype | None
    symbolic: bool
    step: bool
    model: str | None
    batch: int | None
    transpose: Literal["transient", "store"] | None
    attention: Literal["flash2", "cudnn"] | None
    cuda_graphs: bool
    figure: list[str] | None
    as_json: bool

    def run(self) -> int:
        """Print a table of cards, formulas or times."""
        if self.step:
            return self._whole_step().run()
        self._refuse_without_step()
        if self.calibrate is not None:
            return _show_cards([cards.calibrate(torch.device(self.calibrate))], self.as_json)
        if self.cards:
            return _show_cards([*cards.CARDS, *cards.calibrated().values()], self.as_json)
        if self.symbolic:
            return _show_formulas(self.experts > 0, self.as_json)
        return self._show_times(_card(self.card))

    def _whole_step(self) -> WholeStep:
        for name in ("experts", "top_k"):
            if getattr(self, name):
                word = f"--{name.replace('_', '-')}"
                raise FalqonError(word, "with --step the model says it", "Leave it out")
        if self.base_dtype is not None:
            raise FalqonError("--base-dtype", "with --step each has a column", "Leave it out")
        if self.adapter_dtype == "float32":
            problem = "with --step it is how falqon adds the adapter"
            raise FalqonError("--adapter-dtype float32", problem, "Give bfloat16 or fp8")
        if self.rank < 1:
            raise FalqonError("--rank 0", "the step is of a model with adapters", "Give more")
        return WholeStep(
            card=_card(self.card).name,
            model=self.model or "llama-7b",
            batch=self.batch or 1,
            tokens=self.tokens or [4096],
            rank=self.rank,
            adapter_dtype=self.adapter_dtype or self._usual_adapter_dtype,
            transpose=self.transpose or self._usual_transpose,
            attention=self.attention or "flash2",
            cuda_graphs=self.cuda_graphs,
            given=self.figure or [],
            as_json=self.as_json,
        )

    @property
    def _usual_adapter_dtype(self) -> AdapterDtype:
        """What adapter_dtype="auto" does on the card (`falqon_fx.passes.adapter_dtype`)."""
        fits = _card(self.card).has_fp8 and 1 <= self.rank <= MAX_TAIL
        mixture = decoder_of(self.model or "llama-7b").mixture
        return "fp8" if fits and mixture is None else "bfloat16"

    @property
    def _usual_transpose(self) -> Transpose:
        """What transpose="auto" does where there is memory (`falqon_fx.passes.transposes`)."""
        by_columns = reads_columns(_card(self.card).architecture)
        return "transient" if by_columns else "store"

    def _refuse_without_step(self) -> None:
        for name in ("model", "batch", "transpose", "attention", "cuda_graphs", "figure"):
            if getattr(self, name):
                word = f"--{name.replace('_', '-')}"
                raise FalqonError(word, "it is of a whole step", "Add --step")
        if self.adapter_dtype == "fp8":
            problem = "it is of a whole step"
            remedy = "Add --step, or give a dtype of A and B"
            raise FalqonError("--adapter-dtype fp8", problem, remedy)

    def _shape(self, card: Card) -> variants.Shape:
        if self.top_k is not None and not self.experts:
            raise FalqonError("--top-k", "it is of a stack of experts", "Add --experts")
        if self.siblings > 1 and self.experts:
            problem = "a stack of experts shares its input with no other"
            raise FalqonError("--siblings", problem, "Give gate and up as one stack, --out of both")
        kind = self.base_dtype or "fp8"
        if self.experts and kind != "fp8":
            problem = f"stacked experts are not cast to {kind.upper()}"
            raise FalqonError("--base-dtype", problem, "Leave out --experts, or give fp8")
        shape = variants.Shape(
            n=1,
            features=self.features,
            out=self.out,
            rank=self.rank,
            adapter_dtype=self.adapter_dtype or "float32",
            train_a=not self.frozen_a,
            siblings=self.siblings,
            adapted=self.siblings,
            wide=_wide(card),
            width=cost.WIDTHS[kind],
            integers=kind == "int8",
        )
        if not self.experts:
            return shape
        top = self.top_k or 0
        return stacks.StackShape(
            **vars(shape),
            experts=self.experts,
            top=top or 1,
            gathered=top > 0,
            library=card.architecture in (90, 100),
            by_columns=reads_columns(card.architecture),
        )

    def _show_times(self, card: Card) -> int:
        shape = self._shape(card)
        known = cost.variants_of(shape)
        names = [n for n in known if card.has_fp8 or n not in ("fp8_lora", "merged")]
        if shape.integers:
            names = ["lora", "merged" if card.gpu and "int8" in card.flops else "emulated"]
        rows = [
            {
                "tokens": n,
                **{
                    name: float(cost.seconds(known[name](replace(shape, n=n)), card))
                    for name in names
                },
            }
            for n in self.tokens or _TOKENS
        ]
        pays = {n: cost.break_even(known["lora"], known[n], shape, card) for n in names[1:]}
        if self.as_json:
            print_json({"card": card.name, "seconds": rows, "break_even": pays})
            return DONE
        size = f"{shape.out} x {shape.features}"
        if self.experts:
            size = f"{self.experts} experts of {size}"
        title = f"{card.name}, {size}, rank {shape.rank}: us a step (vs lora)"
        table = Table("tokens", *names, title=title, title_justify="left")
        for row in rows:
            cells = [f"{row[n] * 1e6:.1f} ({row['lora'] / row[n]:.2f})" for n in names]
            table.add_row(str(row["tokens"]), *cells)
        table.add_row("pays from", "", *(pays_from(n) for n in pays.values()))
        Console(width=100).print(table)
        return DONE


def _card(name: str | None) -> Card:
    if name is not None:
        return cards.find(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = cards.at_hand(device)
    if card is None:
        problem, remedy = cards.unknown(device)
        raise FalqonError(str(device), problem, remedy.replace("card=", "--card"))
    return card


def _show_cards(known: list[Card], as_json: bool) -> int:
    if as_json:
        print_json([asdict(card) for card in known])
        return DONE
    rates_of = {"bfloat16": "bf16", "float8": "fp8", "int8": "int8", "float32": "f32"}
    named = (f"{name}, TF/s" for name in rates_of.values())
    table = Table("card", *named, "GB/s", "launch, us", "source")
    for card in known:
        rates = [f"{card.flops.get(dtype, 0) / 1e12:.4g}" for dtype in rates_of]
        rates = ["none" if rate == "0" else rate for rate in rates]
        rest = (f"{card.bandwidth / 1e9:.4g}", f"{card.launch * 1e6:.3g}")
        table.add_row(card.name, *rates, *rest, card.source["flops"])
    Console(width=100).print(table)
    return DONE


def _show_formulas(of_stack: bool, as_json: bool) -> int:
    shape = stacks.symbolic_stack() if of_stack else variants.symbolic()
    rows = {
        f"{name} {phase}": {
            "flops": str(cost.flops(kernels(shape), phase)),
            "bytes": str(cost.moved(kernels(shape), phase)),
        }
        for name, kernels in cost.variants_of(shape).items()
        for phase in ("forward", "backward", "update")
    }
    if as_json:
        print_json(rows)
        return DONE
    table = Table("variant and phase", "FLOPs", "bytes")
    for name, row in rows.items():
        table.add_row(name, row["flops"], row["bytes"])
    Console(width=100).print(table)
    return DONE


def _wide(card: Card) -> str:
    """The dtype of the plain products: what this CPU multiplies where it is the card, else bf16."""
    cpu = torch.device("cpu")
    own = card.name == cards.device_name(cpu)
    return str(gemm_dtype(torch.bfloat16, cpu)).removeprefix("torch.") if own else "bfloat16"
