"""One layer, or several in one graph, and one way to train it: what it launches and keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from falqon_fx import _compat
from falqon_fx.backend import falqon
from lens import fake_gpu, host
from lens.fake_gpu import CUDA, Graph
from lens.host import Host
from lens.launches import Launch, Launches
from lens.models import Adapter, Shape, build, inputs
from lens.passes import Kind, Passes, Tokens


@dataclass(frozen=True)
class Run:
    """One way to train: the backend, its options, and the adapter."""

    backend: str
    adapter: Adapter
    options: Mapping[str, Any]


def runs(rank: int, kernel: str) -> dict[str, Run]:
    """What is set side by side: PEFT + Inductor with its adapter in bfloat16, the faster form; ours
    with float32, as PEFT makes adapters, added in bfloat16 and as columns of FP8; on NVFP4; and
    prepared, without a calibration and with compensate=16, outliers=16, that with its adapters both
    ways, and in INT8.
    """
    options = {"kernel": kernel, "adapter_dtype": "bfloat16"}
    in_k = {**options, "adapter_dtype": "fp8"}
    in_int8 = {**options, "base_dtype": "int8"}
    return {
        "falqon": Run("falqon", Adapter(rank), options),
        "falqon_frozen_a": Run("falqon", Adapter(rank, train_a=False), options),
        "falqon_fp8": Run("falqon", Adapter(rank), in_k),
        "falqon_fp8_frozen_a": Run("falqon", Adapter(rank, train_a=False), in_k),
        "falqon_nvfp4": Run("falqon", Adapter(rank), {**options, "base_dtype": "nvfp4"}),
        "falqon_prepared": Run("falqon", Adapter(rank, bought=0), options),
        "falqon_calibrated": Run("falqon", Adapter(rank, bought=16), options),
        "falqon_calibrated_fp8": Run("falqon", Adapter(rank, bought=16), in_k),
        "falqon_int8": Run("falqon", Adapter(rank, bought=0, base="int8"), in_int8),
        "falqon_int8_calibrated": Run("falqon", Adapter(rank, bought=16, base="int8"), in_int8),
        "inductor": Run("inductor", Adapter(rank, torch.bfloat16), {}),
    }


@dataclass(frozen=True)
class Direction:
    """What one graph launches, in order, and what CUDA graphs need to know of its inputs."""

    launches: list[Launch]
    python_ops: list[str]
    inputs: int
    static_inputs: int
    mutated_inputs: list[int]
    mutated_not_static: list[int]
    no_cuda_graph: str
    host: Host


@dataclass(frozen=True)
class Seen:
    """A layer, or several, forward and backward. ``kept``: dtype, shape and bytes of each tensor
    that is there for backward alone.
    """

    forward: Direction
    backward: Direction
    kept: list[tuple[str, tuple[int, ...], int]]
    code: dict[str, str]
    layers: int

    @property
    def launches(self) -> list[Launch]:
        return [*self.forward.launches, *self.backward.launches]

    @property
    def python_ops(self) -> list[str]:
        return [*self.forward.python_ops, *self.backward.python_ops]

    @property
    def kept_bytes(self) -> int:
        return sum(size for *_, size in self.kept)

    @property
    def host_us(self) -> float:
        """Microseconds a layer."""
        return (self.forward.host.us + self.backward.host.us) / self.layers

    def count(self, kind: Kind) -> int:
        return sum(launch.kind == kind for launch in self.launches)

    def numbers(self) -> dict[str, Any]:
        """All but the code."""
        launches = self.launches
        return {
            "launches": len(launches),
            "python_ops": len(self.python_ops),
            "passes": self.count("pass"),
            "casts": self.count("cast"),
            "kept_bytes": self.kept_bytes,
            "host_us": self.host_us,
            "bytes_read": sum(launch.reads for launch in launches),
            "bytes_written": sum(launch.writes for launch in launches),
            "kept": self.kept,
            "forward": asdict(self.forward),
            "backward": asdict(self.backward),
        }


def look(shape: Shape, batch: int, length: int, layers: int, run: Run, timed: bool) -> Seen:
    """Compile and run a step of ``layers`` layers, with launches that are noted down."""
    with fake_gpu.h100(), fake_gpu.compiled_graphs() as graphs:
        trace(
            build(shape, layers, run.adapter),
            inputs(shape, batch, length),
            run,
        )
        forward, backward = graphs
        assert (forward.backward, backward.backward) == (False, True)
        tokens = Tokens(batch, length, shape.kv_heads * shape.head)
        ahead, results = _direction(forward, tokens, timed)
        back, _ = _direction(backward, tokens, timed)
    x_shape = (batch, length, shape.hidden)
    code = {"forward": forward.source, "backward": backward.source}
    return Seen(ahead, back, list(_kept(forward, results, x_shape)), code, layers)


def trace(model: nn.Module, given: Sequence[Tensor], run: Run) -> None:
    """Compile ``model`` on the meta device as if it were on the card; runs nothing."""
    with fake_gpu.new_mode():

        def fake(value: Tensor) -> Tensor:
            made = torch.empty_strided(
                value.shape,
                value.stride(),
                dtype=value.dtype,
                device=CUDA,
                requires_grad=value.requires_grad,
            )
            if isinstance(value, nn.Parameter):
                return nn.Parameter(made, requires_grad=value.requires_grad)
            return made

        named = (*model.named_parameters(), *model.named_buffers())
        tensors = {f"model.{name}": fake(value) for name, value in named}
        tracer = _Tracer(model, run)
        torch.func.functional_call(tracer, tensors, tuple(map(fake, given)))


class _Tracer(nn.Module):
    """Compiles a model with the tensors that it has at that moment."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, *given: Tensor) -> None:
        model = self.model
        _compat.trace_alone(lambda: model(*given), self._compile)

    def _compile(self, gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        if self.run.backend == "falqon":
            falqon(gm, examples, options=self.run.options)
        else:
            fake_gpu.inductor(gm, examples)
        return gm.forward  # what was compiled is run apart


def _direction(graph: Graph, tokens: Tokens, timed: bool) -> tuple[Direction, Sequence[Any]]:
    launches = Launches(Passes(tokens, [graph.inputs[place] for place in graph.static]))
    results = graph.call(launches)
    seen = Direction(
        launches.made,
        launches.python_ops,
        len(graph.inputs),
        len(graph.static),
        sorted(graph.mutated),
        sorted(graph.mutated - graph.static),
        graph.graphs_off,
        host.look(graph, launches.results) if timed else Host(0.0, {}, host.calls(graph)),
    )
    return seen, results


def _kept(graph: Graph, results: Sequence[Any], x_shape: tuple[int, ...]) -> Any:
    """What forward keeps but parameters, FP8 bases and position embeddings, which are there anyway:
    x counts, as no other layer keeps it.
    """
    anyway = {
        fake_gpu.storage_of(value)
        for place, value in enumerate(graph.inputs)
        if isinstance(value, Tensor) and (place in graph.static or value.shape != x_shape)
    }
    for value in results[graph.returned :]:
        if isinstance(value, Tensor) and fake_gpu.storage_of(value) not in anyway:
            anyway.add(fake_gpu.storage_of(value))
            size = value.numel() * value.element_size()
            yield str(value.dtype).removeprefix("torch."), tuple(value.shape), size
