"""`save_compiled` and `load_compiled`: with empty caches nothing is compiled anew, and what isn't
such a folder is refused.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.compiler._cache import CacheArtifactManager

import falqon_fx
from falqon_fx import FalqonError
from falqon_fx.files import compiled
from tests.models import LoraLinear, fill_b

CHOICES = "choices-0123456789abcdef.json"


def step() -> tuple[float, Counter[str]]:
    """One site, forward and backward, by Inductor; and the hits of torch's caches."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = LoraLinear(16, 24)
    fill_b(model)
    y = torch.compile(model, backend="falqon")(torch.randn(8, 16).requires_grad_())
    y.sum().backward()
    hits: Any = counters["inductor"] + counters["aot_autograd"]
    return y.double().sum().item(), hits


@pytest.mark.slow
def test_with_empty_caches_nothing_is_compiled_anew(tmp_path, monkeypatch):
    folder, cache = tmp_path / "compiled", tmp_path / "cache"
    monkeypatch.setenv("FALQON_CACHE", str(cache))
    with CacheArtifactManager.with_fresh_cache(), fresh_cache():
        first, _ = step()
        saved = falqon_fx.save_compiled(folder)
    # As if it were from a machine with a GPU; and a file that isn't the library's.
    (folder / CHOICES).write_text("{}")
    (folder / "choices-..json").write_text("{}")
    with CacheArtifactManager.with_fresh_cache(), fresh_cache():
        without, misses = step()
    with CacheArtifactManager.with_fresh_cache(), fresh_cache():
        loaded = falqon_fx.load_compiled(folder)
        again, hits = step()
    assert (misses["fxgraph_cache_hit"], misses["autograd_cache_hit"]) == (0, 0)
    assert (hits["fxgraph_cache_hit"], hits["autograd_cache_hit"]) == (2, 1)  # forward, backward
    assert first == without == again
    assert loaded == saved
    assert [path.name for path in cache.glob("choices-*")] == [CHOICES]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder as it is saved, with content that torch never gets to see."""
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "cache"))
    info = type("Info", (), {"artifacts": {"inductor": ["key"]}})()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", info))

    def never(content: bytes) -> None:
        raise AssertionError("it was handed to torch")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", never)
    report = falqon_fx.save_compiled(tmp_path / "saved")
    assert str(report) == f"{tmp_path / 'saved'}: 0.0 MiB, 1 of inductor"
    return tmp_path / "saved"


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "null", '{"format": 1}', "[" * 100_000])
def test_a_folder_that_is_none_is_refused(saved, manifest):
    (saved / "falqon.json").write_text(manifest)
    with pytest.raises(FalqonError, match="it isn't what save_compiled wrote"):
        falqon_fx.load_compiled(saved)


def test_damage_is_refused_before_torch_sees_it(saved):
    (saved / "artifacts.bin").write_bytes(b"cod")
    with pytest.raises(FalqonError, match="it isn't what save_compiled wrote"):
        falqon_fx.load_compiled(saved)


def test_other_versions_are_named(saved, monkeypatch):
    monkeypatch.setattr(compiled, "lowering_version", lambda: "0123456789ab")
    with pytest.raises(FalqonError, match=r"made by .*; here is .*lowering 0123456789ab"):
        falqon_fx.load_compiled(saved)


def test_a_folder_that_is_not_there_or_not_empty_is_named(saved, tmp_path):
    with pytest.raises(FalqonError, match="it can't be read"):
        falqon_fx.load_compiled(tmp_path / "nowhere")
    with pytest.raises(FalqonError, match="saved"):
        falqon_fx.save_compiled(saved)


def test_where_nothing_was_compiled_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    with pytest.raises(FalqonError, match="Inductor has compiled nothing"):
        falqon_fx.save_compiled(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
