"""An H100 made of properties alone: enough for Inductor to write the code that it would run there.

Dynamo, AOTAutograd and Inductor see fake tensors on ``cuda:0``. Triton kernels are neither compiled
nor run: the generated module gets `Kernel` objects in their place. All private names of torch and
Triton that the lens needs are in this file, and all that is patched is put back.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._dynamo import device_interface
from torch._inductor import async_compile, compile_fx, graph, ir
from torch._inductor.codecache import CppCodeCache
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _triton as triton_of_torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lens.kernel import Kernel, name_ops

CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


def _h100(device: Any = None) -> Any:
    return H100


class _Interface(device_interface.CudaInterface):
    """Dynamo's and Inductor's view of the card."""

    class Worker(device_interface.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(_h100)

    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    synchronize = staticmethod(lambda device=None: None)
    get_device_properties = staticmethod(_h100)
    get_raw_stream = staticmethod(lambda index: 0)
    exchange_device = staticmethod(lambda device: 0)
    maybe_exchange_device = staticmethod(lambda device: 0)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    is_available = staticmethod(lambda: True)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)


class _Driver:
    """Triton's view of it."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=0: 0)
    get_active_torch_device = staticmethod(lambda: CUDA)
    get_device_interface = staticmethod(lambda: torch.cuda)


@dataclass(frozen=True)
class Graph:
    """One graph that Inductor compiled.

    ``inputs`` are fake; ``static`` are the places of those that stay where they are (parameters and
    buffers), ``mutated`` of those that are written. ``returned`` is how many of the results are not
    there for backward alone. ``graphs_off``: why Inductor would make no CUDA graph of it, or "".
    """

    backward: bool
    source: str
    module: Any
    inputs: list[Any]
    static: frozenset[int]
    mutated: frozenset[int]
    returned: int
    graphs_off: str

    def call(self, launches: Any) -> Sequence[Any]:
        """Run the generated code; ``launches`` has what stands in for a launch of each kind."""
        with _stand_ins(self.module, launches), mode_of(self.inputs), launches:
            results: Sequence[Any] = self.module.call([*self.inputs])
            return results


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """In this block torch and Triton find an H100, though `torch.cuda.is_available` is False."""
    patches: list[Any] = [
        mock.patch.dict(device_interface.device_interfaces, {"cuda": _Interface}),
        mock.patch.object(driver, "_active", _Driver()),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", _zero, create=True),
    ]
    for name, value in (
        ("is_available", lambda: False),  # in a build for GPUs it would ask `device_count`
        ("get_device_properties", _h100),
        ("get_device_capability", lambda device=None: (H100.major, H100.minor)),
        ("get_device_name", lambda device=None: H100.name),
        ("current_device", lambda: 0),
        ("device_count", lambda: 1),
        ("set_device", lambda device: None),
        ("_exchange_device", lambda device: 0),
        ("_maybe_exchange_device", lambda device: 0),
        ("_lazy_init", lambda: None),
        ("is_bf16_supported", lambda including_emulation=True: True),
        # Nothing may be timed; the choice falls on what comes first.
        ("is_current_stream_capturing", lambda: True),
    ):
        patches.append(mock.patch.object(torch.cuda, name, value))
    # By which torch sees what a kernel with descriptors writes.
    host_tma = "has_triton_tensor_descriptor_host_tma"
    patches.append(mock.patch.object(triton_of_torch, host_tma, return_value=True))
    device_interface.get_interface_for_device("cuda")  # registers the real ones, once
    with contextlib.ExitStack() as stack:
        stack.enter_context(_accelerator())
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        for patch in patches:
            stack.enter_context(patch)
        _forget()
        stack.callback(_forget)
        yield


@contextlib.contextmanager
def _accelerator() -> Iterator[None]:
    """Autograd's engine meets tensors on cuda, at which a torch without CUDA aborts.

    It asks a device guard for streams, and hooks whether cuda was built in. In this block there is
    a guard (`guard.cpp`), and the virtual functions by which the hooks answer say yes.
    """
    lib = Path(torch.__file__).parent / "lib"
    kinds: Any = torch._C._autograd.DeviceType
    place = int(kinds.CUDA)
    c10 = ctypes.CDLL(str(lib / "libc10.so"), mode=ctypes.RTLD_GLOBAL)  # what the guard links to
    guards = (ctypes.c_void_p * (1 + place)).in_dll(
        c10, "_ZN3c104impl26device_guard_impl_registryE"
    )
    if guards[place] is not None:  # a torch with CUDA
        yield
        return
    source = (Path(__file__).parent / "guard.cpp").read_text()
    guard = CppCodeCache.load(source).falqon_lens_guard
    hooks = ctypes.CDLL(str(lib / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    guard.restype = hooks.restype = ctypes.c_void_p
    functions = ctypes.c_void_p.from_address(hooks())
    before = functions.value
    table = (ctypes.c_void_p * 64)(*(ctypes.c_void_p * 64).from_address(before or 0))
    for index, answer in _ANSWERS.items():
        table[index] = ctypes.cast(answer, ctypes.c_void_p)
    guards[place], functions.value = guard(), ctypes.addressof(table)
    try:
        yield
    finally:
        guards[place], functions.value = None, before


_Answer = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
# By their places in the table of at::AcceleratorHooksInterface: isBuilt, hasPrimaryContext.
_ANSWERS = {2: _Answer(lambda hooks: True), 4: _Answer(lambda hooks: False)}


def _zero(_: Any) -> int:
    """A stream, or an address."""
    return 0


def _forget() -> None:
    """What torch remembers of the card at hand."""
    for function in vars(triton_of_torch).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    DeviceProperties.create.__func__.cache_clear()  # type: ignore[attr-defined]


@contextlib.contextmanager
def compiled_graphs() -> Iterator[list[Graph]]:
    """The graphs that Inductor compiles in this block: in one thread, without caches, and
    backward as soon as forward.
    """
    found: list[Graph] = []
    modules: list[tuple[Any, Any]] = []
    codegen, load = compile_fx.fx_codegen_and_compile, graph.GraphLowering.compile_to_module
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def loaded(self: Any) -> Any:
        modules.append((self, load(self)))
        return modules[-1][1]

    def compiled(gm: fx.GraphModule, inputs: Sequence[Any], *rest: Any, **options: Any) -> Any:
        result: Any = codegen(gm, inputs, *rest, **options)
        (lowered, module), source = modules.pop(), str(result.source_code)
        _name_accesses(lowered, module, source)
        context = torch._guards.TracingContext.try_get()
        assert context is not None
        meta: Any = context.fw_metadata
        found.append(
            Graph(
                bool(options.get("is_backward")),
                source,
                module,
                [*inputs],
                frozenset(options.get("static_input_idxs", ())),
                frozenset(result.mutated_input_idxs),
                meta.num_forward_returns,
                result.disabled_cudagraphs_reason or "",
            )
        )
        return result

    def deduced(self: Any, node: fx.Node) -> Any:
        with _ConstantsOnCpu():  # type: ignore[no-untyped-call] # torch's __init__
            return deduce(self, node)

    def triton_kernel(self: Any, name: str, source: str, device_str: str = "cuda") -> Kernel:
        return Kernel.of(name, source)

    with (
        mock.patch.object(async_compile.AsyncCompile, "triton", triton_kernel),
        mock.patch.object(graph.GraphLowering, "compile_to_module", loaded),
        mock.patch.object(compile_fx, "fx_codegen_and_compile", compiled),
        mock.patch.object(joint_graph.UniformValueConstantFolder, "_deduce_value", deduced),
        inductor_config.patch(compile_threads=1, force_disable_caches=True),
        functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
    ):
        yield found


def _name_accesses(lowered: Any, module: Any, source: str) -> None:
    """Complete the module's kernels: their ops, and what those read and write that the graph was
    handed, as Inductor found it in their code.
    """
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, Kernel)}
    name_ops(kernels, source)
    for op in lowered.operations:
        if isinstance(op, ir.UserDefinedTritonKernel):
            accesses = op.arg_accesses.read_writes
            for kernel in kernels.values():
                if op.kernel_src in kernel.source:
                    kernel.reads |= {dep.name for dep in accesses.reads}
                    kernel.writes |= {dep.name for dep in accesses.writes}


class _ConstantsOnCpu(TorchDispatchMode):
    """Inductor computes constants of one element on the card: here it does so on the CPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if str(named.get("device")).startswith("cuda"):
            named["device"] = torch.device("cpu")
        return func(*args, **named)


def inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Compile a graph as ``backend="inductor"`` does."""
    compile_fx.compile_fx(gm, [*inputs])


@contextlib.contextmanager
def _stand_ins(module: Any, launches: Any) -> Iterator[None]:
    """The names by which the generated code allocates and launches mean others in this block."""
    names: dict[str, Any] = {
        "empty_strided_cuda": empty_strided,
        "reinterpret_tensor": _view,
        "assert_size_stride": _same_layout,
        "assert_alignment": _nothing,
        "copy_if_misaligned": lambda value: value,
    }
    names = {name: value for name, value in names.items() if hasattr(module, name)}
    kernels = [value for value in vars(module).values() if isinstance(value, Kernel)]
    # A descriptor asks for the alignment of an address.
    address = mock.patch.object(FakeTensor, "data_ptr", _zero, create=True)
    with mock.patch.multiple(module, **names), address:
        for kernel in kernels:
            kernel.launched = launches.triton
        yield


@contextlib.contextmanager
def no_launches(module: Any, source: str, results: Mapping[str, Sequence[Any]]) -> Iterator[None]:
    """The generated code ``source`` launches nothing in this block, and takes meta tensors.

    An op that makes its own results gives those in ``results``, in turn.
    """
    ops: dict[str, dict[str, Any]] = {}
    for name, made in results.items():
        namespace, op, overload = name.split(".")
        turn = itertools.cycle(as_meta(made))

        def give(*given: Any, turn: Iterator[Any] = turn, **named: Any) -> Any:
            return next(turn)

        run: Any = torch.ops.aten.view.dtype if op == "view" else give  # a view allocates nothing
        ops.setdefault(namespace, {})[op] = SimpleNamespace(**{overload: run})
    of_torch = types.ModuleType("torch")
    of_torch.__dict__.update(torch.__dict__)
    of_torch.__dict__["ops"] = SimpleNamespace(
        **{namespace: SimpleNamespace(**found) for namespace, found in ops.items()}
    )
    kernels = [name for name, value in vars(module).items() if isinstance(value, Kernel)]
    extern = dict.fromkeys(_EXTERN.findall(source), _nothing)
    names: dict[str, Any] = {
        "empty_strided_cuda": _empty_meta,
        "torch": of_torch,
        "extern_kernels": SimpleNamespace(**extern),
        **dict.fromkeys(kernels, SimpleNamespace(run=_nothing)),
    }
    with mock.patch.multiple(module, **names):
        yield


_EXTERN = re.compile(r"extern_kernels\.(\w+)")


def as_meta(values: Any) -> Any:
    """The same tensors on the meta device."""

    def meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _empty_meta(value.shape, value.stride(), value.dtype)

    return tree_map(meta, values)


def _empty_meta(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _nothing(*given: Any, **named: Any) -> None:
    """A launch that costs nothing."""


def empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A fake tensor on the card."""
    return torch.empty_strided(size, stride, dtype=dtype, device=CUDA)


def _view(value: Tensor, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> Tensor:
    return torch.as_strided(value, size, stride, value.storage_offset() + offset)


def _same_layout(value: Tensor, size: Sequence[int], stride: Sequence[int], *_: str) -> None:
    assert tuple(value.shape) == tuple(size), (value.shape, size)
    moving = [i for i, length in enumerate(size) if length > 1]
    assert all(value.stride(i) == stride[i] for i in moving), (value.stride(), stride)


def mode_of(values: Sequence[Any]) -> Any:
    """The FakeTensorMode of fake tensors."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def new_mode() -> Any:
    """A FakeTensorMode for a model on the meta device."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_of(value: Tensor) -> int:
    """What tensors that share memory have in common, fake ones as well."""
    return int(value.untyped_storage()._cdata)
