"""What the next step of a model depends on, as sites and named tensors; and back into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx import storage, stored, update
from falqon_fx.errors import FalqonError
from falqon_fx.merged import STATE, MergedAdapter, allocate, registry
from falqon_fx.prepare import MergedBaseLinear, lora_path
from falqon_fx.spec import SiteSpec

SITES = ".sites."  # before the names of states outside modules; no path begins with a dot
_REMEDY = "Make the model as for the run that was saved: same base, same adapter config"


def collect(model: nn.Module) -> tuple[list[dict[str, Any]], list[tuple[str, Tensor]]]:
    """The sites of a model, and every named tensor that its next step depends on."""
    sites: list[dict[str, Any]] = []
    extra: list[tuple[str, Tensor]] = []
    for path, module in model.named_modules():
        if isinstance(module, MergedBaseLinear):
            dtype = str(module.dtype).removeprefix("torch.")
            known = {"prepared": path, "dtype": dtype, "transposed": module.transposed}
            sites.append({**known, **_describe(module.merged())})
    freed = set()
    for site, state in _unprepared(model):
        prefix = f"{SITES}{len(sites)}."
        sites.append({"state": prefix, **site, **_describe(state)})
        extra += [(prefix + n, t) for n, t in state.stored.items()]
        freed.add(site["base"])
    named = [(name, t) for name, t in model.state_dict().items() if name not in freed]
    return sites, named + extra


def _describe(state: MergedAdapter) -> dict[str, Any]:
    return {"scaling": state.scaling, "spec": asdict(state.plan)}


def _unprepared(model: nn.Module) -> Iterator[tuple[dict[str, Any], MergedAdapter]]:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for state, of_state in registry.within(model.parameters(), names):
        site = dict(zip(("base", "lora_a", "lora_b"), of_state, strict=True))
        yield {**site, "transposed": state.transposed}, state


def apply(
    model: nn.Module, sites: list[dict[str, Any]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Write tensors and sites, as `collect` gave them, into a model.

    Raises:
        FalqonError: they don't fit. Nothing has been changed then.
    """
    _check_names(model, sites, tensors, where)
    for site in sites:
        if "prepared" in site:
            _prepare_site(model, site, tensors)
    named = dict(model.state_dict(keep_vars=True))
    storage.copy_tensors((named[name], t) for name, t in tensors.items() if name in named)
    for parameter in model.parameters():
        registry.forget(parameter)
    for site in sites:
        if "state" in site:
            _adopt(model, site, tensors)
    stored.forget()


def _check_names(
    model: nn.Module, sites: list[dict[str, Any]], tensors: Mapping[str, Tensor], where: str
) -> None:
    expected = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    saved = {n: (t.shape, t.dtype) for n, t in tensors.items()}
    for site in sites:
        if "prepared" in site:
            path = site["prepared"]
            found = _layer(model, path, site["transposed"], where)
            out, features = tensors[f"{path}.applied"].shape[0], tensors[f"{path}.code"].shape[1]
            wanted = _shape(torch.Size((out, features)), getattr(torch, site["dtype"]))
            if found != wanted:
                raise FalqonError(path, f"{where} has {wanted}, the model {found}", _REMEDY)
            for name in ("weight", *STATE):
                expected.pop(f"{path}.{name}", None)
                saved.pop(f"{path}.{name}", None)
        else:
            for name in STATE:
                saved.pop(site["state"] + name)
            _check_base(model, site, tensors, where)
            path, base = site["base"].rpartition(".")[0], site["base"]
            known = () if base in tensors else (base,)
            for name in (*known, *(f"{path}.{name}" for name in STATE)):
                expected.pop(name, None)
    for name in sorted(expected.keys() | saved.keys()):
        if name not in saved:
            raise FalqonError(name, f"it is in the model but not in {where}", _REMEDY)
        if name not in expected:
            raise FalqonError(name, f"it is in {where} but not in the model", _REMEDY)
        if saved[name] != expected[name]:
            raise FalqonError(
                name,
                f"{where} has {_shape(*saved[name])}, the model {_shape(*expected[name])}",
                _REMEDY,
            )


def _shape(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _layer(model: nn.Module, path: str, transposed: bool, where: str) -> str:
    """Dtype and [out, in] of the linear layer at a path."""
    try:
        module: Any = model.get_submodule(path)
    except AttributeError as error:
        raise FalqonError(path, f"it is in {where} but not in the model", _REMEDY) from error
    if isinstance(module, MergedBaseLinear):
        return _shape(torch.Size((module.out_features, module.in_features)), module.dtype)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        kind = type(module).__name__
        raise FalqonError(path, f"{where} has an FP8 layer there, the model a {kind}", _REMEDY)
    return _shape(weight.t().shape if transposed else weight.shape, weight.dtype)


def _check_base(
    model: nn.Module, site: dict[str, Any], tensors: Mapping[str, Tensor], where: str
) -> None:
    """The base weight must be the one that was merged, whether the model brings it or the file."""
    path, _, name = site["base"].rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, MergedBaseLinear):
        return  # freed, so there is none to compare
    base = tensors.get(site["base"], getattr(module, name))
    base = base.t() if site["transposed"] else base
    out, rank = tensors[site["state"] + "applied"].shape
    stored = tensors[site["state"] + "counters"][update.FINGERPRINT_W]
    same = base.shape[0] == out and torch.equal(
        update.fingerprint(update.sample(base)[None])[0].cpu(), stored
    )
    if not same:
        raise FalqonError(
            site["base"],
            f"its contents are not those that {where} was trained on",
            "Load the same base model, in the same dtype",
        )


def _prepare_site(model: nn.Module, site: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """A prepared layer of the saved shapes at the site's path; contents follow."""
    path, plan = site["prepared"], SiteSpec(**site["spec"])
    module = model.get_submodule(path)
    shapes = [tensors[f"{path}.{name}"].shape for name in STATE]
    if isinstance(module, MergedBaseLinear) and shapes == [
        getattr(module, name).shape for name in STATE
    ]:
        module.spec, module.scaling = str(plan), site["scaling"]
        return
    state = _empty_state(site, tensors, f"{path}.", next(module.parameters()).device)
    bias: Any = module.bias
    dtype = getattr(torch, site["dtype"])
    merged = MergedBaseLinear(state, bias, dtype, site["transposed"], lora_path(path))
    model.set_submodule(path, merged.train(module.training))


def _empty_state(
    site: dict[str, Any], tensors: Mapping[str, Tensor], prefix: str, device: torch.device
) -> MergedAdapter:
    applied = tensors[prefix + "applied"]
    out, rank = applied.shape
    features, plan = tensors[prefix + "code"].shape[1], SiteSpec(**site["spec"])
    return allocate(out, features, rank, applied.dtype, site["scaling"], plan, device)


def _adopt(model: nn.Module, site: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    prefix = site["state"]
    path, _, name = site["base"].rpartition(".")
    module: Any = model.get_submodule(path)
    plan = SiteSpec(**site["spec"])
    if isinstance(module, MergedBaseLinear):  # prepared since
        module.spec, module.scaling = str(plan), site["scaling"]
        state = module.merged()
    else:
        base = getattr(module, name)
        state = _empty_state(site, tensors, prefix, base.device)
    for key, target in state.stored.items():
        target.copy_(tensors[prefix + key])
    if not isinstance(module, MergedBaseLinear):
        a, b = model.get_parameter(site["lora_a"]), model.get_parameter(site["lora_b"])
        state.transposed = site["transposed"]
        registry.adopt(state, base, a, b)
