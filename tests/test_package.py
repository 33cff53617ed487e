from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import torch

import falqon_fx

PUBLIC = {
    "Adapter",
    "Audit",
    "FalqonConfigError",
    "FalqonError",
    "GraphReport",
    "falqon",
    "watch",
    "save_fp8",
    "save_checkpoint",
    "prequantize",
    "merge_and_unload",
    "load_checkpoint",
    "load",
    "PrequantizeReport",
    "ExportReport",
    "CheckpointState",
    "CheckpointReport",
    "FalqonConfig",
    "MergedAdapter",
    "PrepareReport",
    "Rejected",
    "RewriteReport",
    "RewriteResult",
    "Site",
    "adapters",
    "explain",
    "flush",
    "prepare",
    "restore",
    "rewrite",
}


def run(code: str, cwd: Path) -> str:
    """What a fresh process prints that does not stand in the source folder."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name(name):
    assert hasattr(falqon_fx, name)
    assert name in falqon_fx.__all__


def test_all_names_exist():
    assert len(set(falqon_fx.__all__)) == len(falqon_fx.__all__)
    missing = [name for name in falqon_fx.__all__ if not hasattr(falqon_fx, name)]
    assert missing == []


def test_entry_point_is_registered_once():
    found = [e for e in entry_points(group="torch_dynamo_backends") if e.name == "falqon"]
    assert [e.value for e in found] == ["falqon_fx.backend:falqon"]
    assert callable(found[0].load())


def test_dynamo_knows_the_backend():
    assert "falqon" in torch._dynamo.list_backends()


def test_dynamo_finds_the_backend_without_an_import(tmp_path):
    """The name alone is enough: the user never imports falqon_fx."""
    code = """
import sys, torch
assert "falqon_fx" not in sys.modules
from torch._dynamo.backends.registry import lookup_backend
print(lookup_backend("falqon").__module__)
"""
    assert run(code, tmp_path) == "falqon_fx.backend"


def test_importing_before_the_lookup_registers_nothing_twice(tmp_path):
    code = """
import torch, falqon_fx, falqon_fx.backend
from torch._dynamo.backends.registry import lookup_backend
same = lookup_backend("falqon") is falqon_fx.backend.falqon
print(same, torch._dynamo.list_backends().count("falqon"))
"""
    assert run(code, tmp_path) == "True 1"


@pytest.mark.parametrize("name", ["falqon_fx.passes", "falqon_fx.kernels"])
def test_mapped_packages_import_from_anywhere(name, tmp_path):
    folder = name.rpartition(".")[2]
    printed = run(f"import {name} as m; print(m.__file__)", tmp_path)
    assert Path(printed).samefile(import_module(name).__file__)
    assert Path(printed).parent.name == folder


def test_templates_ship_beside_the_code():
    kernels = Path(import_module("falqon_fx.kernels").__file__).parent
    assert len(list(kernels.rglob("*.jinja"))) == 7
    assert (Path(import_module("falqon_fx.report").__file__).parent / "report.html.jinja").exists()


def test_kernels_import_without_triton(tmp_path):
    """Specs and rendering work where Triton is not installed; only running a kernel needs it."""
    code = """
import sys
sys.modules["triton"] = None
import falqon_fx.kernels
print("imported")
"""
    assert run(code, tmp_path) == "imported"


def test_package_is_typed():
    assert (Path(falqon_fx.__file__).parent / "py.typed").exists()


def test_version_is_the_installed_one():
    assert falqon_fx.__version__ == version("falqon-fx")
