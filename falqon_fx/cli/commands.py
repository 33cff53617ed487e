"""The words of each command. What runs it is imported once it is called, and torch with it: for
help, completion and a wrong word this file is enough.

An option that isn't given is None here, and the library's own default counts.
"""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from falqon_fx_cli.exit_codes import FAILED


def _new_file(path: Any) -> Any:
    """Refuse a file to write whose folder is not there, before there is anything to write."""
    file = path[1] if isinstance(path, tuple) else path
    if file is not None and not file.absolute().parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(file.parent)!r}")
    return path


def _folder(help: str) -> Any:
    return Option(exists=True, file_okay=False, help=help)


def _model_folder(help: str) -> Any:
    return Argument(metavar="MODEL", exists=True, file_okay=False, help=help)


Out = Annotated[Path, Argument(metavar="OUT", help="a new folder")]
Json = Annotated[bool, Option("--json", help="print JSON (no table, no progress bar)")]
Quiet = Annotated[bool, Option("--quiet", help="no progress bar")]
Rank = Annotated[int | None, Option(min=1, help="of a new adapter (the library's default: 16)")]
Alpha = Annotated[int | None, Option(min=1, help="lora_alpha of a new adapter (PEFT's default: 8)")]
Targets = Annotated[
    list[str] | None,
    Option(metavar="NAMES", help="layers, by comma or one by one (default: all-linear)"),
]
Report = Annotated[
    Path,
    Argument(
        metavar="REPORT",
        exists=True,
        dir_okay=False,
        help="of falqon-fx explain --json, or FALQON_DUMP's",
    ),
]
Site = Annotated[
    str | None, Argument(metavar="SITE", help="the path of a site (default: the first)")
]


def explain(
    model: Annotated[
        str, Argument(metavar="MODEL", help="a transformers id, or a folder with config.json")
    ],
    adapter: Annotated[
        Path | None,
        _folder("a PEFT adapter's folder, for its config, instead of a new one"),
    ] = None,
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: Targets = None,
    frozen_a: Annotated[bool, Option("--frozen-a", help="train lora_B alone")] = False,
    batch: Annotated[int, Option(min=1, help="sequences")] = 1,
    length: Annotated[int, Option(min=1, help="tokens of each")] = 2048,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], Option(help="of the base weights")
    ] = "bfloat16",
    dynamic: Annotated[
        bool, Option("--dynamic", help="leave batch (from 2 on) and length open")
    ] = False,
    card: Annotated[
        str | None, Option(help="that times are predicted for (default: the one at hand)")
    ] = None,
    mesh: Annotated[
        list[str] | None,
        Option(
            metavar="AXIS=N",
            help="several processes: fsdp=8,tp=2 and ddp=4 (copies), by comma or one by one",
        ),
    ] = None,
    option: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="of FalqonConfig; may be repeated")
    ] = None,
    diff: Annotated[bool, Option("--diff", help="the graphs before and after as well")] = False,
    html: Annotated[
        Path | None,
        Option(metavar="FILE", dir_okay=False, callback=_new_file, help="write the page as well"),
    ] = None,
    svg: Annotated[
        tuple[str, Path] | None,
        Option(metavar="SITE FILE", callback=_new_file, help="write a site's graph as well"),
    ] = None,
    check: Annotated[
        bool,
        Option("--check", help="exit with 3 where an adapter is rejected or nothing is rewritten"),
    ] = False,
    as_json: Json = False,
) -> None:
    """What would be rewritten in a model, and why not.

    No weights are read: the model is built on the meta device from its config, with a new LoRA
    adapter or one from a folder, and called with batch x length tokens. Nothing is downloaded but
    the config.
    """
    _run("falqon_fx_cli.explain:Explain", locals())


def cost(
    card: Annotated[str | None, Option(help="by default the one at hand")] = None,
    cards: Annotated[bool, Option("--cards", help="list the cards and their sources")] = False,
    calibrate: Annotated[
        Literal["cpu", "cuda"] | None, Option(help="measure this device, and keep it as a card")
    ] = None,
    features: Annotated[int, Option("--in", min=1, help="of the layer")] = 4096,
    out: Annotated[int, Option("--out", min=1, help="of the layer")] = 4096,
    rank: Annotated[int, Option(min=0, help="of the adapter; 0: a frozen layer without one")] = 64,
    frozen_a: Annotated[bool, Option("--frozen-a", help="lora_A doesn't train (LoRA-FA)")] = False,
    siblings: Annotated[
        int, Option(min=1, help="layers alike that read one input (q, k, v: 3)")
    ] = 1,
    experts: Annotated[int, Option(min=0, help="of a stack; 0: a linear layer")] = 0,
    top_k: Annotated[
        int | None,
        Option(
            min=0,
            help="experts that each token goes to, whose rows are gathered (gate and up); 0: each "
            "has a row of its own (down; the default)",
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        Option(min=1, help="of a call; with --step, of a sequence (4096); may be repeated"),
    ] = None,
    adapter_dtype: Annotated[
        Literal["float32", "bfloat16", "fp8"] | None,
        Option(
            help="of A and B, float32 or bfloat16 (float32); with --step how falqon adds the "
            "adapter: bfloat16 in the epilogue of its own product or after the library's, fp8 as r "
            "more of K (fp8 where the card has it and the model has no experts)"
        ),
    ] = None,
    base_dtype: Annotated[
        Literal["fp8", "int8", "nvfp4"] | None,
        Option(help="of the weights (fp8); --step has a column for each"),
    ] = None,
    symbolic: Annotated[bool, Option("--symbolic", help="FLOPs and bytes as formulas")] = False,
    step: Annotated[
        bool, Option("--step", help="a model's whole step; the options below belong to it")
    ] = False,
    model: Annotated[
        str | None,
        Option(help="llama-7b, llama-3-8b, qwen3-8b, qwen3-30b-a3b or a config.json (llama-7b)"),
    ] = None,
    batch: Annotated[int | None, Option(min=1, help="sequences (1)")] = None,
    transpose: Annotated[
        Literal["transient", "store"] | None,
        Option(help="whether W is transposed each step, or kept both ways (as the library does)"),
    ] = None,
    attention: Annotated[
        Literal["flash2", "cudnn"] | None,
        Option(help="the kernel of scaled_dot_product_attention, in every run (flash2)"),
    ] = None,
    cuda_graphs: Annotated[bool, Option("--cuda-graphs", help="no host time")] = False,
    figure: Annotated[
        list[str] | None,
        Option(metavar="NAME=VALUE", help="instead of the one that --json lists under this name"),
    ] = None,
    as_json: Json = False,
) -> None:
    """The tokens from which on the rewrite of a layer pays.

    Predicted times of its step on one card, by number of tokens: lora is what runs without falqon;
    fp8_lora puts FP8 under a separate LoRA path; merged is the rewritten layer on FP8 matrix units;
    emulated is the same arithmetic without them. A and B train; W is constant. Of a stack of
    experts, lora is PEFT's sum W + s B A of all experts, and split multiplies W, A and B apart.

    --step is the arithmetic of a model's whole training step on a GPU, from published rates: for
    falqon with A trained and frozen and with weights in INT8 and NVFP4, PEFT in bf16 with Inductor,
    and NF4 QLoRA. Nothing is measured.
    """
    _run("falqon_fx_cli.cost:Cost", locals())


def export(
    model: Annotated[
        Path, _model_folder("the base model's folder, or one of falqon-fx prequantize")
    ],
    out: Out,
    adapter: Annotated[
        Path | None, _folder("a trained PEFT adapter's folder (also one of a Trainer)")
    ] = None,
    checkpoint: Annotated[Path | None, _folder("a folder of falqon_fx.save_checkpoint")] = None,
    base: Annotated[
        Path | None,
        _folder("a prequantized model's original weights, which are cast with the adapter"),
    ] = None,
    form: Annotated[
        Literal["compressed-tensors", "fp8"], Option(help="of the weights in the files")
    ] = "compressed-tensors",
    base_dtype: Annotated[
        Literal["fp8", "int8", "nvfp4"] | None,
        Option(help="of the weights, where MODEL is dense (FalqonConfig's default: fp8)"),
    ] = None,
    max_shard_size: Annotated[str, Option(help="of a safetensors file")] = "5GB",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in FP8, INT8 or NVFP4 for serving engines.

    Loads a base model and the adapter or the falqon checkpoint trained on it, and writes a folder,
    with the tokenizer, that transformers and vLLM load.
    """
    _run("falqon_fx_cli.export:Export", locals())


def prequantize(
    model: Annotated[Path, _model_folder("a folder with config.json and safetensors")],
    out: Out,
    rank: Rank = None,
    alpha: Alpha = None,
    target_modules: Targets = None,
    init: Annotated[
        Literal["svd", "keep"] | None, Option(help="of lora_A (prequantize's default: svd)")
    ] = None,
    granularity: Annotated[
        Literal["tensor", "row"] | None, Option(help="of the scales (FalqonConfig's default: row)")
    ] = None,
    scale: Annotated[
        Literal["amax", "pow2"] | None, Option(help="of E4M3 (FalqonConfig's default: pow2)")
    ] = None,
    base_dtype: Annotated[
        Literal["fp8", "int8", "nvfp4"] | None,
        Option(help="of the weights (FalqonConfig's default: fp8)"),
    ] = None,
    workers: Annotated[int, Option(min=1, help="weights that are cast side by side")] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Cast a model's weights to FP8, one at a time.

    Reads a checkpoint weight by weight and writes a folder that falqon_fx.load makes a trainable
    model from. Goes on where an interrupted run ended.
    """
    _run("falqon_fx_cli.export:Prequantize", locals())


def repro(
    report: Report,
    site: Site = None,
    tokens: Annotated[
        int | None, Option(min=1, help="by default those of the report, at most 4096")
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        Option(help="by default the site's, or the CPU where there is no GPU"),
    ] = None,
    write: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            dir_okay=False,
            callback=_new_file,
            help="write the program, don't run it",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild one site of a report with random data and check it.

    Each result is compared with exact arithmetic; a wrong one is named, and the program exits with
    3.
    """
    _run("falqon_fx_cli.repro:Repro", locals())


def kernels(
    report: Report,
    site: Site = None,
    source: Annotated[bool, Option("--source", help="print the source as well")] = False,
    as_json: Json = False,
) -> None:
    """What runs each site of a report, and why it was chosen."""
    _run("falqon_fx_cli.repro:Kernels", locals())


def diff(
    before: Report,
    after: Annotated[Path, Argument(metavar="OTHER", exists=True, dir_okay=False)],
    as_json: Json = False,
) -> None:
    """What differs between two reports, layer by layer and in all."""
    _run("falqon_fx_cli.repro:Diff", locals())


ALL = (explain, cost, export, prequantize, repro, kernels, diff)


def _run(name: str, given: dict[str, Any]) -> None:
    """Make the command's object of what was given, and leave with what it returns."""
    from falqon_fx.errors import FalqonError

    try:
        code = pkgutil.resolve_name(name)(**given).run()
    except FalqonError as error:
        if given["as_json"]:
            print(json.dumps({"error": str(error)}))
        typer.echo(f"falqon-fx: {error}", err=True)
        code = FAILED
    raise typer.Exit(code)
