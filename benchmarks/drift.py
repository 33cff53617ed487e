"""How far the FP8 base moves from W over thousands of optimizer steps, and what that costs.

    python benchmarks/drift.py

1. Drift: A and B of SmolLM2's first q_proj, k_proj and up_proj get 2,000 steps of AdamW on noisy
   gradients. ``base()`` is compared with W in between, ‖base() − W‖ / ‖W‖, and for update="adapter"
   the bytes of the base at the end with those at the start. update="rows" shows each policy, with
   the base weight at hand and, as after ``prepare``, without it; A is frozen there.
2. Regression: one layer learns y = x · (W + ΔW)ᵀ, ΔW of low rank, with LoRA on W, with LoRA on
   dq(W) without the library, with falqon, and with rows. The error on other x than those trained
   on, with a constant learning rate and with one that falls linearly to 0, as trainers have it. The
   cast of x is noise that any FP8 product has, so the adapters of LoRA on dq(W) are also run in
   FP8, and falqon's on dq(W) without the library: like is compared with like.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import peft
import smollm
import torch
import training
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.site.base import cast_base
from falqon_fx.site.spec import SiteSpec

SITES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")  # of layer 0
RANK, RATE = 16, 3e-3
ADAPTER: dict[str, Any] = {}
POLICIES: dict[str, dict[str, Any]] = {
    "adapter": ADAPTER,
    **{
        f"rows {pending} topk={topk}": {"update": "rows", "pending": pending, "topk": topk}
        for pending in ("apply", "hold", "drop")
        for topk in (10, "all")
    },
}


@dataclass(frozen=True)
class Drift:
    """Relative distance of a site's base from W, by the number of steps done."""

    policy: str
    prepared: bool
    site: str
    distance: dict[int, float]
    bytes_equal: bool | None


def lora(layer: nn.Linear, train_a: bool, scaling: float = 1.0) -> nn.Module:
    """PEFT's adapter on one layer, the same A each time."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=int(RANK * scaling), target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(train_a)
    return model


def state(model: nn.Module) -> Any:
    """Of the only site."""
    (found,) = falqon_fx.adapters(model).values()
    return found


def drift(name: str, layer: nn.Linear, policy: str, prepared: bool, marks: Sequence[int]) -> Drift:
    """Steps on noise: the gradient of each step has the sign of a coin."""
    options = {"inner": "eager", **POLICIES[policy]}
    is_adapter = policy == "adapter"
    model = lora(layer, train_a=is_adapter)
    if prepared:
        falqon_fx.prepare(model, FalqonConfig(**options), progress=False)
    compiled = torch.compile(model, backend="falqon", options=options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    generator = torch.Generator().manual_seed(1)
    weight = layer.weight.detach().float()
    distance: dict[int, float] = {}
    start = None
    for step in range(max(marks) + 1):
        x = torch.randn(16, layer.in_features, generator=generator).to(layer.weight.dtype)
        y = compiled(x).float()
        if step in marks:
            base = state(model).base()
            distance[step] = float((base - weight).norm() / weight.norm())
            start = state(model).weight.view(torch.uint8).clone() if start is None else start
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    same = None
    if is_adapter:
        assert start is not None
        same = torch.equal(start, state(model).weight.view(torch.uint8))
    return Drift(policy, prepared, name, distance, same)


@dataclass(frozen=True)
class Regression:
    """Mean squared error of a run on held-out x, relative to the variance of what is learned."""

    run: str
    rate: str  # "constant" or "falling"
    before: float
    after: float
    to_lora: float  # after, to LoRA on dq(W) that is run in the same way


Call = Callable[..., Tensor]
PLAIN, FALQON = "LoRA on dq(W), without the library", "falqon"
PLAIN_IN_FP8, FALQON_ON_DQ = "its A and B, run in FP8", "its A and B, run on dq(W) without it"
PEERS = {FALQON: PLAIN_IN_FP8}  # what is run in FP8 too; everything else has PLAIN


class Task:
    """y = x · (W + ΔW)ᵀ with ΔW of rank 4, and the base of FP8's values."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.features, out, rank = 256, 256, 4
        self.layer = nn.Linear(self.features, out, bias=False).requires_grad_(False)
        self.layer.weight.data.copy_(draw(out, self.features) / self.features**0.5)
        delta = draw(out, rank) @ draw(rank, self.features) * (0.5 / (self.features * rank) ** 0.5)
        self.target = self.layer.weight + delta
        self.held_out = draw(512, self.features)
        base = cast_base(self.layer.weight, SiteSpec.from_config(FalqonConfig())).dequantize()
        self.on_fp8 = copy.deepcopy(self.layer)
        self.on_fp8.weight.data.copy_(base)

    def error(self, call: Call) -> float:
        with torch.no_grad():
            wanted = self.held_out @ self.target.t()
            return float((call(self.held_out) - wanted).square().mean() / wanted.square().mean())

    def train(self, model: nn.Module, call: Call, steps: int, falling: bool) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
        batches = torch.Generator().manual_seed(3)
        for step in range(steps):
            if falling:
                optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
            x = torch.randn(64, self.features, generator=batches)
            (call(x) - x @ self.target.t()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def through_falqon(model: nn.Module, **options: Any) -> Call:
    call: Call = torch.compile(model, backend="falqon", options={"inner": "eager", **options})
    return call


def regression(steps: int, progress: Progress) -> list[Regression]:
    """All runs, from the same A, on the same batches."""
    task = Task()
    runs: dict[str, tuple[nn.Linear, bool, Callable[[nn.Module], Call]]] = {
        "LoRA on W": (task.layer, True, lambda model: model),
        PLAIN: (task.on_fp8, True, lambda model: model),
        FALQON: (task.layer, True, through_falqon),
        "LoRA on dq(W), A frozen": (task.on_fp8, False, lambda model: model),
        "falqon, A frozen": (task.layer, False, through_falqon),
        'falqon, update="rows"': (
            task.layer,
            False,
            lambda model: through_falqon(model, update="rows"),
        ),
    }
    results = []
    bar = progress.add_task("regression", total=2 * len(runs), note="")
    for rate in ("constant", "falling"):
        errors: dict[str, tuple[float, float]] = {}
        for name, (start, train_a, make) in runs.items():
            progress.update(bar, note=f"{name}, {rate} rate")
            model = lora(start, train_a)
            call = make(model)
            before = task.error(call)
            task.train(model, call, steps, rate == "falling")
            errors[name] = (before, task.error(call))
            if name == PLAIN:
                errors[PLAIN_IN_FP8] = (before, task.error(through_falqon(model)))
            if name == FALQON:
                errors[FALQON_ON_DQ] = (before, task.error(on_dequantized(task, model)))
            torch._dynamo.reset()
            progress.update(bar, advance=1)
        for name, (before, after) in errors.items():
            peer = errors[PEERS.get(name, PLAIN)][1]
            results.append(Regression(name, rate, before, after, after / peer))
    return results


def on_dequantized(task: Task, trained: nn.Module) -> nn.Module:
    """LoRA on dq(W) with the A and B of ``trained``."""
    model = lora(task.on_fp8, True)
    adapter = {name: value for name, value in trained.state_dict().items() if ".lora_" in name}
    assert len(adapter) == 2, sorted(adapter)
    model.load_state_dict(adapter, strict=False)
    return model


def report(drifts: Sequence[Drift], runs: Sequence[Regression], console: Console) -> None:
    """Print, and write JSON and Markdown."""
    marks = list(drifts[0].distance)
    header = ("update", "base weight", "site", *(f"step {m}" for m in marks), "bytes equal")
    rows = [
        [
            d.policy,
            "freed" if d.prepared else "at hand",
            d.site,
            *(f"{d.distance[m]:.2%}" for m in marks),
            {None: "-", True: "yes", False: "NO"}[d.bytes_equal],
        ]
        for d in drifts
    ]
    columns = ("run", "learning rate", "before", "after", "to LoRA on dq(W) run alike")
    lines = [[r.run, r.rate, f"{r.before:.5f}", f"{r.after:.5f}", f"{r.to_lora:.3f}"] for r in runs]
    for title, names, body in (("drift", header, rows), ("regression", columns, lines)):
        table = Table(*names, title=title)
        for row in body:
            table.add_row(*row)
        console.print(table)
    about = common.environment()
    page = common.markdown("‖base() − W‖ / ‖W‖ on noisy AdamW steps", about, header, rows)
    page += "\nHeld-out error of a regression, relative to the variance of y:\n\n"
    page += "\n".join(common.markdown_table(columns, lines)) + "\n"
    common.result_path("drift", ".md").write_text(page, encoding="utf-8")
    content = {
        "environment": about,
        "drift": [asdict(d) for d in drifts],
        "regression": [asdict(r) for r in runs],
    }
    common.write_json(common.result_path("drift", ".json"), content)
    console.print(f"Written: {common.result_path('drift', '')}.json, .md", highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args(argv)
    marks = [0, *(args.steps * part // 20 for part in (1, 3, 10)), args.steps]
    base, _ = smollm.load_model()
    layers: dict[str, Any] = {name: base.get_submodule(f"model.layers.0.{name}") for name in SITES}
    for layer in layers.values():
        layer.requires_grad_(False)
    console = Console()
    with training.progress_bar(console) as progress:
        cases = [(p, False) for p in POLICIES] + [(p, True) for p in POLICIES]
        task = progress.add_task("drift", total=len(cases) * len(layers), note="")
        drifts = []
        for policy, prepared in cases:
            for name, layer in layers.items():
                progress.update(task, note=f"{policy}, {name}")
                drifts.append(drift(name, layer, policy, prepared, marks))
                torch._dynamo.reset()
                progress.update(task, advance=1)
        runs = regression(args.steps, progress)
    report(drifts, runs, console)


if __name__ == "__main__":
    main()
