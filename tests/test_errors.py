"""Bad input: an error or a warning that names the site and the remedy, and nothing changed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.update import STEP
from tests.models import Relu, Stack, fill_b, lora_b, tiny_mlp, train


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, backend="falqon", options={"inner": "eager", **options})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(lora_b(model), lr=1e-2)


def refusal(model: nn.Module, call: nn.Module, *args: Tensor) -> FalqonError:
    """The error that a first call raises; no parameter may have changed.

    Dynamo wraps what a backend raises while it compiles.
    """
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises((FalqonError, BackendCompilerFailed)) as caught:
        call(*args)
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, FalqonError)
    assert str(error) in str(caught.value)  # all of it reaches the user
    for name, parameter in model.named_parameters():
        assert _same(parameter, before[name]), name
    assert not falqon_fx.adapters(model)
    return error


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and (a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()))


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 10}, "option 'top_k': is unknown. The nearest option is 'topk'"),
        ({"granularity": "rows"}, "'rows' is none of 'tensor', 'row'. The nearest is 'row'"),
        ({"topk": 0}, "the count 0 is below 1"),
        ({"topk": -3}, "the count -3 is below 1"),
        ({"topk": 1.5}, "the fraction 1.5 is outside"),
        ({"topk": 0.0}, "the fraction 0.0 is outside"),
        ({"topk": True}, "neither a count, a fraction nor 'all'"),
        ({"topk": "most"}, "neither a count, a fraction nor 'all'"),
        ({"seed": -1}, "-1 is not an integer >= 0"),
        ({"include": 3}, "3 is not a list of patterns"),
        ({"config": {"topk": 10}}, "is not a FalqonConfig"),
    ],
)
def test_a_bad_option_is_named(options, words):
    model = Relu()
    error = refusal(model, compiled(model, **options), torch.randn(2, 32))
    assert isinstance(error, FalqonConfigError)
    assert words in str(error)


def test_a_topk_above_a_sites_rows():
    model = Relu()  # up has 48 rows, down 32
    error = refusal(model, compiled(model, topk=40), torch.randn(2, 32))
    assert "40" in str(error)
    assert "32" in str(error)
    assert '"all"' in str(error)


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_layer", "down: its base weight holds NaN or Inf"),
        ("lora_A", "down: its lora_A holds NaN or Inf"),
        ("lora_B", "down: its lora_B holds NaN or Inf"),
    ],
)
def test_nan_or_inf_in_a_parameter(value, name, words):
    model = Relu()
    with torch.no_grad():
        getattr(model.down, name).weight[1, 2] = value
    with pytest.raises(FalqonError) as caught:
        compiled(model)(torch.randn(2, 32))
    assert words in str(caught.value)
    assert "exclude=" in str(caught.value)
    assert "down" not in falqon_fx.adapters(model)


def test_nan_in_one_site_leaves_the_lora_a_of_the_others_alone():
    """init="svd" writes lora_A: it must not have begun."""
    model = Relu()
    with torch.no_grad():
        model.down.base_layer.weight[0, 0] = float("nan")
    error = refusal(model, compiled(model, init="svd"), torch.randn(2, 32))
    assert "down: its base weight holds NaN or Inf" in str(error)


@pytest.mark.parametrize("name", ["base", "a", "b"])
def test_a_parameter_on_another_device_than_its_input(name):
    """On the way through Dynamo, Dynamo itself refuses before any backend sees the model."""

    class Site(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(32, 48).requires_grad_(False)
            self.a, self.b = nn.Linear(32, 4, bias=False), nn.Linear(4, 48, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.b(self.a(x))

    model = nn.Sequential(Site())
    getattr(model[0], name).to("meta")
    gm = torch.fx.symbolic_trace(model)
    with pytest.raises(FalqonError, match="a parameter is on another device than its input") as no:
        falqon_fx.rewrite(gm, [torch.randn(2, 32)])
    assert no.value.site == f"0.{name}"
    assert "Move the whole model to one device" in str(no.value)


def test_a_prepared_model_under_another_config():
    model, x = tiny_mlp(), torch.randn(2, 32)
    falqon_fx.prepare(model, FalqonConfig(granularity="tensor"), progress=False)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model)(x)
    assert "prepare() used granularity='tensor'" in str(caught.value)
    assert "the same config" in str(caught.value)
    torch._dynamo.reset()
    compiled(model, granularity="tensor")(x)
    assert len(falqon_fx.adapters(model)) == 2


# -- left alone, with a warning --------------------------------------------------------------------


def warnings_of(call: nn.Module, *inputs: Tensor) -> tuple[list[Tensor], list[str]]:
    """Results for several inputs, and what a user with Python's default filters reads."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        results = [call(x) for x in inputs]
    return results, [str(w.message) for w in seen if "falqon" in str(w.message)]


def test_a_quantized_base_is_rejected_and_left_alone():
    class Fp8Linear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            weight = linear.weight.detach().to(torch.float8_e4m3fn)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).t()

    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    model.down.base_layer = Fp8Linear(model.down.base_layer)
    expected = model(x)
    (result,), seen = warnings_of(compiled(model, include="down"), x)
    assert torch.equal(result, expected)
    assert any("down" in text and "quantized" in text for text in seen)
    assert not falqon_fx.adapters(model)


def test_a_model_without_lora_warns_once_and_runs_as_it_was():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), torch.randn(2, 32)
    call = compiled(model, inner="aot_eager")
    results, seen = warnings_of(call, x, x[:1], x)  # the second makes another graph
    assert len(seen) == 1
    assert "no LoRA layer" in seen[0]
    assert torch.equal(results[0], model(x))
    assert torch.equal(results[1], model(x[:1]))
    assert torch.equal(results[2], model(x))
    results[0].sum().backward()


def test_each_rejection_is_warned_of_once():
    model = Stack()
    call = compiled(model, exclude="*.down")
    _, seen = warnings_of(call, torch.randn(2, 32), torch.randn(3, 5, 32))  # two graphs
    assert len(seen) == 2
    assert [f"blocks.{i}.down" in text for i, text in enumerate(seen)] == [True, True]
    assert list(falqon_fx.adapters(model)) == ["blocks.0.up", "blocks.1.up"]


# -- distributed -----------------------------------------------------------------------------------


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("regional", [False, True])
def test_fsdp2_is_refused(group, regional):
    from torch.distributed.fsdp import fully_shard

    model = Stack()
    mesh = dist.init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in model.blocks if regional else [model]:
        part.compile(backend="falqon", options={"inner": "eager"})
    with pytest.raises(BackendCompilerFailed) as caught:
        model(torch.randn(2, 32))
    assert isinstance(caught.value.inner_exception, FalqonError)
    assert "up: its parameters are sharded (FSDP or tensor parallel)" in str(caught.value)
    assert "Use DDP or one GPU" in str(caught.value)


def test_dtensor_parameters_are_refused(group):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (1,))
    model = distribute_module(Relu(), mesh)
    x = distribute_tensor(torch.randn(2, 32), mesh, [Replicate()])
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model)(x)
    assert "up: its parameters are sharded" in str(caught.value)


def ddp(model: nn.Module, bucket: int | None, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """``bucket``: bytes of gradients a bucket. Torch has no option for the first one."""
    if bucket is None:
        return DistributedDataParallel(model)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", bucket)
    return DistributedDataParallel(model, bucket_cap_mb=bucket / 2**20)


def test_ddp_with_one_bucket_trains_as_without_ddp(group, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    call = compiled(ddp(model, None, monkeypatch), inner="aot_eager")
    assert train(call, adam(model), x, steps=4) == expected
    assert [int(state.counters[STEP]) for state in falqon_fx.adapters(model).values()] == [3] * 4


BLOCK = 4 * 2 * (48 * 4 + 32 * 4)  # bytes of the gradients of a block: two A and two B


@pytest.mark.parametrize("bucket", [4, BLOCK // 2 + 4])
def test_ddp_buckets_that_cut_a_site_are_refused(group, monkeypatch, bucket):
    model = Stack()
    error = refusal(model, compiled(ddp(model, bucket, monkeypatch)), torch.randn(2, 32))
    assert "blocks." in error.site
    assert "lora_B" in error.site
    assert "torch._dynamo.config.optimize_ddp = False" in str(error)


def test_ddp_buckets_that_cut_no_site_train_as_without_ddp(group, graphs, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    graphs.clear()
    call = compiled(ddp(model, BLOCK, monkeypatch), inner="aot_eager")
    assert train(call, adam(model), x, steps=4) == expected
    assert [len(piece.sites) for piece in graphs] == [2, 2]
    assert [int(state.counters[STEP]) for state in falqon_fx.adapters(model).values()] == [3] * 4


class Headed(nn.Module):
    """Trained layers besides the sites, as PEFT's modules_to_save has: each alone in its piece."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.stack, self.head = nn.Linear(32, 40), Stack(), nn.Linear(32, 20)
        self.narrow = nn.Linear(40, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(self.narrow(torch.relu(self.wide(x))) + x))


def test_ddp_pieces_may_hold_other_trained_layers(group, graphs, monkeypatch):
    """Buckets of a block's size: the head, then the blocks, then the rest."""
    model, x = Headed(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)

    def run(call: nn.Module, model: nn.Module) -> list[Tensor]:
        torch._dynamo.reset()
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        outputs = []
        for _ in range(3):
            outputs.append(call(x).detach())
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return outputs

    expected = run(compiled(alone, inner="aot_eager"), alone)
    graphs.clear()
    found = run(compiled(ddp(model, BLOCK, monkeypatch), inner="aot_eager"), model)
    assert len(graphs) > 2
    assert sum(len(piece.sites) for piece in graphs) == 4
    assert all(map(torch.equal, found, expected))


def test_ddp_without_its_optimizer_trains_with_any_buckets(group, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=False):
        call = compiled(ddp(model, 4, monkeypatch), inner="aot_eager")
        assert train(call, adam(model), x, steps=4) == expected
