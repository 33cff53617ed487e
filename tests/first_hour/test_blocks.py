"""Every block of Python in the README and in docs/ runs as it stands there; of docs/guides/ in
test_guides.py.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import falqon_fx
from falqon_fx import FalqonConfig
from tests.models import lora_b, tiny_llama
from tests.pages import DOCS, GUIDES, PAGES, ROOT, blocks, name_of
from tests.parameters import slow

SITES = 7  # of a layer of Llama: q, k, v, o, gate, up, down


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_readmes_first_block_is_the_quickstart():
    """Which `test_wheel.py` runs."""
    source = (ROOT / "examples" / "quickstart.py").read_text().split('"""\n\n', 1)[1]
    first = blocks(ROOT / "README.md")[0]
    written = [line for line in first.splitlines() if line]
    assert written == [line.replace("# %% ", "# ") for line in source.splitlines() if line]


def test_the_readmes_other_block_runs():
    names = given()
    (_, code) = blocks(ROOT / "README.md")
    exec(code, names)
    was_explained(names)


@pytest.mark.parametrize("inner", ["eager", slow("inductor")])
def test_the_loop_runs_from_nothing_to_a_saved_adapter(inner, tmp_path, capsys):
    (code,) = (code for code in blocks(DOCS / "trainers.md") if "for step in" in code)
    if inner != FalqonConfig().inner:
        call = 'compile(backend="falqon"'
        assert code.count(call) == 1
        code = code.replace(call, f"{call}, options={{'inner': {inner!r}}}")
    names: dict[str, Any] = {}
    exec(code, names)
    printed = re.findall(r"^(\d+) (\d+\.\d+)$", capsys.readouterr().out, re.MULTILINE)
    losses = [float(loss) for _, loss in printed]
    assert [int(step) for step, _ in printed] == list(range(20))
    assert losses == sorted(losses, reverse=True)
    assert len(falqon_fx.adapters(names["model"])) == 2 * SITES

    base = transformers.LlamaForCausalLM(names["base"].config)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    trained = [b.detach() for b in lora_b(names["model"])]
    assert all(b.any() for b in trained)
    assert all(map(torch.equal, [b.detach() for b in lora_b(loaded)], trained))


def given(layers: int = 1) -> dict[str, Any]:
    """What a block of docs/ may take as there."""
    ids, model = torch.randint(0, 64, (4, 10)), tiny_llama(layers=layers)
    return {
        "torch": torch,
        "falqon_fx": falqon_fx,
        "model": model,
        "base": transformers.LlamaForCausalLM(model.config),
        "tokenizer": lambda text, return_tensors: types.SimpleNamespace(input_ids=ids),
        "batch": {"input_ids": ids, "labels": ids},
        "data": [{"input_ids": row, "labels": row} for row in ids],
        "config": FalqonConfig(inner="eager"),
    }


def runs_in_fp8(names: dict[str, Any]) -> None:
    names["model"](**names["batch"])
    layers = names["base"].config.num_hidden_layers
    assert len(falqon_fx.adapters(names["model"])) == layers * SITES


def was_trained(names: dict[str, Any]) -> None:
    assert len(falqon_fx.adapters(names["model"])) == SITES
    assert all(b.any() for b in lora_b(names["model"]))


def was_saved(names: dict[str, Any]) -> None:
    was_trained(names)
    assert list(Path("checkpoint").iterdir())


def was_watched(names: dict[str, Any]) -> None:
    was_trained(names)
    assert {type(audit) for audit in names["seen"].history} == {falqon_fx.Audit}


def was_explained(names: dict[str, Any]) -> None:
    assert len(names["report"].sites) == SITES
    assert "<html" in Path("report.html").read_text()


def was_used(names: dict[str, Any]) -> None:
    """One of three blocks: an adapter, a merged model or an FP8 model, that says the same."""
    batch = names["batch"]
    if "plain" in names:
        assert all(map(torch.equal, lora_b(names["plain"]), lora_b(names["model"])))
        return
    folder = "merged" if "merged" in names else "fp8-model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert loaded(**batch).loss.isfinite()
    if "merged" in names:
        merged, found = names["merged"].state_dict(), loaded.state_dict()
        assert merged.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in merged.items())


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/checkpoints.md": was_saved,
    "docs/inspecting.md": was_explained,
    "docs/first-step.md": runs_in_fp8,
    "docs/matching.md": runs_in_fp8,
    "docs/method.md": was_watched,
    "docs/options.md": runs_in_fp8,
    "docs/trainers.md": was_trained,
    "docs/use.md": was_used,
}
COMPILED = {"docs/matching.md", "docs/use.md"}  # what they do comes before training, or after it
BLOCKS = [
    pytest.param(name_of(page), code, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.is_relative_to(DOCS) and not page.is_relative_to(GUIDES)
    for number, code in enumerate(blocks(page))
    if "for step in" not in code  # the loop, above
    and "write_comfyui" not in code  # in test_integrations.py
]


@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_a_block_of_the_docs_runs(page, code):
    names = given(layers=2 if page == "docs/first-step.md" else 1)  # it compiles repeated blocks
    if page in COMPILED:
        names["model"].compile(backend="falqon", options={"config": names["config"]})
    if page == "docs/use.md":
        names["model"](**names["batch"])
    exec(code, names)
    CHECKS[page](names)


def test_the_trainers_page_has_four_ways():
    assert len(blocks(DOCS / "trainers.md")) == 4
