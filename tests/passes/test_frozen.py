"""Frozen linear layers without an adapter: which run in FP8 beside the adapted
ones, and which not.
"""

from __future__ import annotations

import operator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from falqon_fx import rewrite
from falqon_fx.ops import lowering, wide_linear
from falqon_fx.passes.match.frozen import why_left
from tests import tolerances as tol
from tests.models import LoraLinear, fill_b
from tests.sites import randn
from tests.spellings import Passes, check_site, targets

FUSED = torch.ops.falqon.merged_linear.default
WIDTH = 64


class Attention(nn.Module):
    """Adapters on q and v alone, as PEFT's default for Llama."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q = LoraLinear(WIDTH, WIDTH, dtype=dtype)
        self.k = nn.Linear(WIDTH, 2 * WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        self.v = LoraLinear(WIDTH, WIDTH, scaling=0.5, dtype=dtype)
        self.o = nn.Linear(WIDTH, WIDTH, bias=True, dtype=dtype).requires_grad_(False)
        fill_b(self, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.k(x).chunk(2, -1)
        return self.o(self.q(x) * first.tanh() + self.v(x) * second.tanh())


def fused(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=FUSED))


class Frozen(nn.Module):
    """One frozen linear; ``function(layer, x)`` computes with it."""

    def __init__(
        self, function: Any = None, out: int = 80, features: int = 72, **layer: Any
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(features, out, **layer).requires_grad_(False)
        self.function = function or (lambda m, x: m.proj(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def parameters(layer: nn.Linear) -> tol.Parameters:
    """With an adapter of rank 0, which is none."""
    out, features = layer.weight.shape
    none_a, none_b = torch.empty(0, features), torch.empty(out, 0)
    return tol.Parameters(layer.weight, none_a, none_b, 1.0, layer.bias)


# -- in FP8 ----------------------------------------------------------------------------------------


def test_frozen_layers_are_siblings_of_adapted_ones():
    model, x, passes = Attention(), randn(5, WIDTH), Passes()
    passes.run(model, x)
    (result,) = passes.results
    together, last = fused(result.gm)
    assert len(together.args[1]) == 3
    k, q, v = (node.name for node in together.args[1])
    assert [k, q, v] == [f"falqon_base_{i}_weight" for i in range(3)]
    assert together.args[11] == [1, 2]  # which site each adapter belongs to
    assert together.args[12] == [2.0, 0.5]
    assert [len(column) for column in last.args[4:13]] == [0] * 9
    assert (together.args[13], last.args[13]) == (True, False)  # whether x is kept
    (given,) = (n for n in result.gm.graph.find_nodes(op="placeholder") if n.name == "l_x_")
    assert list(given.users) == [together]  # one op casts x, once
    sites = {site.path: (site.adapters, site.group) for site in passes.sites}
    assert sites == {"k": (0, 0), "q": (1, 0), "v": (1, 0), "o": (0, 1)}
    assert targets(result.gm)["linear"] == 0
    assert not passes.left
    assert not passes.rejected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_computes_what_its_sites_compute_alone(dtype):
    """Each O is a product of its own either way; dL/dx is added up in one or in three."""
    model, x = Attention(dtype), randn(5, WIDTH).to(dtype)
    layers = [model.q, model.k, model.v]
    grads = [randn(5, n, seed=i).to(dtype) for i, n in enumerate((WIDTH, 2 * WIDTH, WIDTH))]
    results = []
    for siblings in (True, False):
        torch._dynamo.reset()
        passes, given = Passes(siblings=siblings), x.clone().requires_grad_()
        call = torch.compile(lambda x: [layer(x) for layer in layers], backend=passes)
        ys = call(given)
        torch.autograd.backward(ys, grads)
        trained = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((given.grad, *ys, *trained))
        model.zero_grad()
        assert len(fused(passes.results[0].gm)) == (1 if siblings else 3)
    together, apart = results
    for ours, theirs in zip(together[1:], apart[1:], strict=True):
        assert torch.equal(ours, theirs)
    # Both add the same products, of operands that are off by 1/9 and 1/17 at most: in one sum of
    # all, or in a sum each, rounded to dtype and added up with a rounding more.
    sizes = torch.zeros(5, WIDTH, dtype=torch.float64)
    for layer, grad in zip(layers, grads, strict=True):
        base = layer if layer is model.k else layer.base_layer
        through: list[Any] = [(grad, base.weight)]
        if layer is not model.k:
            a, b = layer.lora_A.weight.double(), layer.lora_B.weight.double()
            through.append((layer.scaling * grad.double().abs() @ b.abs(), a))
        products = [left.double().abs() @ right.double().abs() for left, right in through]
        sizes += torch.stack(products).sum(0) * 1.2
    inner = 4 * WIDTH + 8
    bound = sizes * (2 * tol.gamma(inner) + 5 * tol.UNIT_ROUNDOFF[dtype])
    tol.assert_within(together[0], apart[0], bound)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_a_frozen_layer_is_within_the_fp8_bound(leading, dtype, bias):
    model, passes = Frozen(bias=bias, dtype=dtype), Passes()
    x = randn(*leading, 72).to(dtype)
    check_site(torch.compile(model, backend=passes), model, x, parameters(model.proj))
    (site,) = passes.sites
    assert (site.path, site.adapters, site.rank) == ("proj", 0, 0)
    assert (site.train_a, site.train_b) == (False, False)


SPELLED = {
    "functional": lambda m, x: F.linear(x, m.proj.weight, m.proj.bias),
    "x @ W.T": lambda m, x: x @ m.proj.weight.T + m.proj.bias,
    "addmm": lambda m, x: torch.addmm(m.proj.bias, x, m.proj.weight.t()),
    "between views": lambda m, x: m.proj(x.view(1, 5, 72)).view(5, 80),
    "einsum": lambda m, x: torch.einsum("ti,oi->to", x, m.proj.weight) + m.proj.bias,
}


@pytest.mark.parametrize("function", SPELLED.values(), ids=SPELLED)
def test_any_spelling_of_a_frozen_layer_is_one_op(function):
    model, passes = Frozen(function), Passes()
    check_site(torch.compile(model, backend=passes), model, randn(5, 72), parameters(model.proj))
    assert len(passes.sites) == 1
    (after,) = passes.after
    assert after["merged_linear.default"] == 1
    assert not {"linear", "matmul", "addmm", "einsum"} & after.keys()


def test_a_weight_stored_in_out_is_laid_out_once():
    """GPT-2's Conv1D."""

    def function(layer: Any, x: Tensor) -> Tensor:
        return torch.addmm(layer.proj.bias, x, layer.across)

    model, passes = Frozen(function), Passes()
    model.across = nn.Parameter(model.proj.weight.t().contiguous(), requires_grad=False)
    plain = Frozen()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = randn(5, 72)
    ours = passes.run(model, x)
    assert [(s.out_features, s.in_features) for s in passes.sites] == [(80, 72)]
    assert torch.equal(ours, Passes().run(plain, x))


def test_a_trained_bias_of_a_frozen_layer_gets_its_gradient():
    model, x = Frozen(), randn(5, 72)
    model.proj.bias.requires_grad_(True)
    y = Passes().run(model, x)
    grad = randn(5, 80, seed=1)
    y.backward(grad)
    # A sum of five in float32, in whatever order.
    bound = tol.dot_bound(torch.ones(1, 5), grad)[0]
    tol.assert_within(model.proj.bias.grad, grad.double().sum(0), bound)


def test_a_layer_that_reads_x_through_a_cast_is_a_sibling_of_those_that_read_it_directly():
    """Gemma's norm ends in a cast, from which every projection reads."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = LoraLinear(WIDTH, WIDTH, dtype=torch.bfloat16)
            self.k = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
            self.k.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            x = (x.float() * 1.5).relu().type_as(x)
            return self.q(x) * self.k(x)

    passes = Passes()
    passes.run(Cast(), randn(5, WIDTH).bfloat16())
    (op,) = fused(passes.results[0].gm)
    assert len(op.args[1]) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_layers_in_a_checkpoint_body(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    model, passes, x = Checkpointed(), Passes(), randn(5, WIDTH).requires_grad_()
    passes.run(model, x).sum().backward()
    assert len(passes.sites) == 4
    (result,) = passes.results
    assert targets(result.gm)["merged_linear.default"] == 2
    assert targets(result.gm)["linear"] == 0
    assert x.grad is not None


def test_a_disabled_adapter_leaves_the_numbers_of_b_at_zero():
    """A reference model, as DPO has it: the base that the adapter is trained on, to the bit,
    however small the layer, and an output head too.
    """

    class Lm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.lm_head = nn.Linear(24, 16), nn.Linear(16, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.proj(x).relu())

    model = peft.get_peft_model(Lm(), peft.LoraConfig(target_modules=["proj", "lm_head"], r=4))
    x, passes = randn(5, 24), Passes(include=["*model.proj", "*lm_head"])
    policy = passes.run(model, x)
    with model.disable_adapter():
        reference = torch.compile(model, backend=passes)(x)
    assert [site.adapters for site in passes.sites] == [1, 1, 0, 0]
    assert torch.equal(reference, policy)


def test_the_base_of_an_adapter_that_can_not_be_merged_runs_in_fp8():
    """Here one whose B is followed by a gate."""

    class Gated(LoraLinear):
        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x)) * x.mean()

    model, passes = Gated(72, 80), Passes()
    fill_b(model, 0.1)
    passes.run(model, randn(5, 72)).sum().backward()
    assert [(site.path, site.adapters) for site in passes.sites] == [("base_layer", 0)]
    assert len(passes.rejected) == 1
    assert passes.after[0]["linear"] == 2
    assert model.lora_A.weight.grad is not None


# -- left ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "out", "features", "tied", "reason"),
    [
        ("model.lm_head", 32000, 4096, False, "it is an output head"),
        ("score", 64, 4096, False, "it is an output head"),
        ("model.decoder.unembedding", 50000, 768, False, "it is an output head"),
        ("output", 32000, 4096, False, "it is an output head"),
        ("model.lm_head", 32000, 4096, True, "its weight is tied to an embedding"),
        ("model.layers.0.mlp.gate", 64, 4096, False, "it is a router"),
        ("model.layers.0.mlp.gate", 11008, 4096, False, None),
        ("model.layers.0.mlp.gate_proj", 11008, 4096, False, None),
        ("model.layers.0.mlp.up", 63, 4096, False, "it is too small to gain (63 x 4096)"),
        ("model.layers.0.mlp.up", 4096, 32, False, "it is too small to gain (4096 x 32)"),
        ("model.layers.0.mlp.up", 64, 64, False, None),
        ("model.layers.0.mlp.up", 49152, 8192, False, None),
        ("model.lm_head.base_layer", 32000, 4096, True, None),
        ("model.layers.0.mlp.up.base_layer", 24, 16, False, None),
    ],
)
def test_why_a_layer_is_left(path, out, features, tied, reason):
    assert why_left(path, out, features, tied) == reason


class Lm(nn.Module):
    """An embedding, two layers and a head, with its weight tied to the embedding's or not."""

    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, WIDTH)
        self.proj, self.small = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32)
        self.gate, self.head_norm = nn.Linear(WIDTH, 2), nn.LayerNorm(WIDTH)
        self.to_logits = nn.Linear(WIDTH, 96, bias=False)
        if tie:
            self.to_logits.weight = self.embed.weight
        self.lm_head = nn.Linear(WIDTH, 128)
        self.requires_grad_(False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.head_norm(self.proj(self.embed(tokens)))
        routes = self.gate(x).softmax(-1)
        return self.small(x), routes, self.to_logits(x), self.lm_head(x)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("frontend", ["Dynamo", "export", "symbolic_trace"])
def test_heads_tied_weights_routers_and_small_layers_are_left_with_the_reason(frontend, tie):
    model, tokens = Lm(tie), torch.randint(96, (2, 5))
    if frontend == "Dynamo":
        passes = Passes()
        ours = passes.run(model, tokens)
        (result,) = passes.results
    else:
        traced = fx.symbolic_trace(model)
        gm = traced if frontend != "export" else torch.export.export(model, (tokens,)).module()
        result = rewrite(gm, [tokens])
        ours = result(tokens)
    left = {item.site.split(".")[-1]: item.reason for item in result.report.left}
    tied = {"to_logits": "its weight is tied to an embedding"} if tie else {}
    assert left == {
        "small": "it is too small to gain (32 x 64)",
        "gate": "it is a router",
        "lm_head": "it is an output head",
        **tied,
    }
    assert all(item.remedy for item in result.report.left)
    done = [site.path for site in result.report.sites]
    assert done == (["proj"] if tie else ["proj", "to_logits"])
    for y, eager in zip(ours, model(tokens), strict=True):
        assert F.cosine_similarity(y.flatten(), eager.flatten(), dim=0) > 0.99


def test_frozen_layers_can_be_left():
    model, passes = Attention(), Passes(frozen="leave")
    passes.run(model, randn(5, WIDTH))
    assert [site.path for site in passes.sites] == ["q", "v"]
    assert passes.after[0]["linear"] == 2
    assert not passes.left


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        ({"include": "k"}, ["k"]),
        ({"include": ["q", "o"]}, ["q", "o"]),
        ({"exclude": ["k", "v"]}, ["q", "o"]),
        ({"include": "?", "exclude": "o"}, ["k", "q", "v"]),
    ],
)
def test_include_and_exclude_hold_for_frozen_layers(options, sites):
    passes = Passes(**options)
    passes.run(Attention(), randn(5, WIDTH))
    assert [site.path for site in passes.sites] == sites


@pytest.mark.parametrize(("option", "done"), [("include", True), ("exclude", False)])
def test_a_pattern_that_names_a_lora_layer_names_its_base_without_the_adapter_too(option, done):
    model = peft.get_peft_model(Frozen(), peft.LoraConfig(target_modules="proj", r=4))
    model.base_model.disable_adapter_layers()
    passes = Passes(**{option: "*.proj"})
    passes.run(model, randn(5, 72))
    assert len(passes.sites) == done


def writes_x(layer: Any, x: Tensor) -> Tensor:
    x = x * 2
    y = layer.proj(x)
    x.add_(1)
    return y.to(torch.bfloat16) + x.sum()


def writes_the_bias(layer: Any, x: Tensor) -> Tensor:
    y = layer.proj(x)
    layer.proj.bias.add_(1)
    return y.to(torch.bfloat16)


UNTOUCHED = {
    "a computed weight": lambda m, x: F.linear(x, m.proj.weight * 2),
    "a view of the weight": lambda m, x: F.linear(x, m.proj.weight[:64]),
    "x written before the cast": writes_x,
    "a bias written before the cast": writes_the_bias,
    "the weight on the left": lambda m, x: (m.proj.weight @ x.T).T,
}


@pytest.mark.parametrize("function", UNTOUCHED.values(), ids=UNTOUCHED)
def test_what_is_no_linear_on_a_frozen_parameter_stays_as_it_was(function):
    model, x, passes = Frozen(function), randn(5, 72), Passes()
    ours = passes.run(model, x)
    if function is writes_the_bias:
        with torch.no_grad():
            model.proj.bias.sub_(1)
    assert torch.equal(ours, model(x))
    assert not passes.sites


def test_a_trained_layer_stays_as_it_was():
    model, x, passes = Frozen(), randn(5, 72), Passes()
    model.proj.weight.requires_grad_(True)
    ours = passes.run(model, x)
    assert torch.equal(ours, model(x))
    assert not passes.sites
    assert not passes.left


@pytest.mark.parametrize("frontend", ["Dynamo", "export", "symbolic_trace"])
def test_a_buffer_is_no_frozen_layer(frontend):
    """A bank of filters, as of mel frequencies."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bank", randn(80, 72))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.bank)

    model, x = Bank(), randn(5, 72)
    if frontend == "Dynamo":
        passes = Passes()
        passes.run(model, x)
        (result,) = passes.results
    else:
        traced = fx.symbolic_trace(model)
        result = rewrite(
            traced if frontend != "export" else torch.export.export(model, (x,)).module(), [x]
        )
    assert not result.report.sites
    assert not result.report.left


def test_a_frozen_bottleneck_is_two_frozen_layers_and_no_refused_adapter():
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(256, 64, bias=False), nn.Linear(64, 256)
            self.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x)).relu()

    passes = Passes()
    passes.run(Bottleneck(), randn(5, 256))
    assert [site.path for site in passes.sites] == ["down", "up"]
    assert not passes.rejected


def test_with_rows_frozen_layers_run_in_fp8_beside_the_written_ones():
    model, x = Attention(), randn(5, WIDTH)
    for layer in (model.q, model.v):
        layer.lora_A.requires_grad_(False)
    passes = Passes(update="rows", topk=2)
    passes.run(model, x)
    together, last = fused(passes.results[0].gm)
    assert (len(together.args[1]), together.args[11]) == (3, [1, 2])
    assert len(last.args[1]) == 1
    assert targets(passes.results[0].gm)["linear"] == 0


def test_the_ops_of_frozen_layers_keep_their_place_in_the_model():
    passes = Passes()
    passes.run(Attention(), randn(5, WIDTH))
    (result,) = passes.results
    for op in fused(result.gm):
        items = [n for n in op.users if n.target is operator.getitem]
        assert all("nn_module_stack" in n.meta for n in (op, *items))


# -- what stays out of FP8 on a CPU without bfloat16 -----------------------------------------------


class BiasedHead(nn.Module):
    def __init__(self, spelling: str = "module") -> None:
        super().__init__()
        self.proj, self.lm_head = LoraLinear(64, 64), nn.Linear(64, 96)
        self.lm_head.requires_grad_(False)
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        if self.spelling == "keywords":
            return F.linear(weight=self.lm_head.weight, input=x, bias=self.lm_head.bias)
        return self.lm_head(x)


@pytest.mark.parametrize("spelling", ["module", "keywords"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_in_bfloat16_is_multiplied_in_float32(spelling, bias, monkeypatch):
    monkeypatch.setattr(lowering, "native_bf16", lambda: False)
    model, passes = BiasedHead(spelling).bfloat16(), Passes()
    if not bias:
        model.lm_head.register_parameter("bias", None)
    x = randn(5, 64).bfloat16().requires_grad_()
    y = passes.run(model, x)
    (result,) = passes.results
    assert targets(result.gm)["wide_linear.default"] == 1
    assert targets(result.gm)["linear"] == 0
    (left,) = passes.left
    assert left.remedy.startswith("It is multiplied in float32")

    site = torch.compile(model.proj, backend=Passes())(x)
    exact = [t.detach().double() for t in (site, model.lm_head.weight)]
    wanted, sizes = exact[0] @ exact[1].t(), exact[0].abs() @ exact[1].abs().t()
    if bias:
        wanted, sizes = wanted + model.lm_head.bias.double(), sizes + model.lm_head.bias.abs()
    # A sum of 65 terms in float32, then one rounding to bfloat16.
    tol.assert_within(y, wanted, tol.rounded_bound(wanted, tol.gamma(65) * sizes, torch.bfloat16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [96, 40])  # at once: all, and with fewer in the last part
def test_gradients_of_a_product_in_float32(bias, rows, monkeypatch):
    monkeypatch.setattr(wide_linear, "ROWS", rows)
    x, weight = randn(2, 3, 64).bfloat16().requires_grad_(), randn(96, 64, seed=1).bfloat16()
    added = randn(96, seed=3).bfloat16() if bias else None
    y = torch.ops.falqon.wide_linear(x, weight, added)
    wanted, sizes = x.double() @ weight.double().t(), x.double().abs() @ weight.double().abs().t()
    if added is not None:
        wanted, sizes = wanted + added.double(), sizes + added.double().abs()
    # A sum of 65 terms in float32, then one rounding to bfloat16.
    tol.assert_within(y, wanted, tol.rounded_bound(wanted, tol.gamma(65) * sizes, torch.bfloat16))
    grad = randn(2, 3, 96, seed=2).bfloat16()
    (found,) = torch.autograd.grad(y, x, grad)
    wanted = grad.double() @ weight.double()
    bound = tol.gamma(96) * (grad.double().abs() @ weight.double().abs())
    tol.assert_within(found, wanted, tol.rounded_bound(wanted, bound, torch.bfloat16))
    given = (x, weight, None)
    torch.library.opcheck(
        torch.ops.falqon.wide_linear_grad_x.default, (grad.requires_grad_(), weight)
    )
    torch.library.opcheck(torch.ops.falqon.wide_linear.default, given)


def test_a_head_stays_as_it_is_where_it_is_not_slow(monkeypatch):
    x = randn(5, 64)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(lowering, "native_bf16", lambda native=native: native)
        passes = Passes()
        passes.run(BiasedHead().to(dtype), x.to(dtype))
        assert targets(passes.results[0].gm)["wide_linear.default"] == 0
        assert passes.left[0].remedy.startswith("It runs as it was")


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q, self.options = LoraLinear(64, 64), options

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, kv = self.q(x).view(2, 5, 4, 16).transpose(1, 2), x.view(2, 5, 4, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(q, kv, value=kv, attn_mask=mask, **self.options)


@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float"])
def test_attention_in_bfloat16_is_computed_in_float32(kind, monkeypatch):
    monkeypatch.setattr(lowering, "native_bf16", lambda: False)
    masks = {"bool": randn(5, 5) > -1, "float": randn(5, 5).bfloat16()}
    model, passes = Attends(is_causal=kind == "causal", scale=0.3).bfloat16(), Passes()
    x = randn(2, 5, 64).bfloat16().requires_grad_()
    y = passes.run(model, x, masks.get(kind))
    (result,) = passes.results
    assert targets(result.gm)["wide_attention"] == 1
    assert targets(result.gm)["scaled_dot_product_attention"] == 0

    def in_float32(x: Tensor) -> Tensor:
        q, kv = (
            t.view(2, 5, 4, 16).transpose(1, 2)
            for t in (torch.compile(model.q, backend=Passes())(x), x)
        )
        mask = masks.get(kind)
        wide = mask.float() if kind == "float" else mask
        given = (q.float(), kv.float(), kv.float(), wide)
        out = F.scaled_dot_product_attention(*given, is_causal=kind == "causal", scale=0.3)
        return out.bfloat16()

    wanted, grad = in_float32(x), randn(2, 4, 5, 16, seed=1).bfloat16()
    assert torch.equal(y, wanted)
    found, expected = (torch.autograd.grad(t, x, grad)[0] for t in (y, wanted))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("native", [True, False])
def test_other_attention_stays_as_it_is(native, monkeypatch):
    """That is not slow, or that autocast casts."""
    monkeypatch.setattr(lowering, "native_bf16", lambda: native)
    passes, x = Passes(), randn(2, 5, 64)
    if native:
        passes.run(Attends().bfloat16(), x.bfloat16())
    else:
        with torch.autocast("cpu", torch.bfloat16):
            passes.run(Attends(), x)
        passes.run(Attends(), x)
    assert len(passes.results) == 2 - native
    for result in passes.results:
        assert targets(result.gm)["scaled_dot_product_attention"] == 1
