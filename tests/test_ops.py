"""The ops as torch sees them: schema, fake implementation, autograd, AOT dispatch.

W goes in as bytes, which the ops take as well as E4M3: opcheck compares arguments by allclose,
which torch doesn't have for FP8.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.optests import aot_autograd_check

from falqon_fx import FalqonError
from falqon_fx.site.numerics import E4M3
from falqon_fx.site.spec import SiteSpec
from tests.layers import BF16, F16, F32, base_args, case, falqon, layer, rows_args
from tests.lowered import NOTHING
from tests.parameters import each_pair, each_value
from tests.sites import make_site, randn
from tests.strategies import Case
from tests.tolerances import gamma


def as_bytes(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `merged_linear` with Â as bytes."""
    return (*args[:4], [a.view(torch.uint8) for a in args[4]], *args[5:])


def grad_args(case: Case, x_dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of `merged_linear_grad_x`."""
    loras = case.adapters
    n = case.x[..., 0].numel()
    return (
        [each.grad.reshape(n, len(each.weight)) for each in case.layers],
        [each.base.code for each in case.layers],
        [each.base.scale for each in case.layers],
        [randn(n, len(lora.lora_a), seed=j).to(case.out_dtype) for j, lora in enumerate(loras)],
        [code.view(torch.uint8) for code, _, _ in case.casts],
        [scale for _, scale, _ in case.casts],
        case.turned,
        x_dtype,
        str(case.spec),
    )


# Each value of each option at least once, and the pairs that take their own path in the lowering.
SPECS = [
    (SiteSpec("row", "pow2", "e5m2"), F32),
    (SiteSpec("row", "amax", "e4m3"), BF16),
    (SiteSpec("tensor", "pow2", "e5m2"), BF16),
    (SiteSpec("tensor", "amax", "e4m3"), F16),
]
# Ranks of the adapters of each layer; whether there is a bias; whether the adapters read a dropped
# x; keep_x; adds_b.
SITUATIONS: dict[str, Any] = {
    "one adapter": ([(3,)], True, False, True, True),
    "A frozen": ([(3,)], False, False, False, True),
    "b not added": ([(3,)], False, False, True, False),
    "nothing but O": ([(3,)], True, False, False, False),
    "several adapters and siblings": ([(3, 1), (), (2,)], True, False, True, True),
    "dropped x": ([(3, 2)], False, True, True, True),
    "no adapter": ([()], True, False, False, True),
}


def situation(name: str, spec: SiteSpec, dtype: torch.dtype) -> Case:
    ranks, bias, drops, keep_x, adds_b = SITUATIONS[name]
    x = randn(2, 4, 9, seed=20).to(dtype)
    layers = [
        layer(6 - i, 9, r, leading=(2, 4), dtype=dtype, spec=spec, bias=bias, seed=30 * i)
        for i, r in enumerate(ranks)
    ]
    if drops:
        for i, lora in enumerate(layers[0].adapters):
            lora.x = x * 2 * (randn(2, 4, 9, seed=i) > 0)
    return case(x, *layers, spec=spec, keep_x=keep_x, adds_b=adds_b)


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def without_fp8(*args: Any) -> list[Tensor]:
    """`merged_linear` without x̂, which torch can neither sum nor compare."""
    args = torch.utils._pytree.tree_map_only(Tensor, torch.clone, args)
    return [t for t in falqon.merged_linear(*args) if t.dtype != E4M3]


@each_value(name=list(SITUATIONS), kind={f"{spec}-{dtype}": (spec, dtype) for spec, dtype in SPECS})
def test_opcheck(name, kind):
    """torch.library's own checks: the schema's mutations and aliases, autograd's registration, the
    fake implementation's shapes, dtypes and strides, and AOT dispatch with dynamic shapes.
    """
    given = situation(name, *kind)
    given.leaves()
    args = as_bytes(given.arguments())
    torch.library.opcheck(falqon.merged_linear, args, test_utils=CHECKS[:3])
    aot_autograd_check(without_fp8, args, {}, dynamic=True, check_gradients="auto")
    torch.library.opcheck(falqon.merged_linear_grad_x, grad_args(given, kind[1]))


@pytest.mark.parametrize(("spec", "dtype"), SPECS, ids=str)
def test_opcheck_of_the_prepared_layer(spec, dtype):
    made = layer(6, 9, dtype=dtype, spec=spec)
    x = randn(2, 4, 9).to(dtype).requires_grad_()
    for bias in (None, randn(6).to(dtype).requires_grad_()):
        torch.library.opcheck(falqon.base_linear, base_args(made.base, x, bias, spec))
    torch.library.opcheck(falqon.dequantize, (*base_args(made.base, x, None)[1:3], dtype))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("spec", "dtype"), SPECS, ids=str)
def test_opcheck_of_the_adapters_casts(spec, dtype, wide):
    """Without the checks that compare results by allclose, which FP8 has none of."""
    a = [randn(3, 9).to(dtype).requires_grad_(), randn(2, 5).requires_grad_()]
    b = [randn(6, 3).to(dtype).requires_grad_(), randn(7, 2).requires_grad_()]
    args: tuple[Any, ...] = (a, b, [2.0, 0.3], *NOTHING, wide, str(spec))
    torch.library.opcheck(falqon.proxy_update, args, test_utils=CHECKS[:3])


@each_pair(
    granularity=["tensor", "row"],
    pending=["hold", "drop", "apply"],
    rounding=["nearest", "stochastic"],
)
def test_opcheck_of_the_update_of_rows(granularity, pending, rounding):
    """Two sites, one of them prepared (no base weight), both with something to write."""
    options = {"granularity": granularity, "pending": pending, "rounding": rounding, "topk": 2}
    sites = [make_site(6, 9, 3, **options), make_site(4, 8, 2, dtype=BF16, **options)]
    for site in sites:
        site.step()
    states = [site.state for site in sites]
    args = (
        [state.code for state in states],
        *([state.tensors[i] for state in states] for i in range(1, 5)),
        [site.lora_b for site in sites],
        [site.lora_a for site in sites],
        [sites[0].base, None],
        [2.0, 2.0],
        str(states[0].spec),
    )
    torch.library.opcheck(falqon.proxy_update_, args)
    wide = granularity == "row"
    pending_args = (sites[0].lora_b.requires_grad_(), states[0].applied, 2.0, wide)
    torch.library.opcheck(falqon.pending, pending_args)


@each_value(granularity=["tensor", "row"], dtype=[F32, BF16, F16])
def test_opcheck_of_the_prepared_layer_of_rows(granularity, dtype):
    site = make_site(6, 9, 3, granularity=granularity, dtype=dtype)
    x = randn(2, 4, 9).to(dtype).requires_grad_()
    for bias in (None, randn(6).to(dtype).requires_grad_()):
        torch.library.opcheck(falqon.rows_base_linear, rows_args(site, x, bias))


def test_bytes_and_e4m3_are_the_same_to_the_ops():
    given = case(randn(3, 40), layer(), layer(seed=50))
    for op, args in (
        (falqon.merged_linear, as_bytes(given.arguments())),
        (falqon.merged_linear_grad_x, grad_args(given, F32)),
    ):
        as_operand = torch.utils._pytree.tree_map(
            lambda t: t.view(E4M3) if isinstance(t, Tensor) and t.dtype == torch.uint8 else t, args
        )
        results = [torch.utils._pytree.tree_leaves(op(*each)) for each in (args, as_operand)]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        torch.library.opcheck(op, as_operand, test_utils=("test_faketensor",))


SHAPES = [
    (24, 40, 4, (0,)),  # no token
    (24, 40, 4, (2, 0)),
    (24, 40, 4, (1,)),
    (24, 40, 4, ()),
    (7, 13, 3, (5,)),  # nothing divides anything
    (1, 1, 1, (2,)),
    (5, 33, 64, (3, 3)),  # rank above out and in
    (24, 40, 1, (2, 2, 2)),
    (24, 40, 0, (3,)),  # no adapter
]


@pytest.mark.parametrize(("out", "features", "rank", "leading"), SHAPES)
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_fake_and_real_agree_on_odd_shapes(out, features, rank, leading, granularity):
    spec = SiteSpec(granularity, "pow2", "e5m2")
    x = randn(*leading, features).to(BF16)
    made = layer(out, features, (rank,) if rank else (), leading=leading, spec=spec, bias=True)
    given = case(x, made, spec=spec, out_dtype=F32)
    leaves, checks = given.leaves(), ("test_schema", "test_faketensor")
    torch.library.opcheck(falqon.merged_linear, as_bytes(given.arguments()), test_utils=checks)
    torch.library.opcheck(falqon.base_linear, base_args(made.base, x, None), test_utils=checks)
    y, out_a, *kept = falqon.merged_linear(*given.arguments())
    tokens = x.numel() // features
    x_hat = x.reshape(tokens, features)
    assert (y.shape, y.dtype) == ((*leading, out), F32)
    assert (out_a.shape, out_a.dtype) == ((tokens, rank), F32)
    assert [t.shape for t in kept] == [x_hat.shape, (tokens, 1) if spec.per_row else ()]
    y.sum().backward()
    for leaf in leaves.values():
        assert leaf.grad.shape == leaf.shape
        assert leaf.grad.isfinite().all()
    grads = grad_args(given, BF16)
    torch.library.opcheck(falqon.merged_linear_grad_x, grads, test_utils=checks)


@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
def test_every_pair_of_dtypes_gives_the_dtype_asked_for(x_dtype, out_dtype):
    given = case(randn(3, 40).to(x_dtype), layer(), out_dtype=out_dtype)
    leaves = given.leaves()
    y = falqon.merged_linear(*given.arguments())[0]
    y.sum().backward()
    assert (y.dtype, leaves["x"].grad.dtype) == (out_dtype, x_dtype)
    assert leaves["a 0"].grad.dtype == leaves["b 0"].grad.dtype == F32


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "one_row_of_a_slice"])
def test_strides_of_x_do_not_matter(layout):
    x = {
        "transposed": randn(40, 6).t(),
        "sliced": randn(6, 81)[:, 1::2],
        "expanded": randn(40).expand(6, 40),
        "one_row_of_a_slice": randn(6, 90)[:1, 10:50],
    }[layout]
    made, checks = layer(), ("test_schema", "test_faketensor")
    strided, dense = (case(value, made) for value in (x, x.contiguous()))
    torch.library.opcheck(falqon.merged_linear, as_bytes(strided.arguments()), test_utils=checks)
    results = [falqon.merged_linear(*given.arguments()) for given in (strided, dense)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(falqon.base_linear, base_args(made.base, x, None), test_utils=checks)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_of_gradients_do_not_matter(layout):
    """A sum's gradient is expanded; that of a transpose or of a slice has gaps."""
    results = []
    for dense in (False, True):
        given = case(randn(6, 40), layer(24, leading=(6,), bias=True))
        grad = {
            "transposed": randn(24, 6).t(),
            "sliced": randn(6, 49)[:, 1::2],
            "expanded": randn(1, 1).expand(6, 24),
        }[layout]
        leaves = given.leaves()
        y = falqon.merged_linear(*given.arguments())[0]
        results.append(
            torch.autograd.grad(y, [*leaves.values()], grad.contiguous() if dense else grad)
        )
    for a, b in zip(*results, strict=True):
        # The product that reads dL/dO transposed may sum in another order: 6 terms of O_A.
        torch.testing.assert_close(a, b, rtol=gamma(2 * 40), atol=gamma(2 * 40))


def test_outputs_lie_in_their_own_storage():
    """O_A is kept for backward; as a view of [O | O_A] it would keep all of that alive."""
    y, out_a, x_hat, _ = falqon.merged_linear(*case(randn(3, 40), layer()).arguments())
    places = {t.untyped_storage().data_ptr() for t in (y, out_a, x_hat)}
    assert len(places) == 3
    assert out_a.untyped_storage().nbytes() == out_a.nbytes


def saved_bytes(given: Case) -> int:
    """Of what autograd keeps between forward and backward beside parameters and weights."""
    leaves = given.leaves()
    del leaves["x"]
    known = {t.untyped_storage().data_ptr() for t in leaves.values()}
    for each in (*[m.base.code for m in given.layers], *[m.base.scale for m in given.layers]):
        known.add(each.untyped_storage().data_ptr())
    for cast in given.casts:
        known |= {t.untyped_storage().data_ptr() for t in cast}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        falqon.merged_linear(*given.arguments())
    return sum(kept.values())


def test_x_is_kept_where_a_trains_and_else_only_o_a():
    """A frozen A is LoRA-FA: of x nothing is left, however many layers share it."""
    layers = [layer(ranks=(4,), seed=i) for i in range(3)]
    frozen = saved_bytes(case(randn(3, 40), *layers, keep_x=False))
    trained = saved_bytes(case(randn(3, 40), *layers))
    out_a, x_hat, scale = 3 * (3 * 4) * 4, 3 * 40, 3 * 4
    assert frozen == out_a
    assert trained == out_a + x_hat + scale


def test_x_itself_is_not_kept_for_backward():
    for keep_x in (False, True):
        x = randn(3, 40).requires_grad_() * 1  # not a leaf: nothing else holds it
        alive = weakref.ref(x)
        given = case(x, layer(), keep_x=keep_x)
        given.adapters[0].lora_b.requires_grad_()
        y = falqon.merged_linear(*given.arguments())[0]
        del x, given
        gc.collect()
        assert alive() is None
        y.sum().backward()


@pytest.mark.parametrize("wanted", ["x", "a 0", "b 0", "bias 0", "x 1", "a 1"])
def test_only_the_gradients_asked_for_are_made(wanted):
    given = case(randn(3, 40), layer(ranks=(4, 2), bias=True))
    given.adapters[1].x = randn(3, 40, seed=5)
    leaves = given.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    y = falqon.merged_linear(*given.arguments())[0]
    y.sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_an_a_that_two_layers_share_gets_the_sum_of_their_gradients():
    first, second = layer(), layer(seed=50)
    x, shared = randn(3, 40), first.adapters[0].lora_a.requires_grad_()
    second.adapters[0].lora_a = shared
    alone: list[Tensor] = []
    for each in (first, second):
        y = falqon.merged_linear(*case(x, each).arguments())[0]
        alone += torch.autograd.grad(y, shared, each.grad)
    together = falqon.merged_linear(*case(x, first, second).arguments())[:2]
    (grad,) = torch.autograd.grad(together, shared, [first.grad, second.grad])
    assert torch.equal(grad, alone[0] + alone[1])


def test_an_a_that_trains_after_all_is_an_error():
    """Dynamo compiles anew where requires_grad changes; other callers of a graph don't."""
    for adds_b in (True, False):
        given = case(randn(3, 40), layer(), keep_x=False, adds_b=adds_b)
        given.adapters[0].lora_a.requires_grad_()
        y = falqon.merged_linear(*given.arguments())[0]
        with pytest.raises(FalqonError, match="lora_A trains now"):
            y.sum().backward()
