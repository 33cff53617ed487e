"""`falqon_fx.cost.step` of mixtures of experts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from falqon_fx import FalqonError
from falqon_fx.cost.step.decoder import Mixture, decoder_of
from falqon_fx.cost.step.launches import Timer
from falqon_fx.cost.step.layer import Step
from falqon_fx.cost.step.whole import arithmetic, layer_of
from tests.costs import EXPERTS, H100
from tests.costs import config as config

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768}


@pytest.mark.parametrize(
    ("change", "mixture"),
    [
        (MOE, Mixture(8, 2, 768)),
        (MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, Mixture(8, 2, 768, dense=17)),
        (MOE | {"first_k_dense_replace": 3}, Mixture(8, 2, 768, dense=3)),
        (MOE | {"mlp_layer_types": ["dense"] + ["sparse"] * 31}, Mixture(8, 2, 768, dense=1)),
        (MOE | {"n_shared_experts": 2}, Mixture(8, 2, 768, shared=1536)),
        (MOE | {"shared_expert_intermediate_size": 512}, Mixture(8, 2, 768, shared=512)),
        ({"num_local_experts": 8, "num_experts_per_tok": 2}, Mixture(8, 2, 11008)),
    ],
)
def test_a_mixtures_config(config, change, mixture):
    """By the names of Qwen, DeepSeek and GLM, Mixtral and gpt-oss."""
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert decoder_of(str(config)).mixture == mixture


def test_experts_cost_what_they_move():
    """Their weights are read once, whatever the tokens; PEFT's sum and its gradient go over them.
    With all tokens at all experts a mixture multiplies as a dense model of all their columns does.
    """
    few = Step(EXPERTS, 1, 512, 16)
    runs = {n: arithmetic(few, H100, True)[n] for n in ("falqon", "peft")}
    elements = EXPERTS.layers * EXPERTS.stacked_weights
    assert elements == 48 * 128 * 3 * 2048 * 768
    assert runs["falqon"].weights - EXPERTS.layers * EXPERTS.linear_weights == elements
    peft_alone = (4 + 1 + 2) * 2 * elements / H100.bandwidth.value  # the sum, dL/dW', dA and dB
    assert runs["peft"].seconds["adapter"] + runs["peft"].seconds["products"] > peft_alone
    every = replace(EXPERTS, mixture=Mixture(4, 4, 1536))
    dense = replace(EXPERTS, mixture=None, inner=6144)
    products = [
        sum(x.seconds for x in layer_of("peft", Step(d, 8, 4096, 1), Timer(H100)) if _of_w(x.name))
        for d in (every, dense)
    ]
    assert products[0] == pytest.approx(products[1], rel=0.05)


def _of_w(name: str) -> bool:
    return name.startswith(("x W", "dO W"))


def test_adapters_of_experts_are_added_in_bfloat16():
    with pytest.raises(FalqonError, match="not built for stacked experts"):
        Step(EXPERTS, 1, 512, 16, "fp8")


def test_a_mixture_without_experts_is_none(config):
    sizes = json.loads(config.read_text()) | MOE | {"mlp_only_layers": [*range(32)]}
    config.write_text(json.dumps(sizes))
    with pytest.raises(FalqonError, match="none of its layers"):
        decoder_of(str(config))
