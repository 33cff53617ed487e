"""Compiled code of the kernels, for GPUs that need not be here: a few; all of them when slow."""

import re
from dataclasses import replace

import pytest
import triton

from falqon_fx.kernels import matrix as module
from falqon_fx.kernels.aot import ARCHITECTURES
from falqon_fx.kernels.gemm.forms import PROBLEM
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.gemm.tiles import gemm_specs, likeliest, waves
from falqon_fx.kernels.hardware import multiplies_fp8
from falqon_fx.kernels.matrix import (
    Line,
    compile_lines,
    instruction_problems,
    main,
    matrix,
    problems,
    read,
    worse,
)

PRODUCTS = "wgmma m64n256k32 e4m3 e4m3 x4"
LINE = Line("spec", "aligned", "gemm", 90, 168, 0, 160_000, 0, PRODUCTS, 6, 0)


def test_matrix_is_large_and_has_each_architecture():
    made = matrix()
    assert len({(spec.name, sizes) for spec, sizes, _ in made}) == len(made) >= 60
    for architecture in ARCHITECTURES:
        assert sum(architecture in where for *_, where in made) >= 60


def test_committed_table_is_that_of_the_matrix():
    _, committed = read()
    wanted = {(spec.name, sizes, where) for spec, sizes, archs in matrix() for where in archs}
    assert {(line.spec, line.sizes, line.architecture) for line in committed.values()} == wanted
    specs = {spec.name: spec for spec, *_ in matrix()}
    assert not any(problems(specs[line.spec], line) for line in committed.values())


def first(architecture, text):
    return next(s for s, _, where in matrix() if architecture in where and text in s.name)


@pytest.mark.parametrize(
    ("architecture", "text"),
    [
        (89, "gemm_e4m3_fp8_row_row_bfloat16_bfloat16_1y1a"),
        (90, "tma_persistent_128x256"),
        (100, "tma_persistent_128x256"),
        (120, "r64"),
        (90, "update_float32"),
        (90, "transpose"),
    ],
)
def test_compiled_code_keeps_the_rules_and_is_no_worse_than_committed(architecture, text):
    spec = first(architecture, text)
    version, committed = read()
    for line, compiled in compile_lines(spec, architecture):
        assert problems(spec, line) == []
        assert instruction_problems(spec, line, compiled) == []
        if version == triton.__version__:
            assert worse(line, committed[line.key]) == []


@pytest.mark.slow
def test_make_kernels(capsys):
    assert main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 240_000}, "shared memory"),
        ({"shared": 110_000, "architecture": 120}, "shared memory"),
        ({"tensor_columns": 1024}, "tensor memory"),
        ({"byte_accesses": 2}, "single bytes"),
        ({"wide_loads": 0}, "no 16-byte loads"),
    ],
)
def test_each_rule_is_checked(change, message):
    spec = first(90, "gemm")
    assert problems(spec, LINE) == []
    (text,) = problems(spec, replace(LINE, **change))
    assert message in text


def test_a_product_that_is_serialized_or_not_fp8_is_found():
    spec = first(90, "pointer")
    ((line, compiled),) = compile_lines(spec, 90)
    assert instruction_problems(spec, line, compiled) == []
    decoded = replace(spec, operands="bfloat16", block_k=64, num_stages=2)
    ((line, compiled),) = compile_lines(decoded, 90)
    assert instruction_problems(decoded, line, compiled)[0] == "no FP8 tensor-core instruction"


@pytest.mark.parametrize(
    ("family", "number", "text"),
    [(100, 103, "0y1a"), (100, 103, "tma_persistent_128x256"), (120, 121, "transpose_2x")],
)
def test_cards_with_the_tensor_cores_of_others_run_the_same_code(family, number, text):
    """Instruction by instruction, and with as many registers: the table holds theirs, too."""
    spec, code, lines = first(family, text), [], []
    for architecture in (family, number):
        ((line, compiled),) = compile_lines(spec, architecture)
        body = compiled.ptx.partition(".section")[0]
        code.append(re.sub(r"^\.target.*|^\s*\.(loc|file).*|//.*", "", body, flags=re.M))
        lines.append(replace(line, architecture=family))
    assert code[0] == code[1]
    assert lines[0] == lines[1]


def test_triton_decodes_fp8_on_sm_121():
    """And where a newer one doesn't, `hardware.multiplies_fp8` can let it."""
    ((line, _),) = compile_lines(first(89, "0y1a"), 121)
    assert "e4m3" not in line.matrix_instructions
    assert [n for n in (80, 89, 90, 100, 103, 120, 121) if multiplies_fp8(n)] == [
        *(89, 90, 100, 103, 120)
    ]


def test_worse_is_named():
    assert worse(LINE, LINE) == []
    assert worse(replace(LINE, registers=170), LINE) == ["registers 168 -> 170"]
    assert worse(replace(LINE, registers=160), LINE) == []


def test_a_regression_fails_the_command(monkeypatch, capsys):
    spec = first(90, "transpose")
    monkeypatch.setattr(module, "matrix", lambda: [(spec, "aligned", (90,))])
    assert main(["--only", "transpose"]) == 0
    ((line, _),) = compile_lines(spec, 90)
    better = replace(line, registers=line.registers - 1)
    monkeypatch.setattr(module, "read", lambda _: (triton.__version__, {line.key: better}))
    assert main(["--only", "transpose"]) == 1
    assert "registers" in capsys.readouterr().out


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A copy of the committed table that may be written, of the Triton that is here."""
    path = tmp_path / "compiled.csv"
    _, *rows = module.COMMITTED.read_text().splitlines(keepends=True)
    path.write_text("".join([f"# Triton {triton.__version__}\n", *rows]))
    monkeypatch.setattr(module, "COMMITTED", path)
    return path


def test_accept_writes_what_was_compiled_and_keeps_the_other_lines(table):
    assert main(["--only", "transpose_1x_fp8", "--accept"]) == 0  # whatever Triton it was of
    whole = table.read_text()
    ours = [line for line in whole.splitlines(keepends=True) if line.startswith("transpose_1x_fp8")]
    table.write_text(whole.replace(ours[1], ""))
    assert main(["--only", "transpose_1x_fp8", "--accept"]) == 0
    lines = table.read_text().splitlines(keepends=True)
    assert sorted(lines) == sorted(whole.splitlines(keepends=True))
    assert lines[-1] == ours[1]


def test_accept_drops_the_lines_of_kernels_that_are_gone(table):
    whole = table.read_text()
    gone = "no_such_kernel,aligned,gemm,90,1,0,0,0,,1,0\n"
    table.write_text(whole + gone)
    assert main(["--only", "transpose_1x_fp8", "--accept"]) == 0
    assert gone not in table.read_text()


def test_a_part_of_another_tritons_table_is_not_accepted(table, capsys):
    other = table.read_text().replace(triton.__version__, "1.0", 1)
    table.write_text(other)
    with pytest.raises(SystemExit):
        main(["--only", "transpose_1x_fp8", "--accept"])
    assert "of Triton 1.0" in capsys.readouterr().err
    assert table.read_text() == other


@pytest.mark.parametrize(
    ("architecture", "operands"), [(0, "float32"), (80, "bfloat16"), (89, "fp8"), (120, "fp8")]
)
def test_operands_follow_the_architecture(architecture, operands):
    assert {s.operands for s in gemm_specs(PROBLEM, architecture)} == {operands}


@pytest.mark.parametrize(
    "change",
    [
        {"one_tensor": False},
        {"more_k": (1024,), "w_scale": "none", "rows": (64,), "a_pieces": 0},
    ],
)
def test_descriptors_only_where_they_can_be(change):
    for architecture in (90, 100, 120):
        assert any(s.memory == "tma" for s in gemm_specs(PROBLEM, architecture))
    specs = gemm_specs(replace(PROBLEM, **change), 90)
    assert specs
    assert all(s.memory == "pointer" for s in specs)


def test_k_is_a_multiple_of_16_and_of_the_tile_unless_descriptors_read_it():
    assert gemm_specs(replace(PROBLEM, k=4104), 90) == []
    assert {s.memory for s in gemm_specs(replace(PROBLEM, k=4112), 90)} == {"tma"}
    assert gemm_specs(replace(PROBLEM, k=4112, one_tensor=False), 90) == []
    assert gemm_specs(replace(PROBLEM, k=4104), 0) != []


def test_tiles_count_waves():
    """A's rows start a column of their own: at n = out = 4096 they cost 128 x 256 a whole wave."""
    wide, tall = (
        next(s for s in gemm_specs(PROBLEM, 90) if (s.block_m, s.block_n) == shape)
        for shape in ((128, 256), (256, 128))
    )
    alone = replace(PROBLEM, rows=(4096,), a_pieces=0)
    assert (waves(alone, wide, 132), waves(PROBLEM, wide, 132)) == (4, 5)
    assert (waves(alone, tall, 132), waves(PROBLEM, tall, 132)) == (4, 4)
    order = likeliest(gemm_specs(PROBLEM, 90), PROBLEM, 132)
    assert order.index(tall) < order.index(wide)
    assert all(isinstance(s, GemmSpec) for s in order)
