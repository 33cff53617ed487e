"""Published checkpoints that are damaged: made of whole ones, and refused by `load` and by
`prequantize`, with nothing changed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError
from tests.folders import lora

Change = Callable[[dict[str, Tensor]], object]


def edit(folder: Path, change: Change) -> None:
    """Change the tensors of a checkpoint; new ones come into its last file."""
    files = {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    where = {name: file for file, own in files.items() for name in own}
    tensors = {name: tensor for own in files.values() for name, tensor in own.items()}
    change(tensors)
    where = {name: where.get(name, max(files)) for name in tensors}
    for file in files:
        own = {n: t.clone().contiguous() for n, t in tensors.items() if where[n] == file}
        save_file(own, file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        known = {name: file.name for name, file in where.items()}
        index.write_text(json.dumps({"weight_map": known}))


def damaged(source: Path, folder: Path, change: Change) -> Path:
    """A copy of a checkpoint with other tensors."""
    shutil.copytree(source, folder)
    edit(folder, change)
    return folder


def settings(
    folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json"
) -> Path:
    """Change the settings in a folder."""
    file = folder / name
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def put(name: str, change: Callable[[Tensor], Tensor], of: str | None = None) -> Change:
    """A tensor in the place of ``name``, made of that one or of ``of``."""
    return lambda tensors: tensors.update({name: change(tensors[of or name])})


def put_byte(name: str, value: int) -> Change:
    """One byte of the first element of a tensor, the only one where it is of bytes."""

    def change(tensor: Tensor) -> Tensor:
        own = tensor.clone()
        own.view(torch.uint8)[..., 0, 0] = value
        return own

    return put(name, change)


def put_first(name: str, value: float) -> Change:
    def change(tensor: Tensor) -> Tensor:
        own = tensor.clone()
        own.view(-1)[0] = value
        return own

    return put(name, change)


def lose(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def hashed(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_refused(
    folder: Path,
    site: str,
    told: str,
    *,
    lora: Callable[[], Any] = lora,
    config: FalqonConfig | None = None,
    in_codes: bool = False,
) -> None:
    """By `load` and by `prequantize`: the error names ``site`` and says ``told``, no file of the
    folder has changed, and none is beside it. What can be seen ``in_codes`` alone, `prequantize`
    sees as it casts: it keeps what was whole until then in ``out.partial``, as it says.
    """
    assert_load_refuses(folder, site, told, lora=lora, config=config)
    out = folder.with_name("out")
    partial = out.with_name("out.partial")
    _refused(
        lambda: falqon_fx.prequantize(folder, out, lora(), config, progress=False),
        *(folder, site, told, {partial} if in_codes else set()),
    )
    if in_codes:
        assert {path.name for path in partial.iterdir()} == {"plan.json", "weights", "records"}


def assert_load_refuses(
    folder: Path,
    site: str,
    told: str,
    *,
    lora: Callable[[], Any] = lora,
    config: FalqonConfig | None = None,
) -> None:
    """The same of `load` alone."""
    _refused(lambda: falqon_fx.load(folder, lora(), config), folder, site, told, set())


def _refused(
    way: Callable[[], object], folder: Path, site: str, told: str, kept: set[Path]
) -> None:
    before, beside = hashed(folder), {*folder.parent.iterdir()}
    with pytest.raises(FalqonError) as caught:
        way()
    error = caught.value
    assert re.search(site, error.site), error
    assert re.search(told, error.problem), error
    assert error.remedy, error
    assert "falqon_fx.load" not in error.remedy, error  # which refuses it, too
    assert hashed(folder) == before
    assert {*folder.parent.iterdir()} - beside == kept
