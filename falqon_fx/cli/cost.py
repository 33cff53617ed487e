"""``falqon-fx cost``: the cost model's answer for one layer on one card, and calibration."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import torch
from rich.console import Console
from rich.table import Table

from falqon_fx.cost import cards, variants
from falqon_fx.cost import model as cost
from falqon_fx.errors import FalqonError
from falqon_fx.ops.lowering import gemm_dtype
from falqon_fx.report.text import pays_from
from falqon_fx_cli import step
from falqon_fx_cli.exit_codes import DONE

_TOKENS = [2**i for i in range(6, 15)]


def run(arguments: argparse.Namespace) -> int:
    """Print a table of cards, formulas or times."""
    if arguments.step:
        return step.run(arguments, _card(arguments.card).name)
    step.refuse_without_step(arguments)
    if arguments.calibrate is not None:
        device = arguments.calibrate or ("cuda" if torch.cuda.is_available() else "cpu")
        return _show_cards([cards.calibrate(torch.device(device))], arguments.json)
    if arguments.cards:
        return _show_cards([*cards.CARDS, *cards.calibrated().values()], arguments.json)
    if arguments.symbolic:
        return _show_formulas(arguments.json)
    return _show_times(arguments, _card(arguments.card))


def _card(name: str | None) -> cards.Card:
    if name is not None:
        return cards.find(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = cards.at_hand(device)
    if card is None:
        problem, remedy = cards.unknown(device)
        raise FalqonError(str(device), problem, remedy.replace("card=", "--card"))
    return card


def _show_cards(known: list[cards.Card], as_json: bool) -> int:
    if as_json:
        print(json.dumps([asdict(card) for card in known], indent=1))
        return DONE
    table = Table("card", "bf16, TF/s", "fp8, TF/s", "f32, TF/s", "GB/s", "launch, us", "source")
    for card in known:
        rates = [f"{card.flops.get(d, 0) / 1e12:.4g}" for d in ("bfloat16", "float8", "float32")]
        rates = ["none" if rate == "0" else rate for rate in rates]
        rest = (f"{card.bandwidth / 1e9:.4g}", f"{card.launch * 1e6:.3g}")
        table.add_row(card.name, *rates, *rest, card.source["flops"])
    Console(width=100).print(table)
    return DONE


def _show_formulas(as_json: bool) -> int:
    shape = variants.symbolic()
    rows = {
        f"{name} {phase}": {
            "flops": str(cost.flops(kernels(shape), phase)),
            "bytes": str(cost.moved(kernels(shape), phase)),
        }
        for name, kernels in variants.VARIANTS.items()
        for phase in ("forward", "backward", "update")
    }
    if as_json:
        print(json.dumps(rows, indent=1))
        return DONE
    table = Table("variant and phase", "FLOPs", "bytes")
    for name, row in rows.items():
        table.add_row(name, row["flops"], row["bytes"])
    Console(width=100).print(table)
    return DONE


def _show_times(arguments: argparse.Namespace, card: cards.Card) -> int:
    shape = variants.Shape(
        n=1,
        features=arguments.features,
        out=arguments.out,
        rank=arguments.rank,
        adapter_dtype=arguments.adapter_dtype or "float32",
        train_a=not arguments.frozen_a,
        siblings=arguments.siblings,
        adapted=arguments.siblings,
        wide=_wide(card),
    )
    names = [n for n in variants.VARIANTS if card.has_fp8 or n not in ("fp8_lora", "merged")]
    rows = [
        {
            "tokens": n,
            **{
                name: float(cost.seconds(variants.VARIANTS[name](replace(shape, n=n)), card))
                for name in names
            },
        }
        for n in arguments.tokens or _TOKENS
    ]
    pays = {n: cost.break_even(variants.lora, variants.VARIANTS[n], shape, card) for n in names[1:]}
    if arguments.json:
        print(json.dumps({"card": card.name, "seconds": rows, "break_even": pays}, indent=1))
        return DONE
    title = f"{card.name}, {shape.out} x {shape.features}, rank {shape.rank}: us a step (vs lora)"
    table = Table("tokens", *names, title=title, title_justify="left")
    for row in rows:
        cells = [f"{row[n] * 1e6:.1f} ({row['lora'] / row[n]:.2f})" for n in names]
        table.add_row(str(row["tokens"]), *cells)
    table.add_row("pays from", "", *(pays_from(n) for n in pays.values()))
    Console(width=100).print(table)
    return DONE


def _wide(card: cards.Card) -> str:
    """The dtype of the plain products: what this CPU multiplies where it is the card, else bf16."""
    cpu = torch.device("cpu")
    own = card.name == cards.device_name(cpu)
    return str(gemm_dtype(torch.bfloat16, cpu)).removeprefix("torch.") if own else "bfloat16"
