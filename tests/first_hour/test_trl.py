"""trl's trainers, with a model of one layer: plain PEFT's losses within FP8, few graphs, and the
reference model and the rollouts of the policy that is trained.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig
from falqon_fx.integrations.transformers import FalqonCallback
from tests.emulation import emulate
from tests.first_hour.jobs import (
    Curves,
    Job,
    Touch,
    assert_trains_as_plain_peft,
    assert_wrong_is_outside,
)
from tests.models import fill_b

pytestmark = pytest.mark.slow  # data sets and trainers take longer than the models

STEPS = 8
WORDS = [f"w{i}" for i in range(61)]
CONFIG = FalqonConfig(inner="eager")
Made = Callable[[Path, nn.Module, list[Any]], transformers.Trainer]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def policy(
    kind: Any = transformers.LlamaForCausalLM, task: str = "CAUSAL_LM", layers: int = 1
) -> nn.Module:
    """Llama with an adapter on each linear layer, always the same."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
        num_labels=1,
        initializer_range=0.2,  # logits that differ, so that there is something to learn
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=task)
    return peft.get_peft_model(kind(config), lora)


def lines(count: int, least: int, most: int, seed: int = 0) -> list[str]:
    """Texts of few of the words: there is something to learn, and lengths change."""
    chosen = random.Random(seed)
    return [
        " ".join(chosen.choices(WORDS[:6], k=chosen.randint(least, most))) for _ in range(count)
    ]


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
        **others,
    }


def sft(**others: Any) -> Made:
    def make(folder: Path, model: nn.Module, callbacks: list[Any]) -> transformers.Trainer:
        data = datasets.Dataset.from_dict({"text": lines(64, 4, 20)})
        args = trl.SFTConfig(**arguments(folder, max_length=24, **others))
        kinds = {"train_dataset": data, "processing_class": tokenizer(), "callbacks": callbacks}
        return trl.SFTTrainer(model, args, **kinds)

    return make


def preferences(prompts: int = 32) -> dict[str, list[str]]:
    return {
        "prompt": lines(prompts, 2, 5),
        "chosen": lines(prompts, 4, 8, 1),
        "rejected": [line.replace("w", "w3") for line in lines(prompts, 4, 8, 2)],  # others
    }


def dpo(**others: Any) -> Made:
    def make(folder: Path, model: nn.Module, callbacks: list[Any]) -> transformers.Trainer:
        args = trl.DPOConfig(**arguments(folder, beta=0.5, max_length=24, **others))
        data = datasets.Dataset.from_dict(preferences())
        kinds = {"train_dataset": data, "processing_class": tokenizer(), "callbacks": callbacks}
        return trl.DPOTrainer(model, args=args, **kinds)

    return make


def kto(folder: Path, model: nn.Module, callbacks: list[Any]) -> transformers.Trainer:
    both = preferences(16)
    data = datasets.Dataset.from_dict(
        {
            "prompt": [*both["prompt"], *both["prompt"]],
            "completion": [*both["chosen"], *both["rejected"]],
            "label": [True] * 16 + [False] * 16,
        }
    )
    args = trl.KTOConfig(**arguments(folder, beta=0.5, max_length=24))
    kinds = {"train_dataset": data, "processing_class": tokenizer(), "callbacks": callbacks}
    return trl.KTOTrainer(model, args=args, **kinds)


def reward(folder: Path, model: nn.Module, callbacks: list[Any]) -> transformers.Trainer:
    both = preferences()
    data = datasets.Dataset.from_dict({name: both[name] for name in ("chosen", "rejected")})
    args = trl.RewardConfig(**arguments(folder, max_length=24))
    kinds = {"train_dataset": data, "processing_class": tokenizer(), "callbacks": callbacks}
    return trl.RewardTrainer(model, args=args, **kinds)


EARLY, LATE = range(3, 6), range(30, 33)  # few words, so that they are learned in a few steps


def early_words(completion_ids: list[list[int]], **others: Any) -> list[float]:
    """The share of words in the first third."""
    return [sum(token < 20 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def grpo(rollouts: Any = None, **others: Any) -> Made:
    def make(folder: Path, model: nn.Module, callbacks: list[Any]) -> transformers.Trainer:
        args = trl.GRPOConfig(
            **arguments(folder, num_generations=4, max_completion_length=6, beta=0.1, **others)
        )
        return trl.GRPOTrainer(
            model,
            reward_funcs=early_words,
            args=args,
            train_dataset=datasets.Dataset.from_dict({"prompt": lines(32, 2, 5)}),
            processing_class=tokenizer(),
            callbacks=callbacks,
            rollout_func=rollouts,
        )

    return make


def written_before(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Rollouts that no policy chose, the same for each way of training: early words and late
    ones in turn.
    """
    chosen = random.Random(trainer.state.global_step)
    return {
        "prompt_ids": tokenizer()(list(prompts))["input_ids"],
        "completion_ids": [chosen.choices((EARLY, LATE)[i % 2], k=6) for i in range(len(prompts))],
        "logprobs": [[-4.0] * 6 for _ in prompts],
    }


# GRPO's loss is zero by construction where it is taken (its gradient is not). With CISPO's, whose
# gradient is the same there, it is the log-probability of what is rewarded: how far it has learned.
CISPO = {"loss_type": "cispo", "epsilon_high": 5.0}


TRAINERS: dict[str, Made] = {
    "sft": sft(),
    "sft-packed-bfd": sft(packing=True, packing_strategy="bfd"),
    "sft-packed-wrapped": sft(packing=True, packing_strategy="wrapped"),
    "dpo": dpo(),
    "dpo-precomputed": dpo(precompute_ref_log_probs=True),
    "kto": kto,
    "reward": reward,
    "grpo": grpo(written_before, **CISPO),
}


# What any backend gets of trl's code. Its fused head breaks the graph in two: the model, and what
# sums log-probabilities up. Of each there is one of the policy and one of the reference, for the
# first length and for any other; and of the head's own compiled function one for the first length
# and one for any other. KTO meets the first length in one pass alone, but has a third pass, the
# policy without gradients, and its first switch of adapters compiles the policy anew.
GRAPHS = 2 * 2 * 2 + 2


SEEN = ("loss", "logps/chosen", "logps/rejected", "entropy")  # each trainer logs some of them


def job_of(name: str, folder: Path, *callbacks: Any) -> Job:
    def job(touch: Touch) -> Curves:
        scores = transformers.LlamaForSequenceClassification
        model = policy(scores, "SEQ_CLS") if name == "reward" else policy()
        touch(model)
        trainer = TRAINERS[name](folder, model, [*callbacks])
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "loss" in entry]
        names = [name for name in SEEN if all(name in entry for entry in steps)]
        return {name: [entry[name] for entry in steps] for name in names}

    return job


class Count(transformers.TrainerCallback):
    """How many graphs there are after each step."""

    def __init__(self, graphs: list[Any]) -> None:
        self.made: list[int] = []
        self._graphs = graphs

    def on_step_end(self, args, state, control, **kwargs):
        self.made.append(len(self._graphs))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_gives_the_losses_of_plain_peft(name, tmp_path, graphs):
    count = Count(graphs)
    assert_trains_as_plain_peft(job_of(name, tmp_path, count))
    assert count.made[-1] == count.made[-3] == len(graphs) <= GRAPHS
    others: list[Any] = []

    def plain(gm: Any, inputs: Any) -> Any:
        others.append(gm)
        return gm

    torch._dynamo.reset()
    job_of(name, tmp_path)(lambda model: model.compile(backend=plain))
    assert len(graphs) <= len(others)  # as many as any backend makes


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_wrong_in_a_trainer_is_outside_of_the_bound(name, tmp_path):
    assert_wrong_is_outside(job_of(name, tmp_path))


# -- the reference and the rollouts ----------------------------------------------------------------


class Recorded(transformers.TrainerCallback):
    """What the policy, and the model without its adapter, say of one text at each step."""

    def __init__(self) -> None:
        self.policy: list[Tensor] = []
        self.said: list[Tensor] = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        ids = torch.arange(3, 13)[None]
        with torch.no_grad():
            self.policy.append(model(input_ids=ids, use_cache=False).logits)
            with model.disable_adapter():
                self.said.append(model(input_ids=ids, use_cache=False).logits)

    on_train_end = on_step_begin


@pytest.mark.parametrize("make", [kto, grpo(written_before)], ids=["kto", "grpo"])
def test_the_reference_stays_as_it_is(make, tmp_path):
    """Bit for bit, while the policy moves away from it."""
    watch = Recorded()
    trainer = make(tmp_path, policy(), [FalqonCallback(CONFIG), watch])
    trainer.train()
    assert len(watch.said) == STEPS + 1
    assert all(torch.equal(said, watch.said[0]) for said in watch.said)
    assert torch.equal(watch.policy[0], watch.said[0])  # B is zero
    assert not torch.equal(watch.policy[-1], watch.said[0])
    assert len(falqon_fx.adapters(trainer.model)) == 7


@pytest.mark.parametrize("prepare", [False, True], ids=["unprepared", "prepared"])
def test_grpo_samples_from_the_policy_that_it_trains(prepare, tmp_path, graphs):
    """With the FP8 base and casts of the inputs: the tokens of an eager model of the same ops. No
    token, and no later step, makes a graph.
    """
    callback = FalqonCallback(CONFIG, prepare=prepare)
    trainer = grpo()(tmp_path, policy(layers=2), [callback])
    fill_b(trainer.model, 0.3)
    count = Count(graphs)
    trainer.add_callback(count)
    trainer.train()
    assert count.made[-1] == count.made[-3] <= GRAPHS + 6
    model = trainer.model.eval()
    states = falqon_fx.adapters(model)
    assert len(states) == 14
    ids = torch.randint(3, 64, (2, 6))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = len(graphs)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    twin = emulate(copy.deepcopy(model), states)
    torch._dynamo.reset()
    twin.get_base_model()._compiled_call_impl = None
    wanted = twin.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(tokens, wanted)
    assert len(graphs) - before <= 2
