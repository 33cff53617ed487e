import ast
import os
from itertools import product
from pathlib import Path

import jinja2
import pytest

from falqon_fx.kernels import spec
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from falqon_fx.kernels.matrix import KERNELS, matrix
from falqon_fx.kernels.render import render
from tests.parameters import slow

GOLDEN = Path(__file__).parent / "golden"
SPECS = [golden for kernel in KERNELS for golden in kernel.golden]


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


@pytest.mark.parametrize("share", [64, slow(1)])
def test_the_matrix_renders_to_readable_python(share):
    for made_for, *_ in matrix()[::share]:
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
