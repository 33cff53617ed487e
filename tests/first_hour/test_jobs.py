"""Loops by hand around small models of other kinds, and unusual loops around a usual one: the
losses of plain PEFT within FP8, and a number of graphs that doesn't grow.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import diffusers
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from tests import zoo
from tests.first_hour.jobs import (
    Curves,
    Job,
    Touch,
    assert_trains_as_plain_peft,
    assert_wrong_is_outside,
    compiled,
)

STEPS = 12
Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def adapt(model: nn.Module, **lora: Any) -> nn.Module:
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora}
    return peft.get_peft_model(model, peft.LoraConfig(**options)).train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def denoising(model: nn.Module, batch: Batch) -> Tensor:
    """As diffusers' training scripts: the noise is what the model should say."""
    target, inputs = batch["target"], {k: v for k, v in batch.items() if k != "target"}
    return F.mse_loss(model(**inputs, return_dict=False)[0], target)


def steps(
    model: nn.Module,
    batches: Iterator[Batch],
    loss_of: Loss = own_loss,
    optimizer: torch.optim.Optimizer | None = None,
    count: int = STEPS,
) -> Curves:
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=1e-2)
    losses = []
    for _ in range(count):
        loss = loss_of(model, next(batches))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"loss": losses}


def always(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


# -- kinds of models -------------------------------------------------------------------------------


def unet() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    noise = torch.randn(2, 4, 8, 8)
    return model, {
        "sample": 0.3 * torch.randn(2, 4, 8, 8) + noise,
        "timestep": torch.tensor([3, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "target": noise,
    }


def flux() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    for parameter in model.parameters():
        if not parameter.any():  # its last layers start at zero
            nn.init.normal_(parameter, std=0.05)
    noise = torch.randn(2, 16, 4)
    return model, {
        "hidden_states": 0.3 * torch.randn(2, 16, 4) + noise,
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.randn(16, 3).round(),
        "txt_ids": torch.zeros(5, 3),
        "target": noise,
    }


ATTENTION = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def text(name: str, **lora: Any) -> Callable[[], tuple[nn.Module, Batch]]:
    def make() -> tuple[nn.Module, Batch]:
        model, batch = zoo.OTHERS[name]()
        if name == "vit":
            batch = {**batch, "labels": torch.tensor([0, 1])}
        return adapt(model, **lora), batch

    return make


def image(make: Callable[[], tuple[nn.Module, Batch]]) -> Callable[[], tuple[nn.Module, Batch]]:
    def adapted() -> tuple[nn.Module, Batch]:
        model, batch = make()
        return adapt(model, **ATTENTION), batch

    return adapted


# Its head is trained as a copy, in full precision.
BERT = {"target_modules": ["query", "value", "dense"], "modules_to_save": ["cls"]}
KINDS: dict[str, tuple[Callable[[], tuple[nn.Module, Batch]], Loss]] = {
    "t5": (text("t5"), own_loss),
    "whisper": (text("whisper"), own_loss),
    "vit": (text("vit"), own_loss),
    "bert-modules-to-save": (text("bert", **BERT), own_loss),
    "unet": (image(unet), denoising),
    "flux": (image(flux), denoising),
}


def job_of(name: str) -> Job:
    make, loss_of = KINDS[name]

    def job(touch: Touch) -> Curves:
        torch.manual_seed(0)
        model, batch = make()
        touch(model)
        torch.manual_seed(1)
        return steps(model, always(batch), loss_of)

    return job


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_kind_of_model_trains_as_plain_peft(name, graphs):
    assert_trains_as_plain_peft(job_of(name))
    # transformers notes in the config of a classifier, at its first call, of what kind labels are.
    assert len(graphs) == (2 if name == "vit" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name != "unet"])
def test_so_it_does_with_inductor(name):
    """With the dropout that eager draws: T5 and BERT have one. Inductor by itself, without falqon,
    trains this UNet otherwise than eager does.
    """
    with torch._inductor.config.patch(fallback_random=True):
        assert_trains_as_plain_peft(job_of(name), compiled(inner="inductor"))


# -- kinds of loops --------------------------------------------------------------------------------


def llama(**others: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        use_cache=False,
        initializer_range=0.2,
    )
    return adapt(transformers.LlamaForCausalLM(config), **others)


def tokens(least: int = 16, most: int = 16, rows: int = 4) -> Iterator[Batch]:
    """Of few of the words: there is something to learn."""
    chosen = random.Random(0)
    while True:
        length = chosen.randint(least, most)
        ids = torch.tensor([chosen.choices(range(8), k=length) for _ in range(rows)])
        yield {"input_ids": ids, "labels": ids}


def partly_full(touch: Touch) -> Curves:
    """The first layer's down_proj and all norms train in full, beside the adapters of the rest."""
    model = llama(exclude_modules=[r"model.layers.0.mlp.down_proj"])
    for name, parameter in model.named_parameters():
        if "norm" in name or "layers.0.mlp.down_proj" in name:
            parameter.requires_grad_(True)
    touch(model)
    return steps(model, tokens(), optimizer=torch.optim.AdamW(trained(model), lr=3e-3))


def float16(touch: Touch) -> Curves:
    """The first scale overflows: that step is skipped. The next is one at which nothing does: in
    between FP8's sums overflow later than float16's, and fewer steps are skipped.
    """
    model = llama()
    touch(model)
    optimizer, data = torch.optim.AdamW(trained(model), lr=1e-2), tokens()
    options = {"init_scale": 2.0**24, "backoff_factor": 2.0**-8, "growth_interval": 1000}
    scaler, losses = torch.amp.GradScaler("cpu", **options), list[float]()
    for _ in range(STEPS + 8):
        with torch.autocast("cpu", torch.float16):
            loss = own_loss(model, next(data))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**24
    return {"loss": losses}


def checkpointed(reentrant: bool) -> Job:
    def job(touch: Touch) -> Curves:
        model = llama()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        touch(model)
        return steps(model, tokens())

    return job


LOOPS: dict[str, tuple[Job, int]] = {
    "partly full": (partly_full, 1),
    "float16 with GradScaler": (float16, 1),
    "checkpointing": (checkpointed(False), 3),  # one of them is a single node
    "reentrant checkpointing": (checkpointed(True), 8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_kind_of_loop_trains_as_plain_peft(name, graphs):
    job, most = LOOPS[name]
    assert_trains_as_plain_peft(job)
    assert len(graphs) <= most


# -- optimizers ------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    # By default it steps in proportion to the parameter, and B begins at zero.
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, eps=(None, 1.0)),
    "Adafactor, transformers": lambda p: transformers.Adafactor(
        p, lr=1e-2, relative_step=False, scale_parameter=False
    ),
    "Muon": lambda p: torch.optim.Muon(p, lr=3e-2),
    "AdamW8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=64),
    "Lion8bit": lambda p: bitsandbytes.optim.Lion8bit(p, lr=3e-3, min_8bit_size=64),
}


@pytest.mark.slow
def test_optimizers_train_as_in_plain_peft(graphs):
    """Those that keep their states in eight bits, too; all on one graph."""
    for make in OPTIMIZERS.values():

        def job(touch: Touch, make: Any = make) -> Curves:
            model = llama()
            touch(model)
            return steps(model, tokens(), optimizer=make(trained(model)))

        assert_trains_as_plain_peft(job)
    assert len(OPTIMIZERS) == 7
    assert len(graphs) == 1


# -- lengths ---------------------------------------------------------------------------------------


def lengths(touch: Touch) -> Curves:
    model = llama()
    touch(model)
    return steps(model, tokens(4, 100, rows=2), count=200)


@pytest.mark.slow
def test_two_hundred_lengths_make_two_graphs(graphs):
    assert_trains_as_plain_peft(lengths)
    assert len(graphs) <= 2


@pytest.mark.slow
def test_with_inductor_too(graphs):
    assert_trains_as_plain_peft(lengths, compiled(inner="inductor"))
    assert len(graphs) <= 2


# -- the test of the tests -------------------------------------------------------------------------


def test_what_is_wrong_is_outside_of_the_bound():
    def job(touch: Touch) -> Curves:
        model = llama()
        touch(model)
        return steps(model, tokens())

    assert_wrong_is_outside(job)
