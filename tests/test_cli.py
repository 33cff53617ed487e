from __future__ import annotations

import inspect
import json
import pkgutil
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jsonschema
import pytest

from falqon_fx import FalqonConfig, RewriteReport
from falqon_fx.config import literals
from falqon_fx.files import prequantize
from falqon_fx.files.hf import lora_config
from falqon_fx.report.report import json_schema
from falqon_fx_cli import commands, export
from falqon_fx_cli.main import main
from falqon_fx_cli.output import print_json
from tests.hostile import obeyed
from tests.parameters import slow

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


FLAGS = ["--length", "8", "--rank", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder as a hub holds it, without weights."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.save_pretrained(path)
    return str(path)


def test_explain_prints_the_report_of_a_folder_without_weights(folder, capsys):
    assert main(["explain", folder, *FLAGS, "--check", "--card", "H100"]) == 0
    text = capsys.readouterr().out
    assert "7 sites rewritten (7 with an adapter), 0 rejected, 1 left" in text
    assert "trains: A and B of 7 sites" in text
    assert "H100" in text
    assert max(map(len, text.splitlines())) <= 100


def test_explain_takes_a_mesh(folder, capsys):
    assert main(["explain", folder, *FLAGS, "--mesh", "ddp=2,fsdp=4", "--card", "H100"]) == 0
    assert "mesh: ddp 2 x fsdp 4" in capsys.readouterr().out


def test_explain_writes_the_page_an_image_and_the_diff(folder, tmp_path, capsys):
    site, page, image = "base_model.model.model.layers.0.mlp.up_proj", "r.html", "s.svg"
    files = ["--html", str(tmp_path / page), "--svg", site, str(tmp_path / image), "--diff"]
    assert main(["explain", folder, *FLAGS, *files]) == 0
    assert "falqon.merged_linear(" in capsys.readouterr().out
    assert (tmp_path / page).read_text().startswith("<!doctype html>")
    assert site in (tmp_path / image).read_text()


def test_explain_as_json_has_the_schema(folder, capsys):
    assert main(["explain", folder, *FLAGS, "--json", "--dynamic", "--card", "L40S"]) == 0
    text = capsys.readouterr().out
    jsonschema.validate(json.loads(text), json_schema())
    report = RewriteReport.from_json(text)
    assert len(report.sites) == 7
    assert all(site.rank == 4 and site.base_dtype == "bfloat16" for site in report.sites)
    assert all(site.tokens.count("s") == 2 for site in report.sites)  # two symbols
    assert all(site.cost is not None and site.cost.card == "L40S" for site in report.sites)
    assert any("use_cache=False" in note for note in report.notes)


def test_explain_says_that_it_shows_a_quantized_checkpoint_in_16_bits(folder, tmp_path, capsys):
    tree = json.loads(Path(folder, "config.json").read_text())
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**tree, "quantization_config": how}))
    for path, told in ((tmp_path, True), (folder, False)):
        assert main(["explain", str(path), *FLAGS, "--json"]) == 0
        report = RewriteReport.from_json(capsys.readouterr().out)
        assert len(report.sites) == 7
        assert any("quantization_config" in note for note in report.notes) is told


def test_explain_takes_rank_and_targets_from_an_adapter_folder(folder, tmp_path, capsys):
    lora = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["down_proj"])
    lora.save_pretrained(str(tmp_path))
    assert main(["explain", folder, "--length", "8", "--adapter", str(tmp_path), "--json"]) == 0
    (site,) = RewriteReport.from_json(capsys.readouterr().out).sites
    assert (site.rank, site.scaling) == (2, 4.0)
    assert site.path.endswith("down_proj")


def test_frozen_layers_beside_the_targets_run_in_fp8_or_are_left(tmp_path, capsys):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    config.save_pretrained(tmp_path)
    words = ["explain", str(tmp_path), *FLAGS, "--target-modules", "q_proj,v_proj"]
    assert main([*words, "--check"]) == 0
    text = capsys.readouterr().out
    assert "7 sites rewritten (2 with an adapter), 0 rejected, 1 left" in text
    assert "it is an output head" in text
    assert main([*words, "--option", "frozen=leave"]) == 0
    assert "2 sites rewritten (2 with an adapter)" in capsys.readouterr().out


def test_check_exits_with_3_where_something_is_left_alone(folder, capsys):
    options = ["--option", 'exclude=["*.q_proj"]', "--option", "dropout=ignore"]
    assert main(["explain", folder, *FLAGS, *options, "--check"]) == 3
    text = capsys.readouterr().out
    assert "6 sites rewritten (6 with an adapter), 1 rejected" in text


def test_update_rows_wants_a_frozen_a_and_shows_its_options(folder, capsys):
    words = ["explain", folder, *FLAGS, "--option", "update=rows", "--option", "topk=5"]
    assert main(words) == 1
    assert 'update="adapter", or freeze lora_A' in capsys.readouterr().err
    assert main([*words, "--frozen-a"]) == 0
    text = capsys.readouterr().out
    assert "trains: B of 7 sites: each step is written into W row by row" in text
    assert "update=rows" in text
    assert "topk=5" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explian", "x"], "Did you mean 'explain'?"),
        (["explain", "x", "--rnak", "4"], "--rank"),
        (["cost", "--cards", "--jsn"], "--json"),
        (["explain"], "Missing argument 'MODEL'"),
        (["explain", "x", "y"], "unexpected extra argument"),
        (["explain", "x", "--dtype", "float"], "'bfloat16', 'float16', 'float32'"),
        (["explain", "x", "--batch", "0"], "'--batch'"),
        (["explain", "x", "--length", "many"], "'--length'"),
        (["explain", "x", "--rank", "-1"], "'--rank'"),
        (["explain", "x", "--adapter", "/nowhere"], "'/nowhere' does not exist"),
        (["explain", "x", "--html", "/nowhere/page.html"], "there is no folder '/nowhere'"),
        (["explain", "x", "--svg", "site", "/nowhere/s.svg"], "there is no folder '/nowhere'"),
        (["cost", "--calibrate", "tpu"], "'cpu', 'cuda'"),
        (["cost", "--in", "0"], "'--in'"),
        (["cost", "--tokens", "-5"], "'--tokens'"),
        (["cost", "--step", "--tokens", "0"], "'--tokens'"),
        (["cost", "--step", "--batch", "-1"], "'--batch'"),
        (["export", "/nowhere", "out"], "'/nowhere' does not exist"),
        (["export", ".", "out", "--adapter", "/nowhere"], "'/nowhere' does not exist"),
        (["export", ".", "out", "--checkpoint", "/nowhere"], "'/nowhere' does not exist"),
        (["export", ".", "out", "--base", "/nowhere"], "'/nowhere' does not exist"),
        (["export", ".", "out", "--form", "fp16"], "'compressed-tensors', 'fp8'"),
        (["prequantize", "/nowhere", "out"], "'/nowhere' does not exist"),
        (["prequantize", ".", "out", "--workers", "0"], "'--workers'"),
        (["prequantize", ".", "out", "--init", "pissa"], "'svd', 'keep'"),
        (["repro", "/nowhere"], "'/nowhere' does not exist"),
        (["repro", ".", "--device", "tpu"], "'cpu', 'cuda'"),
        (["kernels", "/nowhere"], "'/nowhere' does not exist"),
        (["ex\x1b[31mplain"], "explain"),
        (["explain", "x", "--\x1b]0;x\x07"], "No such option"),
        (["explain", "x", "\x1b[2J"], "unexpected extra argument"),
        (["explain", "x", "--adapter", "\x1b[2J\udcff"], "does not exist"),
        (["explain", "x", "--html", "\x1b[2J/page"], "there is no folder"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_is_right(words, said, capsys):
    assert main(words) == 2
    found = capsys.readouterr()
    assert said in " ".join(found.err.split())
    assert found.out == ""
    assert obeyed(found.err) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--option", "topkk=3"], "nearest option is 'topk'"),
        (["--option", "scale=pow3"], "The nearest is 'pow2'"),
        (["--option", "topk=3"], 'belongs to update="rows"'),
        (["--option", "topk"], "name=value"),
        (["--card", "H1000"], "The nearest is 'H100'"),
        (["--mesh", "fsdp"], "Write --mesh fsdp=8,tp=2"),
        (["--mesh", "shards=2"], "Known are ddp"),
    ],
)
def test_a_wrong_value_exits_with_1_and_names_the_nearest(folder, words, said, capsys):
    assert main(["explain", folder, *FLAGS, *words, "--json"]) == 1
    found = capsys.readouterr()
    assert said in found.err
    assert said in json.loads(found.out)["error"]


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "\x1b]0;x\x07"},
        {"model_type": ["llama"]},
        {"architectures": ["set_seed"], "hidden_size": -1},
        {"architectures": [1]},
        {"hidden_size": "32"},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"num_hidden_layers": None},
        {"vocab_size": -5},
    ],
    ids=str,
)
def test_a_crafted_config_is_an_error_that_names_the_folder(folder, changed, tmp_path, capsys):
    tree = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, **changed}))
    assert main(["explain", str(tmp_path), *FLAGS]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"falqon-fx: {tmp_path}: ")
    assert obeyed(said) == []


@pytest.mark.parametrize(
    "name", ["set_seed", "LlamaConfig", "os", slow("logging"), slow("pipeline")]
)
def test_a_config_names_no_other_thing_of_transformers(folder, name, tmp_path, capsys):
    """The model is then that of the config's type."""
    tree = json.loads(Path(folder, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, "architectures": [name]}))
    assert main(["explain", str(tmp_path), *FLAGS]) == 0
    assert "7 sites rewritten" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "\x00", '{"peft_type": "x"}'])
def test_a_damaged_config_of_an_adapter_is_an_error(folder, text, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(text)
    assert main(["explain", folder, "--adapter", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"falqon-fx: {tmp_path}: its config can't be read")


def test_a_folder_without_a_model_is_an_error_with_a_remedy(tmp_path, capsys):
    assert main(["explain", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", commands.ALL, ids=lambda command: command.__name__)
def test_every_command_hands_on_all_options_and_takes_json(command, monkeypatch):
    """Under the names, and with the types, that its object has."""
    seen: list[str] = []
    monkeypatch.setattr(commands, "_run", lambda name, given: seen.append(name))
    parameters = inspect.signature(command).parameters
    command(**dict.fromkeys(parameters))
    given = get_type_hints(command)
    del given["return"]
    assert get_type_hints(pkgutil.resolve_name(seen[0])) == given
    assert list(given)[-1] == "as_json"


def test_what_is_not_given_is_the_librarys_default(folder, monkeypatch, capsys):
    """And the help says which that is."""
    monkeypatch.setattr(export, "prequantize", lambda *given, **named: given)
    seen: list[Any] = []
    monkeypatch.setattr(export, "_print", lambda report, as_json: seen.append(report))
    assert main(["prequantize", folder, "out"]) == 0
    (_, _, lora, config) = seen[0]
    assert config == prequantize.DEFAULT
    assert (lora.r, lora.lora_alpha) == (lora_config(None).r, peft.LoraConfig().lora_alpha)
    words = ["--rank", "4", "--alpha", "6", "--target-modules", "q_proj,v_proj", "--init", "keep"]
    words += ["--target-modules", "o_proj", "--scale", "amax", "--granularity", "tensor"]
    assert main(["prequantize", folder, "out", *words]) == 0
    (_, _, lora, config) = seen[1]
    assert (lora.r, lora.lora_alpha) == (4, 6)
    assert lora.target_modules == {"q_proj", "v_proj", "o_proj"}
    assert config == FalqonConfig(init="keep", scale="amax", granularity="tensor")
    assert main(["prequantize", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    config = prequantize.DEFAULT
    for value in (
        f"default: {lora_config(None).r})",
        f"PEFT's default: {peft.LoraConfig().lora_alpha})",
    ):
        assert value in shown
    assert f"prequantize's default: {config.init})" in shown
    assert f"FalqonConfig's default: {config.granularity})" in shown
    assert f"FalqonConfig's default: {config.scale})" in shown


def test_json_is_what_any_parser_takes(capsys):
    print_json({"a": [float("nan"), 1.5, None], "b": {"c": (float("-inf"), Path("x"))}, 3: True})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": [None, 1.5, None], "b": {"c": [None, "x"]}, "3": True}


def test_choices_are_those_of_the_library():
    given = get_type_hints(commands.prequantize)
    for name, values in literals(FalqonConfig).items():
        if name in given:
            assert given[name] == Literal[values] | None
