"""Bad input: an error or a warning that names the site and the remedy, and nothing changed."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.parallel import DistributedDataParallel

import falqon_fx
from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from tests.models import LoraLinear, Relu, Stack, fill_b, freeze_a, tiny_mlp, train
from tests.parameters import each_value


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="falqon", options={"inner": "eager", **options})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def values(model: nn.Module) -> list[Tensor]:
    """Everything that there is of a model: its parameters, and the FP8 base of every site."""
    states = falqon_fx.adapters(model).values()
    return [*(p.detach().clone() for p in model.parameters()), *(s.base() for s in states)]


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
        ({"top_k": 10}, "option 'top_k': is unknown: the options are update, adapter_dtype, "),
        ({"top_k": 10}, "The nearest option is 'topk'"),
        ({"update": "row"}, "'row' is none of 'adapter', 'rows'. The nearest is 'rows'"),
        ({"granularity": "rows"}, "'rows' is none of 'tensor', 'row'. The nearest is 'row'"),
        ({"topk": 10}, "option 'topk': belongs to update=\"rows\""),
        ({"pending": "hold"}, 'Leave pending out, or set update="rows"'),
        ({"rounding": "nearest"}, 'with update="adapter" nothing is written'),
        ({"update": "rows", "topk": 0}, "the count 0 is below 1"),
        ({"update": "rows", "topk": -3}, "the count -3 is below 1"),
        ({"update": "rows", "topk": 1.5}, "the fraction 1.5 is outside"),
        ({"update": "rows", "topk": 0.0}, "the fraction 0.0 is outside"),
        ({"update": "rows", "topk": True}, "neither a count, a fraction nor 'all'"),
        ({"update": "rows", "topk": "most"}, "neither a count, a fraction nor 'all'"),
        ({"seed": -1}, "-1 is not an integer >= 0"),
        ({"include": 3}, "3 is not a list of patterns"),
        ({"config": {"seed": 10}}, "is not a FalqonConfig"),
    ],
)
def test_a_bad_option_is_named(options, words):
    model = Relu()
    error = refusal(model, compiled(model, **options), torch.randn(2, 32))
    assert isinstance(error, FalqonConfigError)
    assert words in str(error)


def test_a_topk_above_a_sites_rows():
    model = freeze_a(Relu())  # up has 48 rows, down 32
    error = refusal(model, compiled(model, update="rows", topk=40), torch.randn(2, 32))
    assert isinstance(error, FalqonConfigError)
    assert "down" in str(error)
    assert "40" in str(error)
    assert "32" in str(error)
    assert '"all"' in str(error)


def test_update_rows_with_a_trained_a_is_refused_and_names_the_other_update():
    model = Relu()
    error = refusal(model, compiled(model, update="rows"), torch.randn(2, 32))
    assert error.site == "up"
    assert "its lora_A is trained" in error.problem
    assert error.remedy == 'Set update="adapter", or freeze lora_A (requires_grad_(False))'


# -- parameters ------------------------------------------------------------------------------------


BAD = [float("nan"), -float("inf"), 1e5]


class Headed(nn.Module):
    """Two sites, and a frozen layer without an adapter that FP8 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.out = Relu(64, 48), nn.Linear(64, 96).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.relu(x))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("path", ["relu.down", "out"])
def test_a_base_weight_that_fp8_can_not_hold(value, path):
    """With an adapter or without: no base is made of the layers before it either."""
    model, x = Headed(), torch.randn(2, 64)
    call, layer = compiled(model), model.get_submodule(path)
    weight = getattr(layer, "base_layer", layer).weight
    good = weight[1, 2].item()
    with torch.no_grad():
        weight[1, 2] = value
    error = refusal(model, call, x)
    assert error.site == path
    assert ("exceeds 65536" if value == 1e5 else "holds NaN or Inf") in error.problem
    assert "exclude=" in error.remedy
    with torch.no_grad():
        weight[1, 2] = good
    assert call(x).isfinite().all()  # repaired
    assert len(falqon_fx.adapters(model)) == 2


@pytest.mark.parametrize("value", BAD)
def test_exclude_is_a_remedy_for_a_bad_base_weight(value):
    model, x = Headed(), torch.randn(2, 64)
    with torch.no_grad():
        model.out.weight[1, 2] = value
    found, expected = compiled(model, exclude="out")(x), model(x)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert list(falqon_fx.adapters(model)) == ["relu.up", "relu.down"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_nan_or_inf_in_an_adapter_reaches_the_loss_as_in_the_original(value, name):
    """Nothing else remembers it: `GradScaler` sees it, and a repaired adapter is right again."""
    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    call = compiled(model)
    first = call(x)
    parameter = getattr(model.down, name).weight
    good = parameter.detach().clone()
    with torch.no_grad():
        parameter[1, 2] = value
    assert torch.equal(call(x).isfinite(), model(x).isfinite())
    assert not call(x).isfinite().all()
    with torch.no_grad():
        parameter.copy_(good)
    assert torch.equal(call(x), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_layer", "down: its base weight holds NaN or Inf"),
        ("lora_A", "down: its lora_A holds NaN or Inf"),
        ("lora_B", "down: its lora_B holds NaN or Inf"),
    ],
)
def test_nan_or_inf_in_a_parameter_with_update_rows(value, name, words):
    model = freeze_a(Relu())
    with torch.no_grad():
        getattr(model.down, name).weight[1, 2] = value
    error = refusal(model, compiled(model, update="rows"), torch.randn(2, 32))
    assert words in str(error)
    assert "exclude=" in str(error)


def test_nan_in_one_site_leaves_the_lora_a_of_the_others_alone():
    """init="svd" writes lora_A: it must not have begun."""
    model = Relu()
    with torch.no_grad():
        model.down.base_layer.weight[0, 0] = float("nan")
    error = refusal(model, compiled(model, init="svd"), torch.randn(2, 32))
    assert "down: its base weight holds NaN or Inf" in str(error)


def _swap(part: str, *shape: int) -> Callable[[nn.Module], None]:
    def act(model: nn.Module) -> None:
        getattr(model.up, part).weight = nn.Parameter(torch.randn(*shape))

    return act


def _move(part: str, to: object) -> Callable[[nn.Module], None]:
    return lambda model: getattr(model.up, part).to(to)


# Dynamo runs a model on fake tensors before any backend sees it. They have no rule for dtypes.
TORCHS_OWN = "cannot be multiplied|same reduction dim|broadcast|same device"
APART = {
    "another rank of A": (_swap("lora_A", 8, 32), TORCHS_OWN),
    "another width of A": (_swap("lora_A", 4, 31), TORCHS_OWN),
    "another rank of B": (_swap("lora_B", 48, 3), TORCHS_OWN),
    "another height of B": (_swap("lora_B", 47, 4), TORCHS_OWN),
    "device of A": (_move("lora_A", "meta"), TORCHS_OWN),
    "device of B": (_move("lora_B", "meta"), TORCHS_OWN),
    "device of W": (_move("base_layer", "meta"), TORCHS_OWN),
    "dtype of A": (_move("lora_A", torch.bfloat16), "up: .* torch.float32, .* torch.bfloat16"),
    "dtype of B": (_move("lora_B", torch.bfloat16), "up: .* torch.bfloat16, .* torch.float32"),
    "dtype of W": (_move("base_layer", torch.bfloat16), "up: .* torch.bfloat16, .* torch.float32"),
}


@each_value(what=list(APART), when=["before", "after"])
def test_parameters_that_came_apart_are_an_error(what, when, dynamo_stays_silent):
    """As in the original; with the parameters as they were all goes on."""
    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    call, whole = compiled(model), copy.deepcopy(model)
    expected = compiled(whole)(x)
    if when == "after":
        assert torch.equal(call(x), expected)
    act, words = APART[what]
    act(model)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    if "device" not in what:  # a product with a meta tensor is one more
        with pytest.raises(RuntimeError):
            model(x)
    with pytest.raises((RuntimeError, BackendCompilerFailed), match=words) as caught:
        call(x)
    if "dtype" in what:
        assert "Cast the whole model to one dtype" in str(caught.value)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert _same(parameter, before[name][1])
    model.up = copy.deepcopy(whole.up)
    assert torch.equal(call(x), expected)


def test_under_autocast_an_adapter_of_another_dtype_is_no_error():
    """There torch casts the operands of each product, and the original runs, too."""
    model, x = Relu(), torch.randn(2, 32)
    fill_b(model)
    model.up.lora_A.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(model)(x).dtype == model(x).dtype


@pytest.fixture
def dynamo_stays_silent():
    """Fake tensors log a stack for each error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": "tensor"}, "prepare() used granularity='tensor'"),
        ({"scale": "amax"}, "scale='amax'; the backend is asked for 'row', 'pow2'"),
        ({"update": "rows"}, "prepare() made it for update='rows', the backend is asked for"),
    ],
)
def test_a_prepared_model_under_another_config(options, words):
    model, x = freeze_a(tiny_mlp()), torch.randn(2, 32)
    falqon_fx.prepare(model, FalqonConfig(**options), progress=False)
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(model)(x)
    assert words in str(caught.value)
    assert "the same config" in str(caught.value)
    torch._dynamo.reset()
    compiled(model, **options)(x)
    assert len(falqon_fx.adapters(model)) == 2


def test_options_that_leave_the_base_alone_may_differ_from_those_of_prepare():
    model, x = tiny_mlp(), torch.randn(2, 32)
    falqon_fx.prepare(model, FalqonConfig(grad_dtype="e4m3", siblings=False), progress=False)
    assert compiled(model)(x).isfinite().all()


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
    model.down.set_submodule("base_layer", Fp8Linear(model.down.base_layer))
    expected = model(x)
    (result,), seen = warnings_of(compiled(model, include="down"), x)
    assert torch.equal(result, expected)
    assert any("down" in text and "quantized" in text for text in seen)
    assert not falqon_fx.adapters(model)


def test_a_model_without_lora_runs_as_it_was_and_nothing_is_said():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)), torch.randn(2, 32)
    call = compiled(model, inner="aot_eager")
    results, seen = warnings_of(call, x, x[:1], x)  # the second makes another graph
    assert seen == []
    assert torch.equal(results[0], model(x))
    assert torch.equal(results[1], model(x[:1]))
    assert torch.equal(results[2], model(x))
    results[0].sum().backward()


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        torch._dynamo.graph_break()
        return x + 1


class Broken(nn.Module):
    """Graphs without LoRA around LoRA layers, which Dynamo compiles, or runs as they are; the same
    graph before the first LoRA layer is called more than once.
    """

    def __init__(self, *, outside: bool) -> None:
        super().__init__()
        self.head = Head()
        self.lora = Relu()
        self.outside = outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.head(x))
        if self.outside:
            return torch.compiler.disable(self.lora)(x) * 2
        x = self.lora(x)
        torch._dynamo.graph_break()
        return x * 2


@pytest.mark.parametrize(
    ("outside", "stepped"),
    [(False, True), (True, True), (True, False)],
    ids=["behind a break", "outside", "outside, by its gradient"],
)
def test_lora_layers_are_missed_only_where_no_graph_has_one_after_a_step(outside, stepped):
    """Once, whatever runs then; with their number, the first of them, and what to do."""
    torch._dynamo.reset()
    model, x = Broken(outside=outside), torch.randn(2, 32)
    call = compiled(model, frozen="leave", inner="eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (before, _), seen = warnings_of(call, x, x)
    assert seen == []
    before.sum().backward()
    if stepped:  # what is left of a step is that the parameters were written
        optimizer.step()
        optimizer.zero_grad()
    _, seen = warnings_of(call, x, x)
    _, more = warnings_of(call, x, x[:1])
    said = [text for text in (*seen, *more) if "LoRA" in text]
    assert len(said) == int(outside)
    if outside:
        assert "none of its 2 LoRA layers (first lora.down) is in a compiled graph" in said[0]
        assert "Compile the whole model or its blocks" in said[0]


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
def test_fsdp2_of_a_model_that_is_not_prepared_is_refused(group, regional):
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
    assert "up: FSDP shards its base weight, which is not in FP8 yet" in str(caught.value)
    assert "Call falqon_fx.prepare(model) before fully_shard" in str(caught.value)


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
    assert len(values(model)) == len(values(alone)) == 4 * 3 + 2 + 4
    assert all(map(torch.equal, values(model), values(alone)))


BLOCK = 4 * 2 * (48 * 4 + 32 * 4)  # bytes of the gradients of a block: two A and two B


def as_peft_does(layer: Any, x: Tensor) -> Tensor:
    """The forward of `LoraLinear` with the base layer first."""
    base = layer.base_layer(x)
    return base + layer.lora_B(layer.lora_A(x)) * layer.scaling


@pytest.mark.parametrize("base_first", [False, True])
def test_sites_that_ddp_buckets_cut_train_as_they_were(group, graphs, monkeypatch, base_first):
    """A bucket for each parameter, and FP8 nowhere: as the model that is not compiled, bit for
    bit.
    """
    model, x = Stack(), torch.randn(2, 5, 32)
    if base_first:
        for module in filter(lambda m: isinstance(m, LoraLinear), model.modules()):
            monkeypatch.setattr(module, "forward", functools.partial(as_peft_does, module))
    alone = copy.deepcopy(model)
    expected = train(alone, adam(alone), x, steps=3)
    call = compiled(ddp(model, 4, monkeypatch), frozen="leave")
    assert train(call, adam(model), x, steps=3) == expected
    assert all(map(torch.equal, model.parameters(), alone.parameters()))
    rejected = [item for piece in graphs for item in piece.rejected]
    assert {item.site.split(".lora_")[0] for item in rejected} == {
        f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")
    }
    for item in rejected:
        assert "DDP's optimizer compiles the model in pieces" in item.reason
        assert "torch._dynamo.config.optimize_ddp = False" in item.remedy


def test_ddp_buckets_that_cut_no_site_train_as_without_ddp(group, graphs, monkeypatch):
    model, x = Stack(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)
    expected = train(compiled(alone, inner="aot_eager"), adam(alone), x, steps=4)
    torch._dynamo.reset()
    graphs.clear()
    call = compiled(ddp(model, BLOCK, monkeypatch), inner="aot_eager")
    assert train(call, adam(model), x, steps=4) == expected
    assert [len(piece.sites) for piece in graphs] == [2, 2]
    assert len(values(model)) == len(values(alone)) == 4 * 3 + 2 + 4
    assert all(map(torch.equal, values(model), values(alone)))


class Around(nn.Module):
    """Trained layers besides the sites, as PEFT's modules_to_save has: each alone in its piece."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.stack, self.head = nn.Linear(32, 40), Stack(), nn.Linear(32, 20)
        self.narrow = nn.Linear(40, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stack(self.narrow(torch.relu(self.wide(x))) + x))


def test_ddp_pieces_may_hold_other_trained_layers(group, graphs, monkeypatch):
    """Buckets of a block's size: the head, then the blocks, then the rest."""
    model, x = Around(), torch.randn(2, 5, 32)
    alone = copy.deepcopy(model)

    def run(call: nn.Module, model: nn.Module) -> list[Tensor]:
        torch._dynamo.reset()
        optimizer = adam(model)
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
