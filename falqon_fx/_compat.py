"""The only file that imports private torch names."""

from __future__ import annotations

import copy
import functools
import inspect
import platform
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils._pytree import tree_map as tree_map

from falqon_fx.errors import FalqonError

LazyGraphModule = _LazyGraphModule
# torch 2.11's makes each parameter as one that may have a gradient, which integers can't have.
FSDP2_TAKES_INTEGERS = torch.__version__ >= "2.12"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# How Dynamo writes `torch.no_grad()`, `torch.inference_mode()` and `torch.autocast()` in a graph.
SET_GRAD = torch._C._set_grad_enabled
_autocast, _grad_mode = torch.amp.autocast_mode, torch.autograd.grad_mode
ENTER_MODE = (_autocast._enter_autocast, _grad_mode._enter_inference_mode)
EXIT_MODE = (_autocast._exit_autocast, _grad_mode._exit_inference_mode)


def _nesting(change: str) -> frozenset[object]:
    """How it writes the beginning or the end of a transform of torch.func (vmap, grad, jvp)."""
    import torch._functorch.predispatch as predispatch

    modules = (torch._C._functorch, predispatch)
    names = [(module, name) for module in modules for name in dir(module)]
    return frozenset(getattr(m, name) for m, name in names if name.endswith(f"_{change}_nesting"))


ENTER_TRANSFORM, EXIT_TRANSFORM = _nesting("increment"), _nesting("decrement")


def unwrap_transforms(tensor: Tensor) -> Tensor:
    """The tensor inside those that transforms of torch.func wrap around it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def version(tensor: Tensor) -> int:
    """Autograd's count of in-place writes; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """`version` of each."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # an inference tensor is among them
        return [version(tensor) for tensor in tensors]


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
    """The library's FP8 GEMM: a [n, K] row by row, b [K, m] column by column."""
    return torch._scaled_mm(a, b, scale_a, scale_b, **options)


@functools.cache
def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware.

    oneDNN's answer, which obeys ONEDNN_MAX_CPU_ISA, is yes for AVX-512 without bf16, too; the CPU's
    own flag obeys no variable; ATEN_CPU_CAPABILITY shows in ATen's level alone.
    """
    onednn = torch.backends.mkldnn.is_available()
    if not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    on = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return not X86 or (on and torch.cpu._is_avx512_bf16_supported())


def native_int8() -> bool:
    """Whether this CPU has VNNI, without which torch's products of integers are 30 times slower."""
    return not X86 or torch.cpu._is_vnni_supported()


def inductor_compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any],
    mode: str | None,
    decompositions: dict[Any, Callable[..., Any]] | None,
    passes: Mapping[str, Callable[[fx.Graph], None]],
    version: str,
) -> Callable[..., Any]:
    """AOTAutograd + Inductor with passes, by the options that they are; all named ``version``."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    @dataclass
    class Pass(CustomGraphPass):
        run: Callable[[fx.Graph], None]

        def __call__(self, graph: fx.Graph) -> None:
            self.run(graph)

        def uuid(self) -> str:
            return version

    of_mode = list_mode_options(mode) if mode else {}
    patches = {name: Pass(run) for name, run in passes.items()} | of_mode | dict(options)
    compiled: Any = compile_fx(gm, [*inputs], config_patches=patches, decompositions=decompositions)
    return compiled  # type: ignore[no-any-return]


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """The decompositions that Inductor uses by itself."""
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def aot_eager_compile(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """AOTAutograd alone: the graph runs op by op after functionalization and partitioning."""
    from torch._dynamo.backends.debugging import aot_eager

    compiled: Callable[..., Any] = aot_eager(gm, list(inputs))
    return compiled


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of a graph's values, or None."""
    return torch._guards.detect_fake_mode(list(values))


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def share_storage(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def any_fake(values: Sequence[object]) -> bool:
    return FakeTensor in set(map(type, values))


def mark_own_input(node: fx.Node, *, static: bool = True) -> None:
    """Tell AOTAutograd that a placeholder is ours, and whether its tensor stays where it is."""
    node._dynamo_source = None
    if static:
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def copy_dynamo_attributes(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """What Dynamo hangs on a graph module beside its graph and AOTAutograd reads back."""
    for name in ("_param_name_to_source", "compile_subgraph_reason"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    inputs = (gm.graph.find_nodes(op="placeholder") for gm in (old, new))
    for before, after in zip(*inputs, strict=False):
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
        # A weak reference to the argument, which Dynamo removes when it is done: a parameter that
        # has one can't be swapped (torch.__future__.set_swap_module_params_on_conversion).
        after.meta.pop("grapharg", None)


def is_checkpoint(target: object) -> bool:
    """Whether an FX target is the activation-checkpoint higher-order op."""
    return target is torch.ops.higher_order.tag_activation_checkpoint


def checkpoint_bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str, fx.GraphModule]]:
    """The checkpoint calls of a graph, with the name and the graph module of the body of each."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and is_checkpoint(node.target):
            name = str(node.args[0].target)
            body = gm.get_submodule(name)
            assert isinstance(body, fx.GraphModule)
            yield node, name, body


def recompute_eagerly(gm: fx.GraphModule) -> fx.GraphModule:
    """Make the checkpoints of a graph that runs op by op those of `torch.utils.checkpoint`.

    Run by itself, their op draws a dropout anew in backward, or in older torch does not recompute
    (https://github.com/pytorch/pytorch/issues/160773).
    """
    for node, _, body in list(checkpoint_bodies(gm)):
        recompute_eagerly(body)
        node.target = _checkpoint
        node.kwargs = {**node.kwargs, "use_reentrant": False}
    gm.recompile()
    return gm


def _checkpoint(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    selective = body.meta.get("_checkpoint_context_fn")  # a graph's code can't hold a function
    if selective is not None:
        kwargs["context_fn"] = selective
    return torch.utils.checkpoint.checkpoint(body, *args, **kwargs)


def uncompile(module: nn.Module) -> None:
    """Take back what `module.compile` did; of modules inside, nothing."""
    module._compiled_call_impl = None


def is_plain(value: Tensor) -> bool:
    """Whether a tensor is no subclass that carries a meaning of its own (DTensor, quantized)."""
    return type(value) in (Tensor, torch.nn.Parameter, FakeTensor)


def is_dtensor(value: object) -> bool:
    """Whether a parameter is sharded (FSDP2, tensor parallel)."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def default_store() -> Any:
    """The key-value store of the default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def is_fsdp(node: fx.Node) -> bool:
    """Whether a Dynamo placeholder is a parameter of an FSDP module, gathered for this call."""
    source = getattr(node, "_dynamo_source", None)
    return source is not None and bool(source.guard_source.is_fsdp_module())


def is_ddp_piece(gm: fx.GraphModule) -> bool:
    """Whether DDP's optimizer cut this graph out of a larger one, to overlap its buckets."""
    why = getattr(gm, "compile_subgraph_reason", None)
    return why is not None and "DDPOptimizer" in why.reason


def source_path(node: fx.Node) -> str:
    """The dotted attribute path of a Dynamo placeholder below the compiled module, or ""."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name if isinstance(source.name, str) else source.name()
    parts = [p for p in re.findall(r"\w+", re.sub(r"^L\['\w+'\]", "", name)) if p not in _HOLDERS]
    local = re.match(r"L\['(\w+)'\]", name)
    if len(parts) == 1 and local is not None and local[1] != "self":
        parts.insert(0, local[1])  # a module in a local variable, its path unknown
    return ".".join(parts)


_HOLDERS = {"__dict__", "_modules", "_parameters", "_buffers"}


def module_path(node: fx.Node) -> str:
    """The path of the innermost module in whose ``forward`` a node was traced, or ""."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = re.sub(r"^L\['\w+'\]", "", str(stack[-1][0])) if stack else ""
    return ".".join(p for p in re.findall(r"\w+", name) if p not in _HOLDERS)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal whatever their symbols stand for; adds no guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(statically_known_true(m == n) for m, n in zip(a, b))


def fake_mode(*, allow_non_fake_inputs: bool = False) -> Any:
    """A fresh FakeTensorMode."""
    return FakeTensorMode(allow_non_fake_inputs=allow_non_fake_inputs)


# What fake tensors raise where code asks for their values.
NO_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


# Contexts in which tensors are real, whatever mode the caller is in, or subclasses plain tensors.
without_fake_mode: Any = unset_fake_temporarily
plain_tensors: Any = torch._C.DisableTorchFunctionSubclass


def hint(size: Any) -> int:
    """The value of a size in the traced call; a symbol is not pinned by reading it."""
    return int(size.node.hint if isinstance(size, torch.SymInt) else size)


def graph_break(gm: fx.GraphModule) -> tuple[str, list[tuple[str, int, str, str]]] | None:
    """Why Dynamo ended this graph before its function returned, and the user's stack there."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    frames = [(f.filename, f.lineno or 0, f.name, (f.line or "").strip()) for f in why.user_stack]
    return why.reason, frames


def copy_dynamic_marks(old: Tensor, new: Tensor) -> None:
    """What `torch._dynamo.mark_dynamic` and its like wrote on a tensor."""
    for name, value in vars(old).items():
        if name.startswith("_dynamo_") or name == "_specialize_on":
            setattr(new, name, value)


def compile_number() -> int:
    """How many graphs Dynamo made of the code at hand before; 0 where it compiles none."""
    context = torch._guards.CompileContext.try_get()
    done = getattr(context and context.compile_id, "frame_compile_id", None)
    return int(done or 0)


def with_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function whose graphs Dynamo counts apart: it knows functions by their code, and
    the sizes that one has seen by its name.
    """
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, None, function.__closure__)


def trace_alone(function: Callable[[], Any], backend: Callable[..., Any]) -> Any:
    """Run ``function`` under Dynamo with ``backend``, apart from all other compilations: sizes seen
    and entries made by either don't count for the other. An error of ``backend`` comes as it is.
    """
    from torch._dynamo.pgo import get_code_state

    newer = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if newer else {}
    fresh = with_own_code(function, function.__name__)
    sizes = get_code_state()  # the sizes seen by each function, from which Dynamo guesses symbols
    mine = copy.deepcopy(dict(sizes))
    sizes.clear()
    try:
        return torch.compile(fresh, backend=backend, **options)()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None
    finally:
        sizes.clear()
        sizes.update(mine)


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Hand a text to torch's structured trace; ``payload`` runs only where one is being written."""
    from torch._logging._internal import trace_structured

    about = {"name": name, "encoding": "string"}
    trace_structured("artifact", lambda: about, payload_fn=payload, expect_trace_id=False)


def value_of(node: fx.Node) -> Any:
    """A node's fake value, from Dynamo (example_value) or fake propagation and export (val)."""
    return node.meta.get("example_value", node.meta.get("val"))


nn_linear = torch._C._nn.linear  # what F.linear is in a graph of Dynamo
grouped_mm = torch._grouped_mm
OpOverload = torch._ops.OpOverload


def launch_in_graph(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    blocks: Mapping[str, Any],
    written: list[str],
) -> dict[str, Tensor]:
    """A launch of a Triton kernel as a node of the graph that is being traced; the tensors
    ``written``, as they are after it. ``blocks`` has the block of each that is read by TMA.

    What `torch.library.wrap_triton` traces to above AOTAutograd: decompositions run below it.
    """
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    table = wrap.kernel_side_table
    first = kernel not in table.kernel_to_id
    call: dict[str, Any] = {
        "kernel_idx": table.add_kernel(kernel),
        "constant_args_idx": table.add_constant_args({}),
        "kwargs": dict(arguments),
        "tma_descriptor_metadata": {
            name: wrap.create_tma_stable_metadata(block) for name, block in blocks.items()
        },
    }
    # Inductor orders launches by what it finds in a kernel's code: what it doesn't see comes late.
    if first and (unseen := {*written} - {*wrap.get_mutated_tensors(**call)}):
        problem = f"torch doesn't see that it writes {', '.join(sorted(unseen))}"
        raise FalqonError(str(kernel), problem, 'Set kernel="scaled_mm" or kernel="dequantize"')
    call |= {"grid": [(*grid, *[1] * (3 - len(grid)))], "tensors_to_clone": written}
    result: dict[str, Tensor] = wrap.triton_kernel_wrapper_functional(**call)
    return result
