"""Damaged files are refused by their name."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import falqon_fx
from falqon_fx.errors import FalqonError
from falqon_fx.files import manifests, seals, storage
from falqon_fx.files.checkpoint import MANIFEST
from falqon_fx.files.storage import DamagedFileError, read_header
from tests import fresh
from tests.models import fill_b, tiny_mlp


def saved(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_mlp()
    fill_b(model, 0.1)
    falqon_fx.prepare(model, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    falqon_fx.save_checkpoint(model, folder, optimizer=optimizer, extra={"t": torch.ones(3)})
    return model


def refused(folder: Path, model: nn.Module) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DamagedFileError) as caught:
        falqon_fx.load_checkpoint(model, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("which", ["tensors", "checkpoint"])
def test_every_flipped_bit_is_found(tmp_path, which):
    """In the headers, the padding, the data and the manifest alike, and the file is named."""
    model = saved(tmp_path)
    (file,) = tmp_path.glob(f"{which}*")
    whole, chance = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little") if which != "checkpoint" else 300
    places = [*range(8), *(chance.randrange(header) for _ in range(40))]
    places += [chance.randrange(len(whole)) for _ in range(40)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << chance.randrange(8)
        file.write_bytes(changed)
        assert file.name in refused(tmp_path, model)
    file.write_bytes(whole)
    falqon_fx.load_checkpoint(model, tmp_path)


def test_a_flipped_bit_names_the_tensor(tmp_path):
    model = saved(tmp_path)
    (file,) = tmp_path.glob("tensors-*")
    whole = bytearray(file.read_bytes())
    start = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + start])
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        changed = bytearray(whole)
        changed[8 + start + entry["data_offsets"][0]] ^= 1
        file.write_bytes(changed)
        assert f"the checksum of tensor {name!r} is wrong" in refused(tmp_path, model)


@pytest.mark.parametrize("which", ["tensors", "checkpoint"])
def test_a_truncated_file_is_refused(tmp_path, which):
    model = saved(tmp_path)
    (file,) = tmp_path.glob(f"{which}*")
    whole = file.read_bytes()
    for length in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert file.name in refused(tmp_path, model)
    file.write_bytes(whole + b"\0")
    assert file.name in refused(tmp_path, model)


def test_a_missing_file_is_refused(tmp_path):
    model = saved(tmp_path)
    (file,) = tmp_path.glob("tensors-*")
    file.unlink()
    assert "it is missing" in refused(tmp_path, model)


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    model = saved(tmp_path / "a")
    falqon_fx.save_checkpoint(model, tmp_path / "a")
    fill_b(model, 0.2, seed=1)
    falqon_fx.save_checkpoint(model, tmp_path / "b")
    (ours,), (other,) = ((tmp_path / n).glob("tensors-*") for n in "ab")
    shutil.copyfile(other, ours)
    assert "lora_B" in refused(tmp_path / "a", model)


def test_a_foreign_file_is_refused(tmp_path):
    model = saved(tmp_path)
    (file,) = tmp_path.glob("tensors-*")
    torch.save({"a": torch.ones(2)}, file)  # a pickle
    assert "instead of" in refused(tmp_path, model)
    file = tmp_path / MANIFEST
    file.write_text('{"weight_map": {}}')
    assert "its format is not" in refused(tmp_path, model)
    file.write_bytes(b"\x80\x04N.")
    assert "not valid JSON" in refused(tmp_path, model)


@pytest.mark.parametrize("start", [(1 << 63) - 1, 1 << 40, 100_000_001])
def test_a_header_that_would_be_huge_is_not_read(tmp_path, start):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(start.to_bytes(8, "little"))
        opened.truncate(1 << 36)  # a hole, which takes no space; reading it would take the memory
    with pytest.raises(DamagedFileError, match="its header would have"):
        read_header(file)


@pytest.mark.parametrize("header", [b"{", b"[1]", b"\xff\xfe"])
def test_a_header_that_is_no_description_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedFileError, match="header is n"):
        read_header(file)


def with_header(path: Path, entries: dict[str, Any], data: bytes) -> None:
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def entry(first: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - first], "data_offsets": [first, end]}


@pytest.mark.parametrize("second", [(0, 8), (4, 12), (9, 16)], ids=["same", "overlap", "hole"])
def test_tensors_that_do_not_lie_one_after_the_other_are_refused(tmp_path, second):
    """As safetensors refuses them: two would change together."""
    file = tmp_path / "a.safetensors"
    with_header(file, {"b": entry(*second), "a": entry(0, 8)}, bytes(16))
    with pytest.raises(SafetensorError):
        load_file(file)
    with pytest.raises(DamagedFileError, match=r"lies at .*, and the one before ends at"):
        read_header(file)


def test_a_tensor_that_does_not_lie_at_a_multiple_of_its_size_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    described = storage.write_tensors(file, {"a": torch.ones(2)})
    header = read_header(file)
    for length in range(2, 10):  # the start of the data is counted, too
        text = json.dumps(header).encode().ljust(100 + length)
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        a = {**described["tensors"]["a"], "xxh3": storage.checksum(bytes(8))}
        expected = {"bytes": file.stat().st_size, "tensors": {"a": a}}
        expected["header"] = storage.checksum(file.read_bytes()[:-8])
        if (8 + 100 + length) % 4 == 0:
            assert not storage.open_tensors(file, expected)["a"].any()
            continue
        with pytest.raises(DamagedFileError, match="no dtype that can lie there"):
            storage.open_tensors(file, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "complex128"},
        {"dtype": "nn"},
        {"dtype": "quint8"},
        {"shape": [0, 2**62, 2**62]},
        {"shape": [2**32, 2**32]},
        {"shape": [1] * 65},
    ],
    ids=str,
)
def test_a_described_tensor_of_no_dtype_or_size_is_refused(change):
    known = {"bytes": 8, "header": "", "tensors": {"a": {"dtype": "float32", "shape": [2]}}}
    known["tensors"]["a"] |= {"xxh3": ""}
    content = {"format": "", "files": {"f": known}, "same": {}, "sites": [], "objects": {}}
    assert manifests.problem(content, "checkpoint") is None
    known["tensors"]["a"] |= change
    assert "files.f.tensors.a" in str(manifests.problem(content, "checkpoint"))


def test_every_dtype_that_the_format_has_can_be_described(tmp_path):
    for dtype in _torch_dtypes():
        tensors = {"x": torch.zeros(2, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)}
        try:
            described = storage.write_tensors(tmp_path / "a", tensors)
        except FalqonError:
            assert str(dtype).removeprefix("torch.") not in get_args(manifests.TensorDtype)
            continue
        content = {"source": {}, "described": described}
        assert manifests.problem(content, "record") is None, dtype
        found = storage.open_tensors(tmp_path / "a", described)["x"]
        assert torch.equal(found.view(torch.uint8), tensors["x"].view(torch.uint8))


def _torch_dtypes() -> list[torch.dtype]:
    found = {d for d in vars(torch).values() if isinstance(d, torch.dtype)}
    bits = re.compile(r"torch\.(q|bits|u?int[1-7]$)")  # what holds no tensors of its own
    return sorted((d for d in found if not bits.match(str(d))), key=str)


def test_a_pipe_is_no_file_of_tensors(tmp_path):
    """To open one would wait for ever."""
    os.mkfifo(tmp_path / "model.safetensors")
    code = f"""
from pathlib import Path
from falqon_fx.files import manifests, seals, storage
storage.read_header(Path({str(tmp_path / "model.safetensors")!r}))
"""
    ran = fresh.run(code)
    assert "it is missing" in ran.stderr


@pytest.mark.parametrize("kind", ["pipe", "hole"])
def test_a_manifest_that_is_none_is_not_read(tmp_path, kind):
    """A pipe would wait for ever, and a large file take all memory."""
    calls = {
        MANIFEST: "falqon_fx.save_checkpoint(torch.nn.Linear(2, 2), folder)",
        seals.MANIFEST: "print(seals.is_export(folder))",
    }
    for name, call in calls.items():
        if kind == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).touch()
            os.truncate(tmp_path / name, 2**36)
        code = f"""
import resource, torch, falqon_fx
from pathlib import Path
from falqon_fx.files import seals
resource.setrlimit(resource.RLIMIT_AS, (2**35, 2**35))
folder = Path({str(tmp_path)!r})
{call}
"""
        ran = fresh.run(code)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / MANIFEST).stat().st_size < 2**20


@pytest.mark.parametrize("size", [3000, 2**19])  # 12 KB read, 2 MiB mapped
def test_small_files_are_read_and_large_ones_mapped(tmp_path, size):
    path = tmp_path / "a.safetensors"
    expected = storage.write_tensors(path, {"x": torch.arange(size, dtype=torch.int32)})
    x = storage.open_tensors(path, expected)["x"]
    assert torch.equal(x, torch.arange(size, dtype=torch.int32))
    mapped = str(path) in Path("/proc/self/maps").read_text()
    assert mapped == (size == 2**19)
    if not mapped:
        os.truncate(path, 0)
        assert torch.equal(x, torch.arange(size, dtype=torch.int32))


def test_loading_never_unpickles(tmp_path, monkeypatch):
    import pickle

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    model = saved(tmp_path)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    falqon_fx.load_checkpoint(model, tmp_path)
