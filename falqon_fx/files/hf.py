"""A transformers folder: an empty model from its config, filled from its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon_fx.errors import FalqonError
from falqon_fx.files import storage
from falqon_fx.files.model_state import Site, make_layer, names_of
from falqon_fx.files.places import check_tied, in_own_dtype, lacks, places, tied_names
from falqon_fx.files.site_checks import check_site, check_values, ranks_around
from falqon_fx.files.stack_files import put_stacks, stack_size
from falqon_fx.model.lora_layers import is_linear

INDEX = "model.safetensors.index.json"
_NOT_LORA = "Load the model with transformers, and call falqon_fx.prepare(model)"


def fill(
    model: Any,
    layers: Mapping[str, tuple[Site, Mapping[str, Tensor]]],
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    verify: bool = True,
) -> nn.Module:
    """Give a model on the meta device its FP8 layers (`falqon_fx.files.model_state.make_layer`) and
    its other tensors, in the dtypes of transformers. New adapters start as PEFT starts them. Unless
    ``verify`` is False, FP8 bytes are looked at for NaN.

    Raises:
        FalqonError: a tensor without a place or of another shape, a place without a tensor, or FP8
            weights that are no numbers.
    """
    for path, (site, found) in layers.items():
        size = _size(model, path, site, where)
        check_site(path, site, found, size, where, ranks_around(model, path))
        if verify:
            check_values(path, found, where)
    own = {f"{path}.{name}" for path, (site, _) in layers.items() for name in names_of(site)}
    tied = tied_names(model)
    cast = {f"{path}.weight" for path in layers}
    for path, (site, found) in put_stacks(model, layers).items():
        bias = model.get_submodule(path).bias
        model.set_submodule(path, make_layer(site, found, bias, path))
    named = places(model, own, tensors, where)
    check_tied(tied, cast, named, where)
    named = in_own_dtype(model, named, {site["dtype"] for site, _ in layers.values()})
    model.load_state_dict(named, strict=False, assign=True)
    try:
        model.get_base_model().tie_weights()
    except ValueError as error:  # a pattern that PEFT's names don't fit (Zamba)
        raise FalqonError(
            where, f"transformers can't tie its weights: {error}", _NOT_LORA
        ) from error
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            fresh = _new_parameter(name, parameter.shape, where)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(fresh, parameter.requires_grad))
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            problem = f"the model needs it, {where} lacks it"
            raise FalqonError(name, problem, "Check config.json and adapter_config.json")
    loaded: nn.Module = model
    return loaded


def takes_decoded(module: Any) -> bool:
    """Whether a weight is of another module than a linear layer: an embedding, a router, a product
    in groups (DeepSeek V4's o_a_proj).
    """
    inside = getattr(module, "base_layer", module)  # of PEFT's wrapper
    return isinstance(getattr(inside, "weight", None), Tensor) and not is_linear(inside)


def _size(model: nn.Module, path: str, site: Site, where: str) -> tuple[int, int]:
    """[out, in] of the linear layer in whose place an FP8 one comes, or all rows of a stack."""
    if "experts" in site:
        return stack_size(model, path, site, where)
    try:
        module: Any = model.get_submodule(path)
    except AttributeError as error:
        problem = f"{where} has FP8 weights for it, the model no such layer"
        raise FalqonError(path, problem, "Check config.json") from error
    if not is_linear(module):
        kind = type(module).__name__
        problem = f"{where} has FP8 weights for it, the model a {kind}"
        raise FalqonError(path, problem, "Leave it dense: call falqon_fx.prequantize on the model")
    turned = type(module) is not nn.Linear
    if turned is not site["transposed"]:
        problem = f"{where} has FP8 weights [out, in] for it, the model a {type(module).__name__}"
        raise FalqonError(path, problem, "Give the dense checkpoint to falqon_fx.prequantize")
    first, second = module.weight.shape
    return (second, first) if turned else (first, second)


def _new_parameter(name: str, shape: torch.Size, where: str) -> Tensor:
    """A parameter of a new adapter, as PEFT starts it."""
    starts: dict[str, Callable[[torch.Size], Tensor]] = {
        "lora_A": new_lora_a,
        "lora_B": torch.zeros,
        "lora_embedding_A": torch.zeros,
        "lora_embedding_B": torch.randn,
    }
    known = [start for part, start in starts.items() if part in name.split(".")]
    if known:
        return known[0](shape)
    if ".lora_" in name:  # such as DoRA's magnitude, the norm of each row of the weight
        raise FalqonError(
            name,
            "it starts from the dense weight, which is not loaded",
            _NOT_LORA,
        )
    raise lacks(name, where)


def quantization_config(source: Path) -> Mapping[str, Any]:
    """What config.json says of how the weights were quantized, perhaps of the text model alone;
    empty for dense ones. DeepSeek V4 has the ``expert_dtype`` beside it, V4.1 in it.
    """
    file = source / "config.json"
    content = storage.read_json(file)
    storage.check_form(file, content, "config")
    of_text = (content.get("text_config") or {}).get("quantization_config")
    settings = content.get("quantization_config") or of_text or {}
    beside = {"expert_dtype": content["expert_dtype"]} if "expert_dtype" in content else {}
    return {**beside, **settings} if settings else {}


def read_index(source: Path) -> dict[str, str]:
    """The file that holds each tensor of a checkpoint, inside its folder.

    Raises:
        FalqonError: no checkpoint, an index that is damaged or names files outside, or a tensor
            that two files hold.
    """
    if not (source / "config.json").is_file():
        raise FalqonError(str(source), "there is no config.json in it", "Name a model's folder")
    if (source / INDEX).is_file():
        content = storage.read_json(source / INDEX)
        storage.check_form(source / INDEX, content, "index")
        weight_map: dict[str, str] = content["weight_map"]
        storage.check_names(source / INDEX, weight_map.values())
        return weight_map
    index: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name in storage.read_header(file):
            if name in index:
                raise FalqonError(
                    name,
                    f"{index[name]} and {file.name} both hold it, and {source} has no {INDEX}",
                    "Remove the file that doesn't belong to the model",
                )
            index[name] = file.name
    if not index:
        raise FalqonError(
            str(source),
            "there are no safetensors in it",
            "Save the model with model.save_pretrained(folder) first",
        )
    return index


def read_entries(source: Path, index: Mapping[str, str]) -> dict[str, Any]:
    """What the header of its file says of each tensor of an index.

    Raises:
        FalqonError: a file that is missing, or that lacks a tensor.
    """
    entries: dict[str, Any] = {}
    for file in sorted(set(index.values())):
        if not (source / file).is_file():
            raise FalqonError(str(source), f"{INDEX} names {file}, which is missing", "Fetch it")
        found = storage.read_header(source / file).items()
        entries |= {name: entry for name, entry in found if index.get(name) == file}
    for name in index.keys() - entries.keys():
        raise FalqonError(name, f"{INDEX} says that {index[name]} holds it", "Fetch both again")
    return entries


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, read and not mapped, so that its memory is given back with it."""
    from safetensors import safe_open

    with (
        storage.file_errors_explained(file),
        safe_open(file, framework="pt", backend="pread") as opened,
    ):
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def lora_config(lora: Any, **given: Any) -> Any:
    """The given adapter config, or a new one: rank 16 on all linear layers, where nothing else is
    ``given``.

    Raises:
        FalqonError: one that starts otherwise than with Kaiming's A and a B of zeros, or that
            trains rows of an embedding.
    """
    peft = storage.require("peft", "peft")
    defaults = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = lora or peft.LoraConfig(**{**defaults, **given})
    start = getattr(config, "init_lora_weights", True)
    if start not in (True, "eva"):  # which comes after loading
        problem = f"{start!r} is not how adapters start that are made while files are read"
        raise FalqonError("init_lora_weights", problem, f"Leave it out. {_NOT_LORA}")
    if getattr(config, "trainable_token_indices", None):
        problem = "its rows are copied from an embedding, which is not read yet"
        raise FalqonError("trainable_token_indices", problem, _NOT_LORA)
    return config


def adapter_config(source: Path) -> Any:
    """PEFT's config of the adapter in a folder.

    Raises:
        FalqonError: there is none, or one that PEFT or we can't take.
    """
    peft, file = storage.require("peft", "export"), source / "adapter_config.json"
    storage.read_json(file)  # which says what is wrong with it
    with _others_errors_explained(file, "PEFT can't read it", "Call falqon_fx.prequantize again"):
        config = peft.LoraConfig.from_pretrained(source)
    if not isinstance(config, peft.LoraConfig) or config.layer_replication:
        raise FalqonError(str(file), "it is not of a LoRA on the model's own layers", _NOT_LORA)
    if config.megatron_config:  # PEFT would import the module that the file names
        raise FalqonError(str(file), "it is of Megatron's layers", _NOT_LORA)
    return config


def empty_model(source: Path, lora: Any, tensors: int | None = None) -> Any:
    """A PEFT model of a folder's config whose parameters are on the meta device. A config of more
    layers than the folder has ``tensors`` is refused before they are made.

    Raises:
        FalqonError: a config that is damaged, or that transformers or PEFT can't take.
    """
    peft = storage.require("peft", "export")
    transformers = storage.require("transformers", "export")
    accelerate = storage.require("accelerate", "export")
    file = source / "config.json"
    storage.read_json(file)  # which says what is wrong with it
    problem = "transformers can't make its model"
    with _others_errors_explained(file, problem, "Load the folder with transformers to see why"):
        # What the folder brings as code is not run: load such a model with transformers.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_sizes(file, config, source, tensors)
        for part in (config, config.get_text_config()):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        with accelerate.init_empty_weights(include_buffers=False):
            auto = transformers.AutoModelForCausalLM
            model = auto.from_config(config, dtype=config.dtype, trust_remote_code=False)
        model.tie_weights()  # which making them empty has untied
        model.config._name_or_path = str(source)
    generation = source / "generation_config.json"
    if transformers.GenerationConfig and generation.is_file():
        storage.read_json(generation)
        with _others_errors_explained(generation, "transformers can't read it", "Remove it"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    problem = "PEFT can't put its adapter on the model"
    with _others_errors_explained(source, problem, "Check the LoraConfig"):
        return peft.get_peft_model(model.eval(), lora, low_cpu_mem_usage=True)


def _check_sizes(file: Path, config: Any, source: Path, tensors: int | None) -> None:
    """Refuse a number of layers that would take forever, or a width that no file here can hold:
    buffers are made at once.
    """
    most = {"num_hidden_layers": tensors} if tensors is not None else {}
    bytes_of_files = sum(path.stat().st_size for path in source.rglob("*.safetensors"))
    most |= dict.fromkeys(("hidden_size", "head_dim", "num_attention_heads"), bytes_of_files)
    for part in (config, config.get_text_config()):
        for name, limit in most.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and value > limit:
                problem = f"it says {name}={value}, more than the folder's tensors can be of"
                raise FalqonError(str(file), problem, "Fetch the folder again")


@contextmanager
def _others_errors_explained(file: Path, problem: str, remedy: str) -> Iterator[None]:
    """Say which file it is that another library didn't take, whatever that raises."""
    try:
        yield
    except FalqonError:
        raise
    except Exception as error:
        text = f"{problem} ({type(error).__name__}: {error})"
        raise FalqonError(str(file), text, remedy) from error


def new_lora_a(shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """A as PEFT starts it, float32 [r, in]."""
    new = torch.empty(*shape, dtype=torch.float32)
    return nn.init.kaiming_uniform_(new, a=5**0.5, generator=generator)
