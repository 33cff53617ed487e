"""Whether Wᵀ is kept beside W, and that nothing but its launch and its bytes shows of it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import falqon_fx
from falqon_fx import FalqonConfig, prepare
from falqon_fx.backend import rewrite
from falqon_fx.kernels import hardware
from falqon_fx.kernels.spec import aligned
from falqon_fx.passes import transposes
from falqon_fx.site import transposed
from tests.cuda import INTERPRETED
from tests.models import LoraLinear, fill_b
from tests.parameters import slow
from tests.passes.rewritten import TURNED, captured, change, passes, seen, values
from tests.sites import needs_row_scales, randn

pytestmark = INTERPRETED
WIDTH = 64
X = randn(5, WIDTH).bfloat16()
OPTIONS = {"card": "H100", "kernel": "scaled_mm", "granularity": "tensor", "inner": "eager"}
IN_FP8 = {**OPTIONS, "adapter_dtype": "fp8"}


class Layers(nn.Module):
    """Two siblings behind something that trains, and a site behind them; ``frozen`` stands between
    as a layer without an adapter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.q, self.k = LoraLinear(WIDTH, WIDTH), LoraLinear(WIDTH, 33)
        self.frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.o = LoraLinear(WIDTH, WIDTH)
        fill_b(self, 0.1)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        x = x * self.gain
        q, k = self.q(x), self.k(x).sum(-1, keepdim=True)
        return self.o(self.frozen(q if both else q.detach())) + k


SIZE = WIDTH * (WIDTH + 48) + 2 * WIDTH * WIDTH  # 33 columns are filled up to 48


def some(cases: dict[str, Any], *fast: str) -> list[Any]:
    """The names of all cases, of which the fast tests have some."""
    return [name if name in fast else slow(name) for name in cases]


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Layers().bfloat16()


def step(read: str, **more: Any) -> list[Tensor]:
    """Output and gradients of one step."""
    torch._dynamo.reset()
    model = model_of()
    y = torch.compile(model, backend="falqon", options={**OPTIONS, **more})(X, read == "both")
    y.sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [y.detach(), *grads]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def decided(x: Tensor | None = None, **given: Any) -> Any:
    """What the passes make of `Layers`."""
    model, x = model_of(), X if x is None else x
    gm = captured(model, x)
    return passes(gm, values(gm, x), **{"card": "H100", **given})


KEPT: dict[str, dict[str, Any]] = {
    "auto": {},
    "auto, RTX 4090": {"card": "RTX 4090"},
    "store": {"transpose": "store"},
    "adapters in FP8": {"adapter_dtype": "fp8"},
    "store, on a card that reads W as it lies": {"transpose": "store", "card": "B200"},
}
NOT_KEPT: dict[str, tuple[dict[str, Any], str]] = {
    "transient": ({"transpose": "transient"}, 'transpose="transient" asks for it'),
    "kernel": ({"transpose": "kernel"}, 'transpose="kernel" asks for it'),
    "sm_100": ({"card": "B200"}, "sm_100 multiplies W as it lies"),
}


@pytest.mark.parametrize("name", some(KEPT, "auto", "adapters in FP8"))
def test_it_is_kept(name, h100):
    done = decided(**KEPT[name])
    done.verify()
    slots = [[base.path for base in slot.bases] for slot in done.plan.turned.slots]
    assert slots == [["q", "k"], ["frozen"], ["o"]]
    rooms = [32, 0, 16] if KEPT[name].get("adapter_dtype") == "fp8" else [0, 0, 0]
    size, said = SIZE + WIDTH * sum(rooms), done.plan.turned.report
    assert (said.kept, said.size) == (True, size)
    assert str(said).startswith("W kept transposed: 0.0")
    assert sum(site.report.memory.turned for site in done.plan.sites) == size
    shapes = [tuple(turned.node.meta["val"].shape) for turned in done.operands.turned]
    widths = (WIDTH + 48, WIDTH, WIDTH)
    assert shapes == [(WIDTH, width + room) for width, room in zip(widths, rooms, strict=True)]


@pytest.mark.parametrize("name", some(NOT_KEPT, "sm_100"))
def test_it_is_not_kept(name, h100):
    given, why = NOT_KEPT[name]
    done = decided(**given)
    done.verify()
    assert (done.plan.turned.slots, done.operands.turned) == ((), ())
    assert str(done.plan.turned.report).endswith(f": {why}.")
    assert not any(site.report.memory.turned for site in done.plan.sites)


@pytest.mark.parametrize(("tokens", "kept"), [(transposes.MOST_TOKENS, True), (16385, False)])
def test_many_tokens_gain_little(tokens, kept, h100):
    said = decided(torch.empty(tokens, WIDTH).bfloat16()).plan.turned.report
    assert said.kept == kept
    assert str(tokens) in said.why


def test_it_is_not_kept_beside_what_fsdp_shards(h100):
    h100.setattr(transposes, "is_fsdp", lambda node: node.op == "placeholder")
    assert decided().plan.turned.report.why == "FSDP shards W, beside which it would be whole"


def test_memory_decides_with_what_training_takes(h100):
    """Half of the card holds the model, gradients and moments of what trains, and of each frozen
    matrix an FP8 form and a transpose.
    """
    model, need = model_of(), SIZE
    for parameter in model.parameters():
        need += parameter.numel() * ((2 + 2 + 8) if parameter.requires_grad else (2 + 1))
    found = []
    x = X
    gm = captured(model, x)

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> None:
            found.append(passes(gm, values(gm, x), card="H100").plan.turned.report)

    for room in (2 * need, 2 * need - 1):
        h100.setattr(hardware, "memory", lambda device, room=room: room)
        Calling()()
    assert [said.kept for said in found] == [True, False]
    assert "more than 50% of the card's" in found[1].why


def test_only_what_backward_reads_is_kept(h100):
    """Not where x has no gradient, and nothing at all where there is no backward."""
    model, x = nn.Sequential(LoraLinear(WIDTH, WIDTH), LoraLinear(WIDTH, WIDTH)), randn(5, WIDTH)
    gm = captured(model, x)
    done = passes(gm, values(gm, x), card="H100")
    assert [base.path for slot in done.plan.turned.slots for base in slot.bases] == ["1"]
    with torch.no_grad():
        gm = captured(model, x)
        assert passes(gm, values(gm, x), card="H100").plan.turned.report is None


def test_nothing_is_kept_on_a_cpu():
    model, x = model_of(), X
    config = FalqonConfig(transpose="store", card="H100")
    assert falqon_fx.explain(model, x, config=config).graphs[0].transposes is None


def test_explain_says_what_is_kept_and_why(h100):
    config = FalqonConfig(card="H100")
    report = falqon_fx.explain(model_of(), X, config=config)
    text = " ".join(str(report).split())
    assert "W kept transposed: 0.01" in text
    assert "more, because dL/dx wants it row by row on sm_90" in text
    again = falqon_fx.RewriteReport.from_json(report.to_json())
    assert again.graphs[0].transposes == report.graphs[0].transposes


def test_another_transpose_is_seen(h100):
    done = decided()
    (first, *_), node = done.operands.turned, done.siblings()
    assert node.args[TURNED] == [first.node]
    change(node, TURNED, [])
    with seen("0 operands for 1"):
        done.verify()


@pytest.mark.parametrize("adapters", ["bfloat16", pytest.param("fp8", marks=needs_row_scales)])
@pytest.mark.parametrize("read", ["both", slow("k alone")])
def test_numbers_are_those_of_a_transpose_in_each_step(read, adapters, h100):
    """By the library; `tests/kernels/test_stored.py` has generated kernels. Where k alone has
    a gradient, dL/dx reads its columns of what q and k share. With adapters in FP8 O comes from a
    W that is kept with room for them, too.
    """
    wanted = step(read, adapter_dtype=adapters, transpose="transient")
    found = step(read, adapter_dtype=adapters, transpose="auto")
    assert len(found) == {"both": 8, "k alone": 6}[read]  # O, the gain, and A and B of sites
    assert same(found, wanted)


class OneWeight(nn.Module):
    """Two adapters in turn on one W, as of a policy and of a reward."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.one, self.two = LoraLinear(WIDTH, WIDTH), LoraLinear(WIDTH, WIDTH)
        self.two.base_layer = self.one.base_layer
        fill_b(self, 0.1)

    def forward(self, x: Tensor, name: str) -> Tensor:
        x = x * self.gain
        return self.one(x) + self.two(x.sin()) if name == "both" else getattr(self, name)(x)


@pytest.mark.parametrize("calls", [("one", "two"), slow(("both",))])
def test_adapters_that_share_w_never_read_each_other(calls, h100):
    """Their columns behind one Wᵀ are written as backward runs, in whatever order; in one graph
    they would be written twice, so that nothing is kept there.
    """
    grads = []
    for transpose in ("transient", "auto"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = OneWeight().bfloat16()
        run = torch.compile(model, backend="falqon", options={**IN_FP8, "transpose": transpose})
        ys = [run(X, name) for name in calls]
        for y in ys:  # both forwards before a backward, and the first one's last
            y.sum().backward(retain_graph=True)
        ys[0].sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert same(*grads)
    kept = [copy.kind for copies in transposed._copies.values() for copy in copies]
    assert sorted(kept) == ([] if calls == ("both",) else ["joined", "turned"])


def bound(model: nn.Module) -> tuple[Any, list[Any]]:
    """The compiled model, and of each of its calls the bases and the transposes as it gets them."""
    calls: list[Any] = []

    def recording(gm: Any, inputs: Any) -> Any:
        result = rewrite(gm, inputs, FalqonConfig(card="H100"))

        def run(*args: Any) -> Any:
            given = result.bind(args)
            places = result.gm.graph.find_nodes(op="placeholder")
            named = {node.name: value for node, value in zip(places, given, strict=True)}
            calls.append({n: v for n, v in named.items() if n.startswith("falqon_")})
            return result.gm(*given)

        return run

    torch._dynamo.reset()
    return torch.compile(model, backend=recording), calls


def is_up_to_date(call: dict[str, Tensor]) -> bool:
    """Whether the three transposes are those of the four bases."""
    weights = [call[f"falqon_base_{i}_weight"].view(torch.uint8) for i in range(4)]
    filled = nn.functional.pad(weights[1], (0, 0, 0, 15))
    wanted = [torch.cat([weights[0], filled]).t(), weights[2].t(), weights[3].t()]
    found = [call[f"falqon_turned_{i}"].view(torch.uint8) for i in range(3)]
    return same(found, wanted)


def test_it_is_made_once(h100):
    model = model_of()
    run, calls = bound(model)
    for _ in range(3):
        run(X)
    assert all(map(is_up_to_date, calls))
    assert len({call["falqon_turned_0"].data_ptr() for call in calls}) == 1


def prepared(seed: int = 0) -> nn.Module:
    model = model_of(seed)
    prepare(model, FalqonConfig(), progress=False)
    return model


def write_in_place(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.o.base_layer.weight.mul_(-0.5)
    return model


def give_another(model: nn.Module) -> nn.Module:
    other = model_of(seed=1).o.base_layer.weight
    model.o.base_layer.weight = nn.Parameter(other.detach(), requires_grad=False)
    return model


def load_state(model: nn.Module) -> nn.Module:
    model.load_state_dict(prepared(seed=1).state_dict())
    return model


def load_file(model: nn.Module, folder: Any) -> nn.Module:
    falqon_fx.save_checkpoint(prepared(seed=1), folder / "other")
    falqon_fx.load_checkpoint(model, folder / "other")
    return model


def prepare_again(model: nn.Module) -> nn.Module:
    falqon_fx.restore(model)
    with torch.no_grad():
        model.q.base_layer.weight.neg_()
    prepare(model, FalqonConfig(), progress=False)
    return model


def move(model: nn.Module) -> nn.Module:
    """Elsewhere in memory: `.to(device)` of a CPU alone does nothing."""
    return model._apply(lambda tensor: tensor.clone())


CHANGES: dict[str, tuple[Any, Any]] = {
    "W written": (model_of, write_in_place),
    "another W": (model_of, give_another),
    "load_state_dict": (prepared, load_state),
    "load_checkpoint": (prepared, load_file),
    "prepare again": (prepared, prepare_again),
    "moved": (prepared, move),
}


@pytest.mark.parametrize("name", some(CHANGES, "W written", "load_state_dict"))
def test_it_is_never_stale(name, h100, tmp_path):
    """Whatever has changed W, or where it lies."""
    make, change_w = CHANGES[name]
    model, x = make(), X
    run, calls = bound(model)
    run(x)
    change_w(model, tmp_path) if change_w is load_file else change_w(model)
    run(x)
    before, after = calls
    assert is_up_to_date(after)
    turned = [call["falqon_turned_2"] for call in calls]
    assert turned[0] is not turned[1]
    moved = name == "moved" or change_w is prepare_again
    assert torch.equal(*(copy.view(torch.uint8) for copy in turned)) == moved


def test_it_is_in_no_checkpoint(h100):
    model = prepared()
    names = [*model.state_dict()]
    bound(model)[0](X)
    assert [*model.state_dict()] == names
    assert all(WIDTH + 48 not in tensor.shape for tensor in model.state_dict().values())


def test_it_goes_with_the_graph_that_reads_it(h100):
    """Adapters in FP8 of another rank have another."""
    model = OneWeight().bfloat16()
    for rank in (4, 20, 40):
        torch._dynamo.reset()
        new = LoraLinear(WIDTH, WIDTH, rank).bfloat16()
        model.one.lora_A, model.one.lora_B = new.lora_A, new.lora_B
        torch.compile(model, backend="falqon", options=IN_FP8)(X, "one").sum().backward()
        gc.collect()
        kept = [(c.kind, c.tensor.shape[1]) for of in transposed._copies.values() for c in of]
        assert sorted(kept) == [(kind, WIDTH + aligned(rank)) for kind in ("joined", "turned")]


def test_it_goes_with_its_weight(h100):
    model = model_of()
    run, calls = bound(model)
    run(X)
    memory = weakref.ref(calls.pop()["falqon_turned_0"].untyped_storage())
    assert memory() is not None
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert memory() is None
