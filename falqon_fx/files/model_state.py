"""What the next step of a model depends on, as sites and named tensors; and back into a model.

A site is one FP8 weight, described by plain data:

- ``prepared``: the path of a layer that `prepare` made, whose tensors are the model's own;
- ``weight``: the name of a base weight whose FP8 form compiled code keeps beside it. It is the same
  for whoever has the base model, so only what tells it from others is kept;
- ``state`` (update="rows"): the same with the state that was trained beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx._compat import is_dtensor
from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.copies import copy_tensors
from falqon_fx.files.site_checks import check_site, check_values, described, ranks_around
from falqon_fx.model.fp8_linear import Fp8Linear, made_terms
from falqon_fx.model.lora_layers import is_linear
from falqon_fx.model.prepare import BEFORE
from falqon_fx.model.prepared_linear import PreparedLinear
from falqon_fx.model.stacks import Fp8Stack
from falqon_fx.model.terms import check_terms
from falqon_fx.rows.prepared import MergedBaseLinear
from falqon_fx.rows.state import STATE, MergedAdapter, registry
from falqon_fx.site import transposed as stored
from falqon_fx.site.base import Base, bases, digest
from falqon_fx.site.looks import sample
from falqon_fx.site.numerics import as_scale, dtype_name
from falqon_fx.site.nvfp4 import shape_of
from falqon_fx.site.paths import without_wrappers
from falqon_fx.site.sharded import whole
from falqon_fx.site.spec import RowsSpec, SiteSpec, parse_spec

SITES = ".sites."  # before the names of states outside modules; no path begins with a dot
# What a layer has of its own, prepared in either way or not.
_OWN = {"weight", *Fp8Linear.STATE, *Fp8Linear.TERMS, *MergedBaseLinear.STATE}
_REMEDY = "Make the model as for the run that was saved: same base, same adapter config"
_RESTORE = "Call falqon_fx.restore(model) first"

Site = dict[str, Any]


def snapshot(model: nn.Module) -> tuple[list[Site], list[tuple[str, Tensor]]]:
    """The sites of a model, and every named tensor that its next step depends on.

    Raises:
        FalqonError: the bytes of a prepared layer are no longer those that `prepare` made.
    """
    sites: list[Site] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Fp8Linear):
            module.base()  # looks at the bytes
        if isinstance(module, PreparedLinear):
            sites.append({"prepared": without_wrappers(path), **describe(module)})
    states: list[tuple[str, Tensor]] = []
    for site, state in _rows_states(model):
        prefix = f"{SITES}{len(sites)}."
        sites.append({"state": prefix, **site})
        states += [(prefix + name, tensor) for name, tensor in state.stored.items()]
    left_out = {site["weight"] for site in sites if "weight" in site}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = without_wrappers(path)
        made = [] if parameter.requires_grad else bases.of(parameter)
        if made and name not in left_out:
            of_bytes = [digest(base.code, base.scale).tolist() for base in made]
            sites.append({**_known_by(name, parameter), "bases": of_bytes})
            left_out.add(name)
    named = [(name, t) for name, t in _tensors_of(model).items() if name not in left_out]
    return sites, named + states


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by name. Where tensor parallelism has cut W, its digest is that of all of
    W, as any number of processes can compare it. The terms of a calibration are in the dtype that
    they were made in.
    """
    whole_digests = {name: layer.whole_digest() for name, layer in _cut(model).items()}
    return {**model.state_dict(), **whole_digests, **made_terms(model)}


def _cut(model: nn.Module) -> dict[str, Fp8Linear]:
    """The layers of which tensor parallelism has cut W, by the names of their digests."""
    return {
        f"{without_wrappers(path)}.digest": module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Fp8Linear) and module.is_part()
    }


def describe(layer: PreparedLinear) -> Site:
    """What `make_layer` needs to know of a layer beside its tensors."""
    spec = asdict(parse_spec(layer.spec_text))
    site = {"dtype": dtype_name(layer.dtype), "transposed": layer.transposed, "spec": spec}
    if isinstance(layer, MergedBaseLinear):
        return {**site, "scaling": layer.scaling}
    terms = [*layer.terms] if isinstance(layer, Fp8Linear) else []
    return {**site, "terms": terms} if terms else site


def names_of(site: Site) -> tuple[str, ...]:
    """The names of a prepared layer's tensors."""
    return STATE if "scaling" in site else (*Fp8Linear.STATE, *site.get("terms", ()))


def make_layer(
    site: Site, tensors: Mapping[str, Tensor], bias: nn.Parameter | None, path: str
) -> PreparedLinear:
    """The layer that `describe` described, around tensors by the names `names_of` gives."""
    dtype, transposed = getattr(torch, site["dtype"]), site["transposed"]
    path = path.removesuffix(".base_layer")
    if "scaling" in site:
        return MergedBaseLinear(_state(site, tensors), bias, dtype, transposed, path)
    nothing = Base(tensors["code"].to("meta"), as_scale(tensors["scale"].to("meta")))
    given = (dtype, transposed, str(SiteSpec(**site["spec"])), path)
    layer = (
        Fp8Stack(nothing, site["experts"], *given)
        if "experts" in site
        else Fp8Linear(nothing, bias, *given)
    )
    for name in layer.STATE:  # the bytes are not read, as the digest of a given base would have to
        setattr(layer, name, nn.Parameter(tensors[name], requires_grad=False))
    layer.set_terms({name: tensors[name] for name in site.get("terms", ())})
    return layer


def _state(site: Site, tensors: Mapping[str, Tensor]) -> MergedAdapter:
    own = {name: tensors[name] for name in STATE}
    state = MergedAdapter(**own, scaling=site["scaling"], spec=RowsSpec(**site["spec"]))
    state.transposed = site["transposed"]
    return state


def _rows_states(model: nn.Module) -> Iterator[tuple[Site, MergedAdapter]]:
    """The states of update="rows" outside of modules."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    for state, (base, lora_a, lora_b) in registry.within(model.parameters(), names):
        known = _known_by(base, model.get_parameter(base))
        site = {"lora_a": lora_a, "lora_b": lora_b, "transposed": state.transposed}
        yield {**known, **site, "scaling": state.scaling, "spec": asdict(state.spec)}, state


def _known_by(name: str, weight: Tensor) -> Site:
    """What tells a base weight from another: dtype, shape and a sample of its contents."""
    return {
        "weight": name,
        "is": described(weight),
        "contents": storage.digest(sample(whole(weight).detach())),
    }


# -- back into a model -----------------------------------------------------------------------------


def check(model: nn.Module, sites: list[Site], tensors: Mapping[str, Tensor], where: str) -> None:
    """Look whether tensors and sites fit a model, which isn't changed.

    Raises:
        FalqonError: they don't.
    """
    expected = {n: described(t) for n, t in model.state_dict().items()}
    saved = {n: described(t) for n, t in tensors.items()}
    for site in sites:
        ours: list[str] = []  # what is compared here, and not by name and shape
        theirs = [site["state"] + name for name in STATE] if "state" in site else []
        if "prepared" in site:
            _check_layer(model, site, tensors, where)
            ours = theirs = [f"{site['prepared']}.{name}" for name in _OWN]
        if "state" in site:
            _check_state(model, site, tensors, where)
        if "weight" in site and site["weight"] not in tensors:  # else all base weights are in it
            _check_weight(model, site, where)
            path = site["weight"].rpartition(".")[0]
            ours = [site["weight"], *(f"{path}.{name}" for name in _OWN)]
        for names, done in ((expected, ours), (saved, theirs)):
            for name in done:
                names.pop(name, None)
    for name in sorted(expected.keys() | saved.keys()):
        if name not in saved:
            raise FalqonError(name, f"it is in the model but not in {where}", _REMEDY)
        if name not in expected:
            raise FalqonError(name, f"it is in {where} but not in the model", _REMEDY)
        if saved[name] != expected[name]:
            raise FalqonError(
                name, f"{where} has {saved[name]}, the model {expected[name]}", _REMEDY
            )


def _check_layer(model: nn.Module, site: Site, tensors: Mapping[str, Tensor], where: str) -> None:
    """The model must have a layer of the saved dtype and shape, prepared in the same way or not."""
    path, transposed = site["prepared"], site["transposed"]
    module = _module(model, path, where)
    if isinstance(module, PreparedLinear):
        _check_kind(path, module, "scaling" in site, where)
        size, dtype = (module.out_features, module.in_features), module.dtype
        ranks = {module.rank} if isinstance(module, MergedBaseLinear) else set()
    else:
        weight = getattr(module, "weight", None)
        if not is_linear(module) or not isinstance(weight, Tensor):
            kind = type(module).__name__
            raise FalqonError(path, f"{where} has an FP8 layer there, the model a {kind}", _REMEDY)
        first, second = weight.shape
        if is_dtensor(weight):
            problem = f"{where} has an FP8 layer there, the model a sharded one that is none"
            raise FalqonError(path, problem, BEFORE)
        size, dtype = (second, first) if transposed else (first, second), weight.dtype
        ranks = ranks_around(model, path)
    own = {n: tensors[f"{path}.{n}"] for n in names_of(site) if f"{path}.{n}" in tensors}
    wanted, found = (site["dtype"], _size_of(own)), (dtype_name(dtype), [*size])
    if wanted != found:
        problem = f"{where} has {' '.join(map(str, wanted))}, the model {' '.join(map(str, found))}"
        raise FalqonError(path, problem, _REMEDY)
    check_site(path, site, own, size, where, ranks)
    check_values(path, own, where)
    terms = {name: own[name] for name in Fp8Linear.TERMS if name in own}
    if [*terms] != [*site.get("terms", ())]:
        problem = f"{where} has {[*terms]} of a calibration, and says {site.get('terms')}"
        raise FalqonError(path, problem, "Load another checkpoint, or write this one again")
    check_terms(path, terms, size, where, own["code"].dtype if terms else None)
    if isinstance(module, Fp8Linear) and module.is_part():  # it will get a digest of its part
        code, scale, known = (whole(own[name]) for name in Fp8Linear.STATE)
        if not torch.equal(digest(code, scale), known):
            problem = f"its bytes in {where} are not those that were saved"
            raise FalqonError(path, problem, "Load another checkpoint, or write this one again")


def _size_of(own: Mapping[str, Tensor]) -> list[int]:
    """[out, in] of a saved layer, as far as it has them; rows of A lie under those of W."""
    code, out = own.get("code"), own.get("applied", own.get("code"))
    rows = [] if out is None else out.shape[:1]
    return [*rows, *([] if code is None or code.dim() < 2 else shape_of(code)[1:])]


def _check_state(model: nn.Module, site: Site, tensors: Mapping[str, Tensor], where: str) -> None:
    """A state outside of modules must be of the shapes of its W, A and B in the model."""
    names = (site["weight"], site["lora_a"], site["lora_b"])
    module = _module(model, names[0].rpartition(".")[0], where)
    if isinstance(module, PreparedLinear):
        _check_kind(names[0], module, True, where)
        first, second = module.out_features, module.in_features
    else:
        first, second = _two(model, names[0], where)
        first, second = (second, first) if site["transposed"] else (first, second)
    (rank, features), (out, of_b) = (_two(model, name, where) for name in names[1:])
    if (features, out, of_b) != (second, first, rank):
        problem = f"{where} has {names[1]} and {names[2]} as its adapter, which don't fit it"
        raise FalqonError(names[0], problem, _REMEDY)
    prefix = site["state"]
    own = {n: tensors[prefix + n] for n in STATE if prefix + n in tensors}
    check_site(names[0], site, own, (out, features), where, {rank})
    check_values(names[0], own, where)
    if isinstance(module, MergedBaseLinear) and module.scale.shape != own["scale"].shape:
        problem = f"{where} has {described(own['scale'])} as its scale, the model another"
        raise FalqonError(names[0], problem, _RESTORE)


def _two(model: nn.Module, name: str, where: str) -> tuple[int, int]:
    """The shape of the parameter of that name, a matrix."""
    path, _, last = name.rpartition(".")
    found = getattr(_module(model, path, where), last, None)
    if not isinstance(found, nn.Parameter) or found.dim() != 2:
        raise FalqonError(name, f"{where} has a matrix there, the model none", _REMEDY)
    first, second = found.shape
    return first, second


def _check_kind(path: str, layer: PreparedLinear, rows: bool, where: str) -> None:
    if isinstance(layer, MergedBaseLinear) is not rows:
        kinds = ('update="rows"', 'update="adapter"')
        saved, ours = kinds if rows else kinds[::-1]
        problem = f"{where} is of training with {saved}, prepare() made it for {ours}"
        raise FalqonError(path, problem, _RESTORE)


def _check_weight(model: nn.Module, site: Site, where: str) -> None:
    """The base weight must be the one that was trained on, as it is or as `prepare` cast it."""
    path, _, last = site["weight"].rpartition(".")
    module = _module(model, path, where)
    if isinstance(module, PreparedLinear):
        _check_kind(path, module, "state" in site, where)
    if isinstance(module, MergedBaseLinear):
        return  # the saved state takes its place
    if isinstance(module, Fp8Linear):
        same = module.whole_digest().tolist() in site["bases"]
        remedy = "Prepare the same base model, with the config of the run that was saved"
    else:
        weight = getattr(module, last, None)
        if not isinstance(weight, Tensor):
            raise FalqonError(site["weight"], f"it is in {where} but not in the model", _REMEDY)
        known = _known_by(site["weight"], weight)
        if known["is"] != site["is"]:
            problem = f"{where} has {site['is']}, the model {known['is']}"
            raise FalqonError(site["weight"], problem, _REMEDY)
        same = known["contents"] == site["contents"]
        remedy = "Load the same base model, in the same dtype"
    if not same:
        problem = f"its contents are not those that {where} was trained on"
        raise FalqonError(site["weight"], problem, remedy)


def _module(model: nn.Module, path: str, where: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FalqonError(path, f"it is in {where} but not in the model", _REMEDY) from error


def write(model: nn.Module, sites: list[Site], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and sites, as `snapshot` gave them, into a model that they fit (`check`)."""
    for site in sites:
        if "prepared" in site:
            _prepare_layer(model, site, tensors)
    named, cut = dict(model.state_dict(keep_vars=True)), _cut(model)
    # These alone may have been cast to a wider dtype in the model since.
    terms = {f"{site['prepared']}.{n}" for site in sites for n in site.get("terms", ())}
    copy_tensors(
        (named[n], t.to(named[n].dtype) if n in terms else t)
        for n, t in tensors.items()
        if n in named and n not in cut
    )
    for layer in cut.values():
        layer.digest_anew()
    for parameter in model.parameters():
        registry.forget(parameter)
    for site in sites:
        if "state" in site:
            _adopt(model, site, tensors)
    stored.forget()


def _prepare_layer(model: nn.Module, site: Site, tensors: Mapping[str, Tensor]) -> None:
    """A prepared layer of the saved shapes at the site's path; contents follow."""
    path = site["prepared"]
    module: Any = model.get_submodule(path)
    given = {name: tensors[f"{path}.{name}"] for name in names_of(site)}
    if isinstance(module, PreparedLinear) and all(
        described(getattr(module, name)) == described(given[name])
        for name in module.STATE
        if name != "digest"  # of which each process has one, where tensor parallelism has cut W
    ):
        _take_options(module, site)
        if isinstance(module, Fp8Linear):
            module.have_terms({name: given[name] for name in site.get("terms", ())})
        return
    device = next(module.parameters()).device
    empty = {name: torch.empty_like(tensor, device=device) for name, tensor in given.items()}
    layer = make_layer(site, empty, module.bias, path).train(module.training)
    for parent in list(model.modules()):  # a module may be shared by several
        for name, child in list(parent.named_children()):
            if child is module:
                setattr(parent, name, layer)


def _take_options(layer: PreparedLinear, site: Site) -> None:
    if isinstance(layer, MergedBaseLinear):
        layer.spec_text, layer.scaling = str(RowsSpec(**site["spec"])), site["scaling"]
    else:
        layer.spec_text = str(SiteSpec(**site["spec"]))


def _adopt(model: nn.Module, site: Site, tensors: Mapping[str, Tensor]) -> None:
    path, _, name = site["weight"].rpartition(".")
    module: Any = model.get_submodule(path)
    if isinstance(module, MergedBaseLinear):  # prepared since
        _take_options(module, site)
        state = module.merged()
    else:
        device = getattr(module, name).device
        given = {key: tensors[site["state"] + key] for key in STATE}
        state = _state(site, {k: torch.empty_like(t, device=device) for k, t in given.items()})
    for key, target in state.stored.items():
        target.copy_(tensors[site["state"] + key])
    if not isinstance(module, MergedBaseLinear):
        a, b = model.get_parameter(site["lora_a"]), model.get_parameter(site["lora_b"])
        registry.adopt(state, getattr(module, name), a, b)
