"""Everything that needs a GPU, in one call of less than nine minutes.

    python benchmarks/gpu.py                # on the machine with the card
    python benchmarks/gpu.py --tiny         # the same flow without one: toy sizes, on CPU

First some kernels of each kind are held against the CPU; a failure ends the run. Then the ceilings
of the card, full training steps of real transformers layers with random weights against the ways
that LoRA is trained otherwise (up to two thirds of the time), single products and the casts of the
adapters, and at last every kernel that may run, against float64; the most important of each first:
what does not fit into ``--seconds`` is named. A trains where the name of a run
doesn't say otherwise. Writes `gpu-<date>-<card>` .json, .csv (steps), -kernels.csv, .png and .md
with the targets into ``--out``; with ``--tiny`` only where ``--out`` is given.

Needs transformers and PEFT; bitsandbytes and torchao where installed. Each decoder layer is
compiled by itself, for every contender alike, so that all layers of a model share their code.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import gpu_check
import gpu_check_nvfp4
import gpu_kernels
import gpu_steps
import gpu_targets
import torch
from gpu_check import Checked
from gpu_kernels import KernelRow, UpdateRow
from gpu_measure import Budget, Clock, card, ceilings
from gpu_steps import StepRow
from gpu_targets import Target

from falqon_fx.kernels.products.contest import Options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 where a step of falqon failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes on CPU, kernels interpreted")
    parser.add_argument("--seconds", type=float, default=520.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=None, help="folder; default benchmarks/results")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny rehearses on CPU")
    out = args.out or (None if args.tiny else common.RESULTS)
    # Kernels below FP8 and the like are told once by the library itself.
    warnings.filterwarnings("ignore", module="torch|transformers|peft|numpy")
    clock, budget = Clock("cpu" if args.tiny else "cuda"), Budget(args.seconds)
    about = common.environment() | card(clock)

    options = Options(kernel="triton") if args.tiny else Options()
    checked = timed("smoke", lambda: gpu_check.smoke(clock.device))
    ceiling = timed("ceilings", lambda: ceilings(clock, 64 if args.tiny else 8192))
    first = budget.share(0.65)
    steps, failures = timed("steps", lambda: gpu_steps.all_rows(args.tiny, clock, ceiling, first))
    kernels, updates = timed(
        "kernels", lambda: gpu_kernels.all_rows(args.tiny, clock, ceiling, budget.share(0.85))
    )
    timed("correctness", lambda: check_the_rest(clock, options, budget, checked, failures))
    kernels += timed(
        "Inductor's templates",
        lambda: gpu_kernels.rows_with_templates(args.tiny, clock, ceiling, budget),
    )
    found = gpu_targets.targets(steps, kernels, updates)

    content = {
        "about": about,
        "seconds": time.perf_counter() - budget.start,
        "ceilings": asdict(ceiling),
        "targets": [asdict(t) | {"verdict": t.verdict} for t in found],
        "dropped": budget.dropped,
        "failures": failures,
        "checked": [asdict(c) for c in checked],
        "updates": [asdict(u) for u in updates],
        "steps": [asdict(s) for s in steps],
        "kernels": [asdict(k) for k in kernels],
    }
    page = "\n".join(_page(content, checked, steps, kernels, updates, found))
    print(page)
    if out is not None:
        write(out, content, steps, kernels, page)
    return 1 if any(text.startswith("falqon") for text in failures) else 0


def check_the_rest(
    clock: Clock, options: Options, budget: Budget, checked: list[Checked], failures: list[str]
) -> None:
    """Adds to what is checked, or to the failures, which stand beside what was measured."""

    def check() -> None:
        try:
            checked.extend(gpu_check.rest(clock.device, options))
            checked.extend(gpu_check_nvfp4.check_packed(clock.device, options))
        except AssertionError as error:
            failures.append(f"falqon, correctness: {error}")

    budget.run("correctness of every kernel", "correctness", check, 60.0 if clock.gpu else 0.0)


def timed(what: str, work: Any) -> Any:
    start = time.perf_counter()
    result = work()
    print(f"-- {what}: {time.perf_counter() - start:.1f} s", flush=True)
    return result


def _page(
    content: dict[str, Any],
    checked: Sequence[Checked],
    steps: Sequence[StepRow],
    kernels: Sequence[KernelRow],
    updates: Sequence[UpdateRow],
    found: Sequence[Target],
) -> list[str]:
    about, ceiling = content["about"], content["ceilings"]
    worst = max(checked, key=lambda c: c.worst)
    lines = [
        "# One GPU",
        "",
        *(f"- {key}: {about[key]}" for key in about if key != "machine"),
        f"- seconds: {content['seconds']:.0f}",
        f"- ceilings measured: bf16 {ceiling['bf16'] / 1e12:.0f} TFLOP/s, FP8 tensorwise "
        f"{ceiling['fp8_tensor'] / 1e12:.0f}, rowwise {ceiling['fp8_row'] / 1e12:.0f}, memory "
        f"{ceiling['bandwidth'] / 1e12:.2f} TB/s",
        f"- correctness: {len(checked)} results within their bounds, the worst {worst.what} by "
        f"{worst.kernel} at {worst.worst:.2f}",
        *(
            f"- {_NAMES[u.what]}, {u.shape} r{u.rank}, {u.sites} layers: {1e3 * u.seconds:.3f} ms"
            + (
                ""
                if u.unchanged_seconds is None
                else f"; unchanged: {1e3 * u.unchanged_seconds:.3f}"
            )
            for u in updates
        ),
        *(f"- could not run: {text}" for text in content["failures"]),
        *(f"- dropped, no time: {text}" for text in content["dropped"]),
        "",
        "## Targets (of an H100)",
        "",
        *common.markdown_table(("what", "wanted", "found", "verdict"), gpu_targets.table(found)),
        "",
        "## Steps",
        "",
        *common.markdown_table(
            (
                "model",
                "tokens",
                "rank",
                "run",
                "checkpointing",
                "layers",
                "s",
                "spread",
                "forward",
                "backward",
                "tokens/s, all layers",
                "of ceiling",
                "GiB",
                "attention",
            ),
            [
                (
                    s.shape,
                    f"{s.batch} x {s.length}",
                    s.rank,
                    s.contender,
                    s.checkpointing,
                    s.layers,
                    f"{s.seconds:.4f}",
                    f"{s.spread:.4f}",
                    f"{s.forward:.4f}",
                    f"{s.backward:.4f}",
                    f"{s.tokens_per_second:.0f}",
                    f"{s.of_ceiling:.2f}",
                    f"{s.peak_gib:.1f}",
                    s.attention,
                )
                for s in steps
            ],
        ),
        "",
        "## Products: what was fastest",
        "",
        *common.markdown_table(
            (
                "product",
                "tokens",
                "out x in",
                "rank",
                "scales",
                "sums",
                "fastest",
                "us",
                "of _scaled_mm on W",
                "of ceiling",
            ),
            [
                (
                    k.what,
                    k.tokens,
                    f"{k.out} x {k.features}",
                    k.rank,
                    k.mode,
                    k.accumulation,
                    k.candidate,
                    f"{1e6 * k.seconds:.1f}",
                    "" if k.of_library is None else f"{k.of_library:.2f}",
                    f"{k.of_ceiling:.2f}",
                )
                for k in kernels
                if k.chosen
            ],
        ),
        "",
    ]
    return lines


_NAMES = {"casts": "casts of the adapters in a pass", "rows": 'update="rows" in a step'}


def write(
    folder: Path,
    content: dict[str, Any],
    steps: Sequence[StepRow],
    kernels: Sequence[KernelRow],
    page: str,
) -> None:
    """The result files of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    label = re.sub(r"[^a-z0-9]+", "-", content["about"]["card"].split(",")[0].lower()).strip("-")
    stem = folder / f"gpu-{datetime.date.today().isoformat()}-{label}"
    common.write_json(Path(f"{stem}.json"), content)
    if steps:
        common.write_csv(Path(f"{stem}.csv"), [asdict(s) for s in steps])
    if kernels:
        common.write_csv(Path(f"{stem}-kernels.csv"), [asdict(k) for k in kernels])
    plot(Path(f"{stem}.png"), steps)
    Path(f"{stem}.md").write_text(f"{page}\n![tokens per second]({stem.name}.png)\n")


def plot(file: Path, steps: Sequence[StepRow]) -> None:
    """Tokens per second of whole models: a group of bars a setting, a bar a contender."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    bars = [s for s in steps if not s.checkpointing]
    settings = list(dict.fromkeys((s.shape, s.batch, s.length, s.rank) for s in bars))
    names = list(dict.fromkeys(s.contender for s in bars))
    figure, axes = pyplot.subplots(figsize=(12, 0.35 * len(bars) + 1.5), layout="constrained")
    places, labels = [], []
    place = 0
    for setting in settings:
        group = [s for s in bars if (s.shape, s.batch, s.length, s.rank) == setting]
        for s in sorted(group, key=lambda s: -s.tokens_per_second):
            axes.barh(-place, s.tokens_per_second, color=f"C{names.index(s.contender) % 10}")
            places.append(-place)
            labels.append(f"{s.contender}   {s.shape} {s.batch}x{s.length} r{s.rank}")
            place += 1
        place += 1
    axes.set_yticks(places, labels)
    axes.set_xlabel("tokens per second, all layers, without checkpointing")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
