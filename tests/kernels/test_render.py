import ast
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import jinja2
import pytest

from falqon_fx.kernels import spec
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.gemm.spec import GemmSpec
from falqon_fx.kernels.grad_b.spec import GradBSpec
from falqon_fx.kernels.matrix import matrix
from falqon_fx.kernels.render import render
from falqon_fx.kernels.transpose.spec import StoredSpec, TransposeSpec
from falqon_fx.kernels.update.spec import UpdateSpec

GOLDEN = Path(__file__).parent / "golden"
SITE = GemmSpec(
    x="e4m3",
    operands="fp8",
    accumulation="fast",
    x_scale="row",
    w_scale="row",
    out_dtype="bfloat16",
    a_dtype="bfloat16",
    pieces=2,
    a_pieces=1,
    bias="none",
    extra=0,
    layout="nk",
    memory="tma",
    persistent=True,
    even_k=False,
    block_m=128,
    block_n=256,
    block_k=128,
)
SIBLINGS = replace(
    SITE, pieces=6, a_pieces=3, memory="pointer", persistent=False, even_k=True, block_n=128
)
ADAPTED = replace(SIBLINGS, pieces=1, a_pieces=0, extra=128)
GRAD_X = replace(
    SIBLINGS, pieces=1, a_pieces=0, x="e5m2", w_scale="none", k_pieces=3, operands="bfloat16"
)
UPDATE = UpdateSpec(
    b_dtype="float32",
    a_dtype="float32",
    applied_dtype="bfloat16",
    base_dtype="bfloat16",
    granularity="row",
    scale="pow2",
    rounding="stochastic",
    drop=False,
    cast="hardware",
    rank=64,
    aligned=True,
    base_aligned=True,
    rows=1,
    width=4096,
    loop=False,
    num_warps=8,
)
SPECS = [
    ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="row"),
    ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="tensor", scale="pow2"),
    ActivationCastSpec.for_width(
        32768, input_dtype="float32", fp8="e5m2", granularity="row", scale="pow2", cast="integer"
    ),
    ActivationCastSpec.for_width(
        256, input_dtype="float16", fp8="e4m3", granularity="tensor", cast="integer"
    ),
    SITE,
    replace(SITE, out_dtype="float16", a_dtype="float32", bias="bfloat16", memory="pointer"),
    SIBLINGS,
    ADAPTED,
    GRAD_X,
    UPDATE,
    replace(
        UPDATE,
        granularity="tensor",
        scale="amax",
        rounding="nearest",
        drop=True,
        applied_dtype="float32",
        base_dtype="none",
        base_aligned=False,
    ),
    GradBSpec.for_rank(64, grad_dtype="bfloat16", a_dtype="bfloat16", b_dtype="float32"),
    TransposeSpec(),
    StoredSpec(),
]


@pytest.mark.parametrize("golden_spec", SPECS, ids=lambda s: s.name)
def test_golden_source(golden_spec):
    path = GOLDEN / f"{golden_spec.name}.py.txt"
    source = render(golden_spec)
    if os.environ.get("FALQON_WRITE_GOLDEN"):
        path.write_text(source)
    assert source == path.read_text(), "set FALQON_WRITE_GOLDEN=1 to accept the new source"


def test_no_golden_file_is_left_over():
    assert {p.name for p in GOLDEN.iterdir()} == {f"{s.name}.py.txt" for s in SPECS}


@pytest.mark.parametrize(
    ("dtype", "fp8", "granularity", "scale", "cast"),
    list(
        product(
            ["float32", "bfloat16", "float16"],
            ["e4m3", "e5m2"],
            ["tensor", "row"],
            ["amax", "pow2"],
            ["hardware", "integer"],
        )
    ),
)
def test_every_cast_renders_to_readable_python(dtype, fp8, granularity, scale, cast):
    check_readable(
        ActivationCastSpec.for_width(
            4096, input_dtype=dtype, fp8=fp8, granularity=granularity, scale=scale, cast=cast
        )
    )


def test_the_whole_matrix_renders_to_readable_python():
    for made_for, _ in matrix():
        check_readable(made_for)


def check_readable(made_for):
    source = render(made_for)
    assert source == render(made_for)
    assert not any(mark in source for mark in ("{{", "{%", "{#"))
    assert max(map(len, source.splitlines())) <= 100
    header = source.split("import triton")[0].replace("\n#  ", "")
    assert str(made_for) in header
    assert header.count("# Serves: ") == 1
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert all(ast.get_docstring(function) for function in functions)


def test_name_that_the_spec_lacks_is_an_error(monkeypatch):
    monkeypatch.setattr(
        "falqon_fx.kernels.spec.template_text", lambda package, name: "{{ no_such }}"
    )
    with pytest.raises(jinja2.UndefinedError, match="no_such"):
        render(SPECS[0])


def test_template_text_is_installed():
    assert "triton" in spec.template_text("falqon_fx.kernels.activation_cast", "activation_cast")
