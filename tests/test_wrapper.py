"""What the backend does around a compiled graph in each call, counted; and what a call like an
earlier one goes by instead of asking the registry.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import falqon_fx
from falqon_fx import backend
from falqon_fx.kernels.cpu import samples
from falqon_fx.site.base import Base, bases, cast_base, digest
from falqon_fx.site.found import FoundByAddress, Parameters
from falqon_fx.site.spec import SiteSpec
from tests.models import Relu, Stack, fill_b, freeze_a

PREPARED = pytest.mark.parametrize("prepared", [False, True], ids=["unprepared", "prepared"])


@pytest.fixture(params=["compiled", "by ATen"])
def samples_by(request, monkeypatch):
    """Samples are compared by compiled code, or where there is no compiler by ATen."""
    if request.param == "by ATen":
        monkeypatch.setattr(samples, "library", lambda: None)
    elif samples.library() is None:
        pytest.skip("no C++ compiler")


def wrapper(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """One call of what the backend gives Dynamo, around a graph that returns at once."""
    calls: list[Callable[[], Any]] = []

    def compile_graph(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        with monkeypatch.context() as patch:
            patch.setattr(backend, "_compile", lambda *_: lambda *_: ())
            run = backend.falqon(gm, inputs, options={"inner": "eager"})

        def record(*args: Any) -> Any:
            calls.append(lambda: run(*args))
            return gm(*args)

        return record

    torch._dynamo.reset()
    torch.compile(model, backend=compile_graph)(x)
    (call,) = calls
    for _ in range(3):  # the base is made, the adapters are noted
        call()
    return call


def rewritten(model: nn.Module, x: Tensor) -> tuple[falqon_fx.RewriteResult, list[Any]]:
    """The rewritten graph of a model, and what Dynamo calls it with."""
    found = []

    def compile_graph(gm: Any, inputs: list[Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            found.append((falqon_fx.rewrite(gm, inputs), list(args)))
            return gm(*args)

        return record

    torch._dynamo.reset()
    torch.compile(model, backend=compile_graph)(x)
    (one,) = found
    return one


def python_calls(call: Callable[[], Any]) -> Counter[str]:
    """Calls of Python functions ("call") and of functions in C ("c_call")."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        counted[event] += 1

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counted


class Operations(TorchDispatchMode):
    """Lists the tensor operations within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(samples.library() is None, reason="no C++ compiler")
@PREPARED
def test_a_call_like_the_one_before_does_a_few_things_a_site(prepared, monkeypatch):
    """A lookup of the registry is dozens of calls a site."""
    counts, operations = [], []
    for blocks in (1, 4):
        model = Stack(blocks=blocks)
        if prepared:
            falqon_fx.prepare(model, progress=False)
        call = wrapper(model, torch.randn(3, 32), monkeypatch)
        counts.append(python_calls(call))
        with Operations() as seen:
            call()
        operations.append([name for name in seen.names if name != "aten.detach.default"])
    few, many = counts
    assert many["call"] == few["call"] <= 50
    # Of six more sites: the addresses of W, A, B and W's strides, two inputs appended; of a
    # prepared one the address of the scale, too, and bytes and scale viewed as what they are.
    assert many["c_call"] - few["c_call"] <= 6 * (9 if prepared else 6)
    assert operations == [["aten.view.dtype"] * (2 * n if prepared else 0) for n in (2, 8)]


# -- what tells that a call is another -------------------------------------------------------------


def transposed(weight: nn.Parameter) -> None:
    """The same memory and version."""
    weight.data = weight.data.t()


def one_element(weight: nn.Parameter) -> None:
    """One that `sample` looks at."""
    weight.data[4, 2] += 1.0


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


@pytest.mark.parametrize("change", [transposed, one_element, in_place])
def test_a_changed_w_makes_a_new_base_and_only_then(samples_by, change):
    model, x = Relu(width=32, hidden=32), torch.randn(5, 32)
    fill_b(model)
    result, args = rewritten(model, x)
    first, again = (result.bind(args)[len(args) :] for _ in range(2))
    assert all(one is other for one, other in zip(first, again, strict=True))
    change(model.up.base_layer.weight)
    up, _, down, _ = result.bind(args)[len(args) :]
    assert up is not first[0]
    assert down is first[2]
    wanted = cast_base(model.up.base_layer.weight, SiteSpec.from_config(falqon_fx.FalqonConfig()))
    assert torch.equal(up.view(torch.uint8), wanted.code)
    assert not torch.equal(wanted.code, first[0].view(torch.uint8))


def test_written_bytes_of_a_prepared_layer_are_an_error_in_the_next_call(samples_by):
    model, x = Relu(), torch.randn(5, 32)
    falqon_fx.prepare(model, progress=False)
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    for _ in range(3):
        call(x)
    model.up.base_layer.code.data[0, 0] ^= 1
    with pytest.raises(falqon_fx.FalqonError, match=r"up.*bytes of its FP8 base"):
        call(x)


def test_an_inference_tensor_has_no_version_and_its_sample_is_looked_at(samples_by):
    with torch.inference_mode():
        model, x = Relu(), torch.randn(5, 32)
        fill_b(model)
        assert model.up.base_layer.weight.is_inference()
        result, args = rewritten(model, x)
        first, again = result.bind(args), result.bind(args)
        assert first[len(args)] is again[len(args)]
        model.up.base_layer.weight.mul_(2.0)
        assert result.bind(args)[len(args)] is not first[len(args)]


def test_an_adapter_where_a_dead_one_lay_is_noted(samples_by):
    """Memory is used again: its address is the same and its storage another."""
    model, x = Relu(), torch.randn(5, 32)
    memory = bytearray(model.up.lora_B.weight.nbytes)

    def lay_b() -> None:
        b = torch.frombuffer(memory, dtype=torch.float32).view(model.up.lora_B.weight.shape)
        model.up.lora_B.weight = nn.Parameter(b)

    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    addresses = set()
    for _ in range(2):
        lay_b()
        gc.collect()
        addresses.add(model.up.lora_B.weight.data_ptr())
        for _ in range(3):
            call(x)
        ((_, b, _),) = falqon_fx.adapters(model)["up"].adapters
        assert b is model.up.lora_B.weight
        del b
    assert len(addresses) == 1


def test_two_graphs_that_scale_an_adapter_differently_are_told_apart_each_time():
    model, x = freeze_a(Relu()), torch.randn(5, 32)
    call = torch.compile(model, backend="falqon", options={"inner": "eager"})
    for scaling in (2.0, 3.0, 2.0, 2.0, 3.0, 3.0, 2.0):
        model.up.scaling = scaling
        call(x)
        states = falqon_fx.adapters(model)
        assert [s for state in states.values() for _, _, s in state.adapters] == [scaling, 2.0]


def test_what_was_found_goes_with_the_first_of_its_parameters():
    code, scale, adapter = torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), torch.ones(2, 8)
    known, given = FoundByAddress(), Parameters([code], [scale], [adapter])
    entry = bases.verify("", Base(code, scale), digest(code, scale))
    known.put(given, given.looks(), [entry], bases.changes)
    assert known.get(given) == [entry]
    addresses = given.addresses()
    del given, adapter
    assert addresses not in known._found


# -- samples ---------------------------------------------------------------------------------------

DTYPES = (torch.uint8, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.skipif(samples.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lie", ["rows", "columns", "apart"])
def test_every_bit_of_a_sample_is_looked_at_and_nothing_beside_it(dtype, lie):
    whole = torch.arange(12 * 10).view(12, 10).to(dtype)
    whole = whole.t() if lie == "columns" else whole
    part = whole[::3, ::2] if lie == "apart" else whole
    others = [torch.ones(2, 2), part]  # not the first alone
    look = samples.Samples([(t, t.clone(memory_format=torch.contiguous_format)) for t in others])
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    inside[:: 3 if lie == "apart" else 1, :: 2 if lie == "apart" else 1] = True
    for i in range(whole.shape[0]):
        for j in range(whole.shape[1]):
            for bit in (0, 8 * dtype.itemsize - 2):
                assert look.unchanged()
                whole.view(bits)[i, j] ^= 1 << bit
                assert look.unchanged() == (not inside[i, j])
                whole.view(bits)[i, j] ^= 1 << bit


def test_a_copy_of_another_shape_or_dtype_is_refused():
    for other in (
        torch.ones(2, 3),
        torch.ones(2, 2, dtype=torch.int32),
        torch.ones(2, 2).t()[:, :1],
    ):
        with pytest.raises(ValueError, match="is no copy of"):
            samples.Samples([(torch.ones(2, 2), other)])
