"""`falqon_fx.cost.step` and ``falqon-fx cost --step``: the arithmetic of a whole training step."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import validate

from falqon_fx import FalqonError
from falqon_fx.cost.step.decoder import MODELS, Decoder, Mixture, decoder_of
from falqon_fx.cost.step.figures import Figures, figures_for
from falqon_fx.cost.step.launches import Timer
from falqon_fx.cost.step.layer import Step
from falqon_fx.cost.step.whole import BASELINE, PARTS, RUNS, Run, arithmetic, kept, layer_of
from falqon_fx_cli.main import main
from tests.costs import EXPERTS, H100, OURS_WIN, SEVEN, STEP
from tests.costs import config as config

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

DENSE_RUNS = ("falqon_int8", "falqon_nvfp4")
WITHOUT_FP8 = ("A100", "RTX 3090")
CARDS = ("RTX 4090", "L40S", "H100", "H200", "B200", "RTX 5090")

EVERY = (*CARDS, *WITHOUT_FP8)

LENS = {"falqon": "falqon", "falqon_frozen_a": "falqon_frozen_a", "peft": "inductor"}

DENSE = [replace(d, layers=2) for d in MODELS.values() if d.mixture is None]
SHARED = Mixture(experts=6, top=3, inner=96, shared=128, dense=1)
MIXED = [replace(EXPERTS, layers=2), replace(EXPERTS, layers=3, mixture=SHARED)]


def steps(decoders: list[Decoder], *dtypes: str) -> st.SearchStrategy[Step]:
    return st.builds(
        Step,
        decoder=st.sampled_from(decoders),
        batch=st.integers(1, 8),
        tokens=st.integers(1, 8192),
        rank=st.integers(1, 128),
        adapter_dtype=st.sampled_from(dtypes),
        transpose=st.sampled_from(["transient", "store"]),
    )


STEPS = steps(DENSE, "bfloat16", "fp8") | steps(MIXED, "bfloat16")


@pytest.mark.parametrize(
    ("model", "adapter_dtype", "off"),
    [
        ("llama-7b", "bfloat16", 2e-3),
        ("llama-7b", "fp8", 2e-3),
        ("qwen3-8b", "bfloat16", 2e-3),
        ("qwen3-30b-a3b", "bfloat16", 4e-3),
    ],
)
@pytest.mark.parametrize("name", LENS)
def test_a_layer_is_what_the_lens_sees(name, model, adapter_dtype, off):
    """The lens also counts what is left out here: a scale for each row of a cast and of a norm (at
    most 4 bytes to 4096 features, twelve times) and RoPE's cosines; together below a 500th. Of
    experts, the scales of W's rows, 4 bytes to 768 and to 2048, and the places and the scales of
    rows of x wherever they are read: a 250th.
    """
    in_k, run = adapter_dtype == "fp8" and name != "peft", LENS[name]
    run = run.replace("falqon", "falqon_fp8") if in_k else run
    seen = json.loads((RESULTS / f"gpu_lens-{model}-1.json").read_text())
    sizes = seen["batch"], seen["tokens"], seen["rank"]
    step = Step(MODELS[model], *sizes, adapter_dtype, "store")
    layer = layer_of(name, step, Timer(H100.given(OURS_WIN)))
    counted = seen["runs"][run]
    assert sum(one.kernels for one in layer) == counted["launches"]
    assert sum(one.reads for one in layer) == pytest.approx(counted["bytes_read"], rel=off)
    assert sum(one.writes for one in layer) == pytest.approx(counted["bytes_written"], rel=off)
    # Of experts' gate and up, which are parts of one tensor, the lens counts one.
    mixture = MODELS[model].mixture
    other = 2 * step.n * mixture.top * mixture.inner if mixture and name != "peft" else 0
    assert kept(name, step) == pytest.approx(counted["kept_bytes"] + other, rel=off)


@given(STEPS, st.sampled_from(EVERY), st.sampled_from(["flash2", "cudnn"]), st.booleans())
def test_the_parts_are_the_launches(step, card, attention, graphs):
    figures = figures_for(card, attention)
    for name, run in arithmetic(step, figures, graphs).items():
        assert set(run.seconds) == set(PARTS)
        assert min(run.seconds.values()) >= 0
        assert run.total == pytest.approx(sum(run.seconds.values()))
        layers = [
            (kind.layers, layer_of(name, replace(step, decoder=kind), Timer(figures)))
            for kind in step.decoder.kinds
        ]
        assert sum(count for count, _ in layers) == step.decoder.layers
        for part in set(PARTS) - {"head", "optimizer", "host"}:
            own = sum(n * one.seconds for n, layer in layers for one in layer if one.part == part)
            assert run.seconds[part] == pytest.approx(own)
        assert run.launches == sum(one.kernels for one in layers[-1][1])
        busy = run.total - run.seconds["host"]
        assert run.total == pytest.approx(max(busy, run.host))
        assert graphs <= (run.host == run.seconds["host"] == 0)


@given(STEPS, st.sampled_from(EVERY), st.integers(1, 4096))
def test_more_tokens_are_never_faster(step, card, more):
    """Of the GPU's time: where the host is what is waited for, the tuner may choose at more tokens
    a faster kernel that is fewer launches.
    """
    figures = figures_for(card)
    few = arithmetic(step, figures, True)
    longer = arithmetic(replace(step, tokens=step.tokens + more), figures, True)
    wider = arithmetic(replace(step, batch=step.batch + 1), figures, True)
    for name in few:
        assert longer[name].total >= few[name].total * (1 - 1e-12)
        assert wider[name].total >= few[name].total * (1 - 1e-12)


@given(STEPS, st.sampled_from(CARDS))
def test_what_must_order(step, card):
    figures = figures_for(card)
    runs = arithmetic(step, figures, True)
    assert runs["falqon_frozen_a"].seconds["adapter"] <= runs["falqon"].seconds["adapter"]
    assert runs["falqon_frozen_a"].kept < runs["falqon"].kept
    stored = arithmetic(replace(step, transpose="store"), figures, True)["falqon"]
    a_alone = step.adapter_dtype == "fp8"  # in columns beside Wᵀ
    assert bool(stored.seconds["transposes"]) == a_alone
    each = arithmetic(replace(step, transpose="transient"), figures, True)["falqon"]
    assert stored.seconds["transposes"] < each.seconds["transposes"]
    # W both ways, of linear layers alone: experts are read as they lie.
    stacked = sum(kind.layers * kind.stacked_weights for kind in step.decoder.kinds)
    both = runs["peft"].weights - stacked
    assert stored.weights >= both
    assert (stored.weights == both) or a_alone  # W with room for b, where the library reads it
    if "falqon_nvfp4" in runs:
        packed = runs["falqon_nvfp4"]
        assert packed.seconds["transposes"] == 0
        assert packed.weights == pytest.approx(0.5625 / 2 * runs["peft"].weights)
    # NF4 is PEFT's step with W dequantized, whatever the tokens.
    extra = runs["nf4"].total - runs["peft"].total
    assert extra == pytest.approx(runs["nf4"].seconds["dequantize"])
    other = arithmetic(replace(step, tokens=step.tokens + 100), figures, True)
    assert other["nf4"].seconds["dequantize"] == runs["nf4"].seconds["dequantize"]


@pytest.mark.parametrize("card", WITHOUT_FP8)
def test_a_card_without_fp8_has_integers(card):
    """O at the rate of integers, dL/dx at that of bf16: half and more of PEFT's products."""
    figures = figures_for(card).given(["bandwidth=1e30", "ramp=1e-30", "gap=1e-30"])
    runs = arithmetic(STEP, figures, True)
    assert [*runs] == ["falqon_int8", "peft", "nf4"]
    ratio = figures.int8_gemm.value / figures.bf16_gemm.value
    # Whole waves of tiles of other sizes, and A's rows behind W's, change it by a few percent.
    share = runs["falqon_int8"].seconds["products"] / runs["peft"].seconds["products"]
    assert share == pytest.approx((1 + 1 / ratio) / 2, rel=0.1)
    assert runs["falqon_int8"].weights == runs["peft"].weights / 2
    stored = arithmetic(replace(STEP, transpose="store"), figures, True)
    assert stored["falqon_int8"] == runs["falqon_int8"]


def test_limits():
    """With free memory and no fixed costs, products in whole waves differ by the rates alone, and
    K by the adapter's share; a host with a price of its own is all that is left of few tokens.
    """
    free = ["bandwidth=1e30", "ramp=1e-30", "gap=1e-30"]
    figures = H100.given([*free, "fp8_gemm=2e15", "bf16_gemm=1e15"])
    many = Step(SEVEN, 132, 4096, 1, "fp8", "store")
    runs = arithmetic(many, figures)
    ratio = runs["peft"].seconds["products"] / runs["falqon"].seconds["products"]
    assert ratio == pytest.approx(2, rel=2e-3)
    assert runs["falqon"].seconds["host"] == 0

    few = Step(SEVEN, 1, 1, 64)
    dear = arithmetic(few, H100.given(["launch=1"]))
    assert dear["peft"].total == pytest.approx(dear["peft"].host)
    assert dear["peft"].host == pytest.approx(32 * 73 + 4 + ceil(2 * 7 * 32 / 36), rel=1e-9)


def test_every_figure_has_a_source_and_what_was_given_says_so():
    for card in CARDS:
        for name, figure in figures_for(card).listed().items():
            assert figure.source, name
            assert figure.value > 0, name
    given = H100.given(["fp8_gemm=1.4e15"])
    assert given.fp8_gemm.value == 1.4e15
    assert "command line" in given.fp8_gemm.source
    assert figures_for("H200").fp8_gemm.assumed
    assert not H100.fp8_gemm.assumed
    assert H100.own_gemm.assumed


def test_the_result_is_what_is_computed(monkeypatch):
    """`benchmarks/cost_step.py --results` writes it anew."""
    monkeypatch.syspath_prepend(str(RESULTS.parent))
    of = importlib.import_module("cost_step")
    kept_runs = json.loads((RESULTS / "cost_step-llama-7b-h100.json").read_text())["runs"]
    assert kept_runs.keys() == of.CHOICES.keys()
    for name, (dtype, transpose, attention, words) in of.CHOICES.items():
        figures = figures_for("H100", attention).given(list(words))
        for shape, (batch, tokens, graphs) in of.STEPS.items():
            step = Step(SEVEN, batch, tokens, 64, dtype, transpose)
            for run, now in arithmetic(step, figures, graphs).items():
                assert kept_runs[name][shape][run]["seconds"] == pytest.approx(now.seconds)


def test_attention_between_published_lengths():
    forward = {n: H100.attention(n)[0] for n in (1, 512, 724, 1024, 1 << 20)}
    assert forward[1] == forward[512] == 191e12
    assert forward[724] == pytest.approx((191e12 + 260e12) / 2, rel=1e-3)  # √2 · 512
    assert forward[1 << 20] == 335e12


def test_a_config_is_the_model_that_it_describes(config):
    for model in (str(config), str(config.parent)):
        assert replace(decoder_of(model), name=SEVEN.name, source=SEVEN.source) == SEVEN


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": "many"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_experts": 8}, "num_experts_per_tok"),
        ({"moe_num_experts": 8}, "moe_num_experts"),
        ({"num_experts": 8, "kv_lora_rank": 64}, "kv_lora_rank"),
        ({"num_experts": 8, "layer_types": ["linear_attention"]}, "layer_types"),
    ],
)
def test_a_config_that_is_no_decoders(config, change, problem):
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(FalqonError, match=problem):
        decoder_of(str(config))
    for text in ("[1]", "{", '{"text_config": 3}'):
        config.write_text(text)
        with pytest.raises(FalqonError, match=r"config\.json"):
            decoder_of(str(config))


NUMBER = {"type": "number", "minimum": 0}
WHOLE = {"type": "integer", "minimum": 0}
RUN = {
    "type": "object",
    "additionalProperties": False,
    "required": ["ms", "total_ms", "speedup", "host_ms", "launches", "kept_bytes"],
    "properties": {
        "ms": {
            "type": "object",
            "required": list(PARTS),
            "additionalProperties": False,
            "properties": dict.fromkeys(PARTS, NUMBER),
        },
        **dict.fromkeys(("total_ms", "speedup", "host_ms"), NUMBER),
        **dict.fromkeys(("launches", "kept_bytes", "weight_bytes", "library_products"), WHOLE),
    },
}
FIGURE = {
    "type": "object",
    "required": ["value", "unit", "source"],
    "properties": {"value": NUMBER, "unit": {"type": "string"}, "source": {"type": "string"}},
}
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["note", "model", "card", "steps", "figures", "notes", "baseline"],
    "properties": {
        "note": {"type": "string", "pattern": "not a measurement"},
        "model": {"type": "object", "required": ["name", "hidden", "source"]},
        "card": {"type": "string"},
        "attention": {"enum": ["flash2", "cudnn"]},
        "cuda_graphs": {"type": "boolean"},
        "baseline": {"const": BASELINE},
        "batch": {"type": "integer"},
        "rank": {"type": "integer"},
        "adapter_dtype": {"enum": ["bfloat16", "fp8"]},
        "transpose": {"enum": ["transient", "store"]},
        "steps": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["tokens", "runs"],
                "properties": {
                    "tokens": {"type": "integer"},
                    "runs": {
                        "type": "object",
                        "required": [name for name in RUNS if name not in DENSE_RUNS],
                        "additionalProperties": RUN,
                    },
                },
            },
        },
        "figures": {"type": "object", "additionalProperties": FIGURE},
        "notes": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def as_json(capsys: Any, *words: str) -> dict[str, Any]:
    assert main(["cost", "--step", "--card", "H100", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    validate(found, SCHEMA)
    return found


def test_json(capsys):
    words = [
        "--batch",
        "16",
        "--tokens",
        "512",
        "--tokens",
        "64",
        "--adapter-dtype",
        "fp8",
        "--cuda-graphs",
    ]
    found = as_json(capsys, *words, "--model", "qwen3-8b", "--transpose", "store")
    assert [step["tokens"] for step in found["steps"]] == [512, 64]
    step = Step(MODELS["qwen3-8b"], 16, 512, 64, "fp8", "store")
    runs: dict[str, Run] = arithmetic(step, H100, True)
    shown = found["steps"][0]["runs"]
    for name, run in runs.items():
        assert shown[name]["total_ms"] == pytest.approx(1e3 * run.total)
        assert shown[name]["speedup"] == pytest.approx(runs["peft"].total / run.total)
    assert set(found["figures"]) == set(H100.listed())
    given: Figures = H100.given(["addmm_passes=4"])
    words = ["--figure", "addmm_passes=4", "--attention", "flash2"]
    for kind, more in (("fp8", []), ("bfloat16", ["--adapter-dtype", "bfloat16"])):
        found = as_json(capsys, *words, *more)
        step = replace(STEP, adapter_dtype=kind, transpose="store")
        assert found["steps"][0]["runs"]["falqon"]["total_ms"] == pytest.approx(
            1e3 * arithmetic(step, given)["falqon"].total
        )


def test_the_table_says_what_it_is(capsys):
    words = ["--card", "h100", "--model", "llama-3-8b", "--transpose", "transient"]
    assert main(["cost", "--step", *words]) == 0
    shown = capsys.readouterr().out
    assert "not a measurement" in shown
    assert "assumed" in shown
    for name in ("products", "transposes", "attention", "PEFT bf16", "tritonbench#1149"):
        assert name in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "--card", "H100", "--model", "llama-8b"], "llama-3-8b"),
        (["--step", "--card", "H100", "--model", "gpt"], "is unknown, and there is no such file"),
        (["--step", "--card", "H1000"], "'H100'"),
        (["--step", "--card", "MI300X"], "no FP8 kernels for it"),
        (["--step", "--card", "H100", "--rank", "0"], "--rank 0"),
        (["--step", "--card", "H100", "--adapter-dtype", "float32"], "Give bfloat16 or fp8"),
        (["--step", "--card", "H100", "--figure", "speed=3"], "no figure has this name"),
        (["--step", "--card", "H100", "--figure", "launch=fast"], "no positive number"),
        (["--step", "--card", "H100", "--figure", "launch=nan"], "no positive number"),
        (["--card", "H100", "--model", "llama-7b"], "Add --step"),
        (["--card", "H100", "--cuda-graphs"], "Add --step"),
        (["--card", "H100", "--adapter-dtype", "fp8"], "Add --step"),
    ],
)
def test_what_cant_be_asked_is_explained(words, message, capsys):
    assert main(["cost", *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
