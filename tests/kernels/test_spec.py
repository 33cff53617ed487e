from dataclasses import replace

import pytest

from falqon_fx.kernels import KernelSpec, spec
from falqon_fx.kernels.activation_cast.spec import ActivationCastSpec
from tests import fresh

SPEC = ActivationCastSpec.for_width(4096, input_dtype="bfloat16", granularity="row")


def test_key_is_the_same_in_another_process():
    code = (
        "from falqon_fx.kernels import ActivationCastSpec as S; "
        "print(S.for_width(4096, input_dtype='bfloat16', granularity='row').key)"
    )
    assert fresh.run(code).stdout.strip() == SPEC.key


@pytest.mark.parametrize(
    "change",
    [
        {"input_dtype": "float16"},
        {"fp8": "e5m2"},
        {"scale": "pow2"},
        {"cast": "integer"},
        {"block_rows": 2},
        {"block_width": 8192},
        {"loop": True},
        {"num_warps": 8},
        {"granularity": "tensor"},
        {"granularity": "tensor", "programs": 2},
    ],
)
def test_each_field_is_in_name_and_key(change):
    changed = replace(SPEC, **change)
    assert changed.name != SPEC.name
    assert changed.key != SPEC.key


def test_key_depends_on_template_and_version(monkeypatch):
    keys = {SPEC.key}
    monkeypatch.setattr(spec, "template_text", lambda package, template: "another text")
    keys.add(SPEC.key)
    monkeypatch.setattr(spec, "library_version", lambda: "another version")
    keys.add(SPEC.key)
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_dtype": "float64"}, "input_dtype='float64'.*float32, bfloat16, float16"),
        ({"fp8": "e3m4"}, "fp8='e3m4'"),
        ({"granularity": "block"}, "granularity='block'"),
        ({"scale": "mean"}, "scale='mean'"),
        ({"cast": "software"}, "cast='software'"),
        ({"block_rows": 3}, "block_rows=3: expected a power of two"),
        ({"block_width": 0}, "block_width=0"),
        ({"num_warps": 4.0}, r"num_warps=4\.0"),
        ({"granularity": "tensor", "loop": True}, "loop=True"),
        ({"programs": 2}, "programs"),
    ],
)
def test_bad_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("width", [0, 1, 17, 128, 4096, 11008, 16384, 16385, 152064])
def test_for_width_fits_the_row(width, granularity):
    chosen = ActivationCastSpec.for_width(width, input_dtype="bfloat16", granularity=granularity)
    if granularity == "row":
        assert chosen.loop == (width > 16384)
        assert chosen.loop or chosen.block_width >= width
    assert 4096 <= chosen.block_rows * chosen.block_width <= 16384


def test_base_spec_needs_a_name():
    with pytest.raises(NotImplementedError):
        _ = KernelSpec().name
