"""Tensor and sequence parallelism over two processes, against one."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, MeshPlan
from falqon_fx.backend import falqon as falqon_backend
from falqon_fx.model.mesh_bytes import on_mesh
from falqon_fx.site.sharded import local
from tests.distributed import context, pipeline, ranks
from tests.distributed.tensor_parallel import (
    WIDTH,
    Checkpointed,
    alone,
    compiled,
    cut,
    integers,
    make,
    mesh,
    together,
    trained,
    whole,
)
from tests.distributed.traffic import Counted
from tests.models import LoraLinear

CONFIG = FalqonConfig(inner="aot_eager")
ALL = ["down", "gate", "plain", "up"]
ERRORS = {
    "configs": ("differ in grad_dtype", "e5m2", "e4m3", "same config and versions"),
    "mixed": ("differ in prepared", "True", "False", "same calls"),
    "nan": ("down.base_layer", "NaN"),
    "svd": ('init="svd"', "keep"),
}


def check(result: dict[str, Any]) -> None:
    """What `fast` returned, in `tests/distributed/test_fast.py`: no sum depends on its order here
    (`tests.distributed.tensor_parallel`), so bit for bit.
    """
    _check(result["run"], sequence=True)
    planned, real = result["bytes"]
    assert planned == real
    assert len(result["saved"]) == 5
    assert not any(result["saved"].values()), result["saved"]
    for problem, texts in ERRORS.items():
        assert all(text in result["said"][problem] for text in texts), result["said"]


def fast() -> dict[str, Any]:
    """One way of all, and what is refused."""
    problems: dict[str, Any] = {"configs": _other_config, "mixed": _mixed, "nan": _nan, "svd": _svd}
    said = {name: _error(problem) for name, problem in problems.items()}
    run = _compared(CONFIG, sequence=True, prepared=True)
    return {"run": run, "said": said, "bytes": _bytes(), "saved": saved_and_loaded()}


def saved_and_loaded() -> dict[str, list[str]]:
    """What differs after a prepared model went from one process to two and back, by each way of
    saving.
    """
    one = _prepared(None)
    given = dict(one.named_parameters())
    differs: dict[str, list[str]] = {}
    if dist.get_rank() == 0:
        falqon_fx.save_checkpoint(one, "of one")
    dist.barrier()
    both = _prepared(False, zeros=True)
    falqon_fx.load_checkpoint(both, "of one")
    differs["1 to 2"] = _differ(given, both)
    falqon_fx.save_checkpoint(both, "of two")
    dcp.save({"falqon": falqon_fx.CheckpointState(both)}, checkpoint_id="parts")
    ways = {"load_checkpoint": lambda model: falqon_fx.load_checkpoint(model, "of two")}
    ways["DCP"] = lambda model: dcp.load(
        {"falqon": falqon_fx.CheckpointState(model)}, checkpoint_id="parts", no_dist=model is alone
    )
    for way, load in ways.items():
        alone = _prepared(None, zeros=True)
        load(alone)
        differs[f"2 to 1, {way}"] = _differ(given, alone)
        again = _prepared(False, zeros=True)
        load(again)
        differs[f"2 to 2, {way}"] = _differ(given, again)
        again.down.base_layer.base()  # whose bytes are those of its digest
    code: Any = both.down.base_layer.code
    code.detach().to_local()[0, 0] ^= 1
    with pytest.raises(FalqonError, match="down"):
        falqon_fx.save_checkpoint(both, "changed")
    return differs


def _prepared(sequence: bool | None, zeros: bool = False) -> Any:
    """A prepared model with all of its B filled, in one process or cut; or with other weights."""
    model: torch.nn.Module = make()
    if zeros:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    if sequence is not None:
        model = cut(model, sequence)
    falqon_fx.prepare(model, CONFIG, progress=False)
    return model


def _differ(given: dict[str, Any], model: torch.nn.Module) -> list[str]:
    """The parameters that are others; a cut layer's digest is of its part."""
    return [
        name
        for name, p in model.named_parameters()
        if whole(p).shape == given[name].shape and not torch.equal(whole(p), given[name])
    ]


def _bytes() -> tuple[dict[str, int], dict[str, int]]:
    """What a process holds, and what is added up in a step: as `explain` says, and as it is."""
    torch._dynamo.reset()
    x = integers((2, 8, WIDTH), 2, 0).requires_grad_()
    plan = dict.fromkeys(["up", "gate", "plain"], "colwise") | {"down": "rowwise"}
    planned = falqon_fx.explain(make(), x, config=CONFIG, mesh=MeshPlan(tp=2, tp_plan=plan)).mesh
    assert planned is not None
    model = cut(make(), False)
    falqon_fx.prepare(model, CONFIG, progress=False)
    counted = Counted()

    def backend(gm: Any, inputs: Any) -> Any:
        run = falqon_backend(gm, inputs, options={"config": CONFIG})

        def counting(*given: Any) -> Any:
            with counted:  # Dynamo runs nothing compiled where it is on before
                return run(*given)

        return counting

    loss = torch.compile(model, backend=backend)(x).sum()
    with counted:
        loss.backward()
    held = sum(local(p).nbytes for p in model.parameters())
    said = {"held": planned.held, "summed": sum(t.bytes for t in planned.traffic)}
    return said, {"held": held, "summed": counted.summed}


@pytest.mark.slow
def test_every_way(tmp_path: Path):
    """The same for all of prepared or not, with sequence parallelism or not, Inductor, checkpoints,
    one scale for all of W, and A frozen.
    """
    for result in ranks.run(slow, 2, tmp_path, timeout=900):
        for name, run in result.items():
            _check(run, sequence="sequence" in name)


def slow() -> dict[str, Any]:
    found = {}
    for sequence, prepared in itertools.product((False, True), (False, True)):
        name = f"{'sequence, ' if sequence else ''}{'prepared' if prepared else 'as it is'}"
        ways: dict[str, tuple[FalqonConfig, dict[str, Any]]] = {
            "aot_eager": (CONFIG, {}),
            "inductor": (FalqonConfig(), {}),
            "checkpoint": (CONFIG, {"kind": Checkpointed}),
            "tensor scale": (FalqonConfig(inner="aot_eager", granularity="tensor"), {}),
            "frozen A": (CONFIG, {"train_a": False}),
        }
        for way, (config, options) in ways.items():
            run = _compared(config, sequence=sequence, prepared=prepared, **options)
            found[f"{name}, {way}"] = run
    return found


def _compared(config: FalqonConfig, *, sequence: bool, prepared: bool, **options: Any) -> Any:
    graphs: list[Any] = []
    step = together(config, sequence, prepared, graphs, **options)
    differs = step.differs(alone(config, prepared, **options))
    return differs, config.granularity, *_described(graphs)


def _check(run: Any, *, sequence: bool) -> None:
    differs, granularity, sites, rejected, counts = run
    assert differs == []
    assert (sites, rejected) == (ALL, [])
    # x enters once for the three that read it, and the output leaves once
    in_fp8 = sequence and granularity == "row"
    assert counts["gather_tokens"] == in_fp8
    assert counts["from_local"] == (1 if in_fp8 else 2)


@pytest.mark.slow
def test_context_and_pipeline_parallelism(tmp_path: Path):
    for result in ranks.run(others, 2, tmp_path):
        (why,) = result.pop("uneven")
        assert "even columns" in why
        assert result.pop("mixed dtypes") == ALL
        assert result == {"context": [], "pipeline": []}


def others() -> dict[str, list[str]]:
    return {
        "context": context.differs(CONFIG),
        "pipeline": pipeline.differs(CONFIG),
        "uneven": _uneven(),
        "mixed dtypes": _mixed_dtypes(),
    }


def _mixed_dtypes() -> list[str]:
    """The sites where the base is in bfloat16, the adapters are in float32, with dropout, and with
    sequence parallelism.
    """
    torch._dynamo.reset()
    graphs: list[Any] = []
    model = cut(make(dtype=torch.bfloat16, dropout=0.5), sequence=True)
    x = integers((2, 4, WIDTH), 2, 0).bfloat16().requires_grad_()
    compiled(model, CONFIG, graphs)(x).sum().backward()
    sites, rejected, counts = _described(graphs)
    assert rejected == []
    assert counts["gather_tokens"] == 0  # what is dropped is the gathered x, not its cast
    return sites


@pytest.mark.slow
def test_fsdp_over_tensor_parallel(tmp_path: Path):
    """Four processes, two and two: FSDP2 shards what tensor parallelism has cut. A gradient is that
    of one process that accumulates what both halves of the batch give, bit for bit, and the bytes
    are those that `explain` says.
    """
    for result in ranks.run(two_dimensions, 4, tmp_path, timeout=600):
        for sequence, (differs, sites, rejected, planned, held) in result.items():
            assert differs == [], sequence
            assert (sites, rejected) == (ALL, []), sequence
            assert planned == held, sequence


def two_dimensions() -> dict[bool, Any]:
    names = ("dp", "tp")
    over = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    return {sequence: _two_dimensions(over, sequence) for sequence in (False, True)}


def _two_dimensions(over: Any, sequence: bool) -> Any:
    torch._dynamo.reset()
    plan = dict.fromkeys(["up", "gate", "plain"], "colwise") | {"down": "rowwise"}
    planned = on_mesh(make(), MeshPlan(fsdp=2, tp=2, tp_plan=plan), CONFIG, [], None, lambda g: g)
    model, graphs = cut(make(), sequence, over["tp"]), list[Any]()
    falqon_fx.prepare(model, CONFIG, progress=False)

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(falqon_fx.rewrite(gm, inputs, CONFIG))
        return falqon_backend(gm, inputs, options={"config": CONFIG})

    model.compile(backend=backend)
    fully_shard(model, mesh=over["dp"])
    for call in (falqon_fx.CheckpointState, lambda m: falqon_fx.save_checkpoint(m, "none")):
        with pytest.raises(FalqonError, match="FSDP shards what tensor parallelism has cut"):
            call(model)
    held = sum(local(p).untyped_storage().nbytes() for p in model.parameters())
    xs, weights = integers((2, 8, WIDTH), 2, 100), integers((2, 8, WIDTH), 1, 101)
    half = over.get_local_rank("dp")
    given = [t[half : half + 1] for t in (xs, weights)]
    if sequence:
        given = [t.chunk(2, 1)[over.get_local_rank("tp")].clone() for t in given]
    (model(given[0].requires_grad_()) * given[1]).sum().backward()
    found = {name: whole(p.grad) for name, p in trained(model)}
    torch._dynamo.reset()
    falqon_fx.prepare(one := make(), CONFIG, progress=False)
    call = compiled(one, CONFIG)
    for x, weight in zip(xs.split(1), weights.split(1)):
        (call(x.clone().requires_grad_()) * weight).sum().backward()
    of_one = {name: p.grad / 2 for name, p in trained(one)}  # FSDP takes the mean
    differs = [name for name in of_one if not torch.equal(of_one[name], found[name])]
    sites, rejected, _ = _described(graphs)
    return differs, sites, rejected, planned.held, held


def _uneven() -> list[str]:
    """Why a layer is left whose columns two processes can't share evenly."""
    torch._dynamo.reset()
    layer, graphs = LoraLinear(WIDTH, 129), list[Any]()
    styles = {"base_layer": ColwiseParallel(), "lora_B": ColwiseParallel()}
    compiled(parallelize_module(layer, mesh(), styles), CONFIG, graphs)(integers((4, WIDTH), 2, 0))
    (report,) = graphs[0].report.graphs
    assert report.sites == ()
    return [rejected.reason for rejected in report.rejected]


def _described(graphs: list[Any]) -> tuple[list[str], list[str], Counter[str]]:
    (graph,) = graphs
    (report,) = graph.report.graphs
    graphs = [m.graph for m in graph.gm.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [node for of in graphs for node in of.nodes]
    names = (getattr(node.target, "__name__", str(node.target)) for node in nodes)
    counts = Counter(name.partition(".")[0] for name in names)
    paths = sorted(site.path.removesuffix(".base_layer") for site in report.sites)
    return paths, [str(r) for r in report.rejected], counts


def _error(run: Any) -> str:
    torch._dynamo.reset()
    with pytest.raises((FalqonError, torch._dynamo.exc.BackendCompilerFailed)) as caught:
        run()
    dist.barrier()  # no process is left behind in a call of its own
    return str(caught.value)


def _other_config() -> None:
    kind: Any = "e5m2" if dist.get_rank() == 0 else "e4m3"
    config = FalqonConfig(inner="aot_eager", grad_dtype=kind)
    compiled(cut(make(), False), config)(integers((2, 8, WIDTH), 2, 0))


def _mixed() -> None:
    """Only the second process has its weights back. (They ask one another once a config.)"""
    model, config = cut(make(), False), FalqonConfig(inner="aot_eager", siblings=False)
    falqon_fx.prepare(model, config, progress=False)
    if dist.get_rank() == 1:
        falqon_fx.restore(model)
    compiled(model, config)(integers((2, 8, WIDTH), 2, 0))


def _nan() -> None:
    """Only the second process has it."""
    model = cut(make(), False)
    if dist.get_rank() == 1:
        weight: Any = model.down.base_layer.weight
        weight.detach().to_local()[0, 0] = float("nan")
    falqon_fx.prepare(model, CONFIG, progress=False)


def _svd() -> None:
    falqon_fx.prepare(cut(make(), False), FalqonConfig(init="svd"), progress=False)
