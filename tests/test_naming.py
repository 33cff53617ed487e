from __future__ import annotations

import functools
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.passes import pipeline
from falqon_fx.passes.pipeline import PASSES
from falqon_fx.passes.work import Work
from falqon_fx.report.data import Note
from falqon_fx.site.names import modules_of, tensors_of
from tests.models import LoraLinear, Stack, tiny_llama
from tests.spellings import HandWritten, Spelling

pytest.importorskip("peft")

IDS = torch.zeros(2, 5, dtype=torch.int64)


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if hasattr(m, "base_layer")}


class Broken(nn.Module):
    """Two blocks alike, each with a graph break: Dynamo shares their graphs."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class BrokenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = LoraLinear(32, 48)
        self.down = LoraLinear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        torch._dynamo.graph_break()
        return self.down(y)


def test_paths_are_those_of_the_whole_model_behind_graph_breaks():
    report = falqon_fx.explain(Broken(BrokenBlock), torch.randn(3, 32))
    wanted = [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    assert [site.path for site in report.sites] == wanted
    # The first graphs, or some of them, serve the second block too: no pass ran again for those.
    assert {bool(graph.pass_seconds) for graph in report.graphs if graph.sites} == {True, False}


def test_what_a_pass_notes_has_the_paths_of_the_whole_model(monkeypatch):
    def note(work: Work) -> None:
        work.notes += [Note(site.report.path, "seen") for site in work.plan.sites]

    monkeypatch.setitem(PASSES, "note", note)
    report = falqon_fx.explain(Broken(BrokenBlock), torch.randn(3, 32))
    noted = [note.site for graph in report.graphs for note in graph.notes]
    assert noted == [site.path for site in report.sites]
    assert noted[-1] == "layers.1.down"
    assert "note" in report.graphs[0].pass_seconds


@pytest.mark.parametrize("count", [0, 2])
def test_an_x_that_is_gathered_in_fp8_is_noted_once(monkeypatch, count):
    monkeypatch.setattr(pipeline, "gather_tokens", lambda plan: count)
    model = nn.Sequential(HandWritten(Spelling(out=24)), HandWritten(Spelling(out=24)))
    report = falqon_fx.rewrite(torch.fx.symbolic_trace(model), [torch.randn(3, 24)]).report
    notes = [note for graph in report.graphs for note in graph.notes]
    assert [note.site for note in notes] == ["0"] * bool(count)
    assert all("(2 in this graph)" in note.text for note in notes)


class Shared(nn.Module):
    """One block under two names, and a weight under two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = BrokenBlock()
        self.other = LoraLinear(32, 48)
        self.other.base_layer.weight = self.first.up.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.second(self.first(x)))


def test_what_has_two_names_goes_by_one_of_them():
    report = falqon_fx.explain(Shared(), torch.randn(3, 32))
    paths = {site.path for site in report.sites}
    assert {"first.up", "first.down", "other"} <= paths
    assert paths <= {f"{b}.{n}" for b in ("first", "second") for n in ("up", "down")} | {"other"}


def apply(first: nn.Linear, second: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return second(first(x))


class Handing(nn.Module):
    """A layer whose parts are arguments of a function of its own graph, as in PEFT's DoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LoraLinear(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = apply(self.layer.lora_A, self.layer.lora_B, x)
        return self.layer.base_layer(x) * (1 + low)


def test_parts_that_a_function_gets_as_arguments_name_their_layer():
    (item,) = falqon_fx.explain(Handing(), torch.randn(3, 32)).rejected
    assert item.site == "layer"


@pytest.mark.slow  # a dozen graphs
def test_dora_is_refused_by_the_names_of_its_layers():
    """PEFT's variant computes in functions that get lora_A and lora_B, behind graph breaks."""
    report = falqon_fx.explain(tiny_llama(use_dora=True), input_ids=IDS)
    layers = lora_layers(tiny_llama()).keys()
    assert {item.site for item in report.rejected} == layers
    assert report.title == "0 sites rewritten (0 with an adapter), 14 rejected, 1 left"
    assert {item.site for item in report.left} == {"base_model.model.lm_head"}


def alora() -> tuple[nn.Module, torch.Tensor]:
    """A model with PEFT's activated LoRA, and tokens that activate it."""
    ids = torch.full((2, 5), 7)
    ids[:, 1] = 3
    return tiny_llama(alora_invocation_tokens=[3]), ids


def test_a_model_that_reads_values_is_refused_with_a_remedy():
    model, ids = alora()
    with pytest.raises(FalqonError, match="values of its inputs") as error:
        falqon_fx.explain(model, input_ids=ids)
    assert "Compile the model" in str(error.value)


@pytest.mark.slow  # a dozen graphs
def test_alora_is_refused_by_the_names_of_its_layers():
    model, ids = alora()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.compile(model, backend="falqon", options={"inner": "eager"})(input_ids=ids)
    texts = [str(w.message) for w in seen]
    refused = [text.split(": ")[2] for text in texts if "left as it was" in text]
    assert refused
    assert set(refused) <= lora_layers(model).keys()


def listing_methods() -> dict[str, Callable[..., Any]]:
    """Ways to list what a module holds that nothing of this library may call."""

    def guarded(name: str) -> Callable[..., Any]:
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            files = [frame.filename for frame in traceback.extract_stack()]
            assert not any("/falqon_fx/" in file or "/passes/" in file for file in files), files
            return getattr(nn.Module, name)(self, *args, **kwargs)

        return method

    kinds = ("modules", "children", "parameters", "buffers")
    return {name: guarded(name) for kind in kinds for name in (kind, f"named_{kind}")}


class Guarded(nn.Module):
    """Dynamo itself calls these methods of a model, with no frame of this library below."""

    locals().update(listing_methods())

    def __init__(self) -> None:
        super().__init__()
        self.inner = LoraLinear(32, 48)
        self.register_buffer("shift", torch.zeros(48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.inner(x) + self.shift


def test_names_are_read_without_the_models_own_code():
    stack = Stack()
    stack.again = stack.blocks[0].up
    assert dict(modules_of(stack)) == dict(stack.named_modules())
    found = {names[0]: tensor for tensor, names in tensors_of(stack).values()}
    assert found.keys() == dict(stack.named_parameters()).keys()
    first = stack.blocks[0].up.lora_A.weight
    wanted = ["blocks.0.up.lora_A.weight", "again.lora_A.weight"]
    assert tensors_of(stack)[id(first)][1] == wanted
    model = nn.Sequential(Guarded())
    assert [path for path, _ in modules_of(model)][:3] == ["", "0", "0.inner"]
    assert "0.shift" in [names[0] for _, names in tensors_of(model).values()]


def test_a_refusal_behind_a_break_names_a_layer_without_the_models_own_code():
    model = nn.Sequential(Guarded())
    options = {"inner": "eager", "exclude": ("*inner",)}
    with pytest.warns(UserWarning, match=r"left as it was: 0\.inner: include= or exclude="):
        torch.compile(model, backend="falqon", options=options)(torch.randn(3, 32))


class Attention(nn.Module):
    """PEFT adapts its attention by writing into its weights, and unmerges them where someone asks
    the layer for its modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.out = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])


def test_a_model_whose_listing_changes_it_compiles_and_names_its_layers():
    import peft

    torch._dynamo.reset()
    lora = peft.LoraConfig(r=4, target_modules=["attention", "out"])
    model = peft.get_peft_model(Attention(), lora)
    options = {"inner": "eager", "exclude": ("*",)}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compiled = torch.compile(model, backend="falqon", options=options)
        x = torch.randn(2, 3, 32)
        assert torch.equal(compiled(x), model(x))
    refused = [str(w.message) for w in seen if "left as it was" in str(w.message)]
    for layer in ("attention", "out"):
        assert any(f": base_model.model.{layer}: " in text for text in refused), refused


class Grouped(nn.Module):
    """Stacked weights of experts, as transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 48, 32))
        self.down_proj = nn.Parameter(torch.randn(3, 32, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.bmm(x, self.gate_up_proj.transpose(1, 2))
        return torch.bmm(up, self.down_proj.transpose(1, 2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Grouped()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


def test_experts_are_refused_by_the_names_that_peft_gives_their_parameters():
    peft = pytest.importorskip("peft")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = peft.LoraConfig(r=4, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(Broken(Experts), lora)
    rejected = falqon_fx.explain(model, torch.randn(3, 5, 32)).rejected
    assert sorted(model.targeted_parameter_names) == sorted(
        item.site.removeprefix("base_model.model.") for item in rejected
    )
    assert len(rejected) == 4


def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return wrapper


class Wrapped(nn.Module):
    """As those of transformers: Dynamo first meets a function that has the model in args."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    @wrapped
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x))


def test_exclude_means_a_layer_by_its_path_in_the_model():
    torch.manual_seed(0)
    model, x = Wrapped().requires_grad_(False), torch.randn(5, 64)
    results = []
    for exclude in (("up", "down"), ("up",), ()):
        torch._dynamo.reset()
        options: dict[str, Any] = {"inner": "eager", "exclude": exclude}
        results.append(torch.compile(model, backend="falqon", options=options)(x))
    assert torch.equal(results[0], model(x))  # nothing is cast
    off = [float((y - results[0]).norm()) for y in results]
    assert 0 < off[1] < off[2]
