from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from falqon_fx import FalqonConfig, FalqonConfigError, FalqonError
from falqon_fx.site.spec import RowsSpec, SiteSpec, parse_rows_spec, parse_spec
from tests.sites import randn

OPTIONS = [field.name for field in dataclasses.fields(FalqonConfig)]


@pytest.mark.parametrize(
    ("given_name", "nearest"),
    [
        ("topkk", "topk"),
        ("top_k", "topk"),
        ("Init", "init"),
        ("granularit", "granularity"),
        ("row_granularity", "granularity"),
        ("scales", "scale"),
        ("pend", "pending"),
        ("round", "rounding"),
        ("grad-dtype", "grad_dtype"),
        ("lora_dropout", "dropout"),
        ("inner_compiler", "inner"),
        ("includes", "include"),
        ("excludes", "exclude"),
        ("seeds", "seed"),
        ("modes", "mode"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda options: FalqonConfig.from_options(options),
        lambda options: FalqonConfig(**options),
        lambda options: dataclasses.replace(FalqonConfig(), **options),
    ],
    ids=["from_options", "FalqonConfig", "replace"],
)
def test_an_unknown_option_names_the_nearest_one(call, given_name, nearest):
    with pytest.raises(FalqonConfigError) as error:
        call({given_name: 1})
    assert str(error.value) == (
        f"option {given_name!r}: is unknown: the options are {', '.join(OPTIONS)}, and Inductor's, "
        f"with a dot. The nearest option is {nearest!r}."
    )


@given(st.text(min_size=1).filter(lambda t: "." not in t and t not in OPTIONS and t != "config"))
def test_any_unknown_option_names_one_that_exists(name):
    with pytest.raises(FalqonConfigError, match=r"with a dot\. The nearest option is") as error:
        FalqonConfig.from_options({name: 1})
    assert error.value.remedy.split("'")[1] in OPTIONS


CHOICES = {
    "update": ("adapter", "rows"),
    "base_dtype": ("fp8", "int8", "nvfp4"),
    "frozen": ("fp8", "leave"),
    "init": ("svd", "keep"),
    "granularity": ("tensor", "row"),
    "scale": ("amax", "pow2"),
    "grad_dtype": ("e5m2", "e4m3"),
    "dropout": ("exact", "ignore", "reject"),
    "kernel": ("auto", "triton", "scaled_mm", "inductor", "dequantize"),
    "accumulation": ("fast", "promoted"),
    "transpose": ("auto", "transient", "store", "kernel"),
    "inner": ("inductor", "aot_eager", "eager"),
}
ROWS_CHOICES = {"pending": ("hold", "drop", "apply"), "rounding": ("nearest", "stochastic")}


def of_rows(name: str) -> dict[str, str]:
    """What makes an option belong to its method."""
    return {"update": "rows"} if name in ROWS_CHOICES else {}


@pytest.mark.parametrize(("name", "choices"), [*CHOICES.items(), *ROWS_CHOICES.items()])
def test_every_documented_choice_is_taken(name, choices):
    for choice in choices:
        assert getattr(FalqonConfig(**{**of_rows(name), name: choice}), name) == choice


@pytest.mark.parametrize("name", [*CHOICES, *ROWS_CHOICES])
@pytest.mark.parametrize("value", ["nonsense", "", "SVD", 1, True, ["svd"], {}, torch.float32])
def test_any_other_value_of_a_choice_is_an_error_that_lists_them(name, value):
    with pytest.raises(FalqonConfigError, match="is none of") as error:
        FalqonConfig(**{**of_rows(name), name: value})
    assert error.value.site == f"option {name!r}"
    choices = (CHOICES | ROWS_CHOICES)[name]
    for choice in choices:
        assert repr(choice) in error.value.problem
    assert error.value.remedy.split("'")[1] in choices


def test_scales_are_powers_of_two_for_fp8_and_none_for_int8():
    """Where nothing is said; another base_dtype than that of a whole config has its own."""
    assert FalqonConfig().scale == "pow2"
    assert FalqonConfig(base_dtype="int8").scale == "amax"
    assert FalqonConfig(base_dtype="int8", scale="pow2").scale == "pow2"
    other = FalqonConfig.from_options({"config": FalqonConfig(), "base_dtype": "int8"})
    assert other == FalqonConfig(base_dtype="int8")


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "scale"])
def test_none_is_a_value_of_no_choice_with_a_default(name):
    with pytest.raises(FalqonConfigError, match="is none of"):
        FalqonConfig(**{name: None})


def test_a_mistyped_choice_names_the_nearest():
    with pytest.raises(FalqonConfigError, match="The nearest is 'stochastic'"):
        FalqonConfig(update="rows", rounding="stochastik")
    with pytest.raises(FalqonConfigError, match="The nearest is 'rows'"):
        FalqonConfig(update="row")


# -- options of update="rows" ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pending", "apply"),
        ("pending", "drop"),
        ("rounding", "nearest"),
        ("topk", 3),
        ("topk", "all"),
    ],
)
@pytest.mark.parametrize("update", [{}, {"update": "adapter"}])
def test_an_option_of_rows_is_refused_elsewhere(name, value, update):
    with pytest.raises(FalqonConfigError) as error:
        FalqonConfig(**update, **{name: value})
    assert error.value.site == f"option {name!r}"
    assert 'belongs to update="rows"' in error.value.problem
    assert error.value.remedy == f'Leave {name} out, or set update="rows"'


def test_rows_fills_in_its_own_defaults_and_the_default_has_none():
    rows, default = FalqonConfig(update="rows"), FalqonConfig()
    assert (rows.pending, rows.rounding, rows.topk) == ("apply", "stochastic", None)
    assert (default.pending, default.rounding, default.topk) == (None, None, None)
    assert RowsSpec.from_config(rows) == parse_spec(str(RowsSpec.from_config(rows)))


def test_options_beside_a_whole_config_may_change_the_method():
    rows = FalqonConfig(update="rows", pending="hold", topk=3, grad_dtype="e4m3")
    config = FalqonConfig.from_options({"config": rows, "update": "adapter"})
    assert config == FalqonConfig(grad_dtype="e4m3")
    back = FalqonConfig.from_options({"config": config, "update": "rows", "topk": 5})
    assert back == FalqonConfig(update="rows", topk=5, grad_dtype="e4m3")
    with pytest.raises(FalqonConfigError, match="belongs to update"):
        FalqonConfig.from_options({"config": rows, "update": "adapter", "topk": 5})


def test_texts_hold_every_option():
    texts = FalqonConfig(update="rows", topk=0.5).texts()
    assert texts.keys() == set(OPTIONS)
    assert (texts["update"], texts["topk"], texts["seed"]) == ("rows", "0.5", "0")


@pytest.mark.parametrize(
    ("topk", "said"),
    [
        (0, "the count 0 is below 1"),
        (-3, "the count -3 is below 1"),
        (0.0, r"the fraction 0.0 is outside \(0, 1\]"),
        (-0.5, "outside"),
        (1.0000001, "outside"),
        (10.0, "outside"),
        (math.nan, "outside"),
        (math.inf, "outside"),
        (True, "neither a count, a fraction nor 'all'"),
        (False, "neither"),
        ("ten", "neither"),
        ("10", "neither"),
        ("ALL", "neither"),
        ([10], "neither"),
        (torch.tensor(10), "neither"),
    ],
)
def test_a_bad_topk_says_what_it_takes(topk, said):
    with pytest.raises(FalqonConfigError, match=said) as error:
        FalqonConfig(update="rows", topk=topk)
    assert error.value.remedy == 'Give an int >= 1, a float in (0, 1], or "all"'


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", -1),
        ("seed", 1.5),
        ("seed", True),
        ("seed", "0"),
        ("seed", None),
        ("include", 3),
        ("include", [1]),
        ("include", None),
        ("exclude", {"a"}),
        ("exclude", ["a", None]),
        ("mode", 3),
        ("mode", True),
        ("inductor", ["triton.cudagraphs"]),
        ("inductor", "max-autotune"),
        ("inductor", None),
    ],
)
def test_an_ill_typed_value_names_its_option(name, value):
    with pytest.raises(FalqonConfigError) as error:
        FalqonConfig(**{name: value})
    assert error.value.site == f"option {name!r}"
    assert error.value.remedy


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_a_count_is_taken_up_to_the_rows_of_a_site(topk, out):
    config = FalqonConfig(update="rows", topk=topk)
    if topk <= out:
        assert config.rows(out) == topk
    else:
        with pytest.raises(FalqonConfigError, match=f"{topk} rows are asked, blocks.3 has {out}"):
            config.rows(out, "blocks.3")


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10_000))
def test_a_fraction_gives_at_least_one_row_and_never_too_many(fraction, out):
    rows = FalqonConfig(update="rows", topk=fraction).rows(out)
    assert isinstance(rows, int)
    assert 1 <= rows <= out
    assert abs(rows - fraction * out) <= 1


def test_without_a_count_small_layers_give_all_their_rows():
    """A router or a gate among the linear layers of a model is no reason to refuse it."""
    config = FalqonConfig(update="rows")
    assert [config.rows(out) for out in (1, 9, 10, 11, 4096)] == [1, 9, 10, 10, 10]
    spec = RowsSpec.from_config(config)
    assert parse_rows_spec(str(spec)).rows(4) == 4


def test_all_of_the_rows():
    assert (
        FalqonConfig(update="rows", topk="all").rows(7)
        == FalqonConfig(update="rows", topk=1.0).rows(7)
        == 7
    )
    assert FalqonConfig(update="rows", topk=1).rows(7) == 1


# -- torch.compile(options=...) --------------------------------------------------------------------


def test_no_options_are_the_defaults():
    assert FalqonConfig.from_options(None) == FalqonConfig.from_options({}) == FalqonConfig()


def test_keys_with_a_dot_go_to_inductor():
    config = FalqonConfig.from_options({"triton.cudagraphs": True, "seed": 3, "a.b": 1})
    assert config.inductor == {"triton.cudagraphs": True, "a.b": 1}
    assert config.seed == 3


def test_a_whole_config_stands_under_config_and_options_beside_it_win():
    base = FalqonConfig(seed=3, scale="amax", inductor={"a.b": 1, "c.d": 1})
    assert FalqonConfig.from_options({"config": base}) == base
    config = FalqonConfig.from_options({"config": base, "seed": 5, "c.d": 2})
    assert (config.seed, config.scale) == (5, "amax")
    assert config.inductor == {"a.b": 1, "c.d": 2}
    assert base.seed == 3
    assert base.inductor == {"a.b": 1, "c.d": 1}


@pytest.mark.parametrize("value", [{"topk": 3}, "default", 3])
def test_config_takes_only_a_config(value):
    with pytest.raises(FalqonConfigError, match=r"option 'config': .* is not a FalqonConfig"):
        FalqonConfig.from_options({"config": value})


def test_the_given_options_are_not_changed():
    options = {"config": FalqonConfig(), "a.b": 1, "seed": 3}
    before = dict(options)
    FalqonConfig.from_options(options)
    assert options == before


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FalqonConfig().seed = 3  # type: ignore[misc] # what is tested


def test_patterns_may_be_one_string_or_several():
    assert FalqonConfig(include="a*").include == ("a*",)
    assert FalqonConfig(include=["a", "b"]).include == ("a", "b")


@pytest.mark.parametrize(
    ("include", "exclude", "path", "taken"),
    [
        ((), (), "model.layers.0.q_proj", True),
        (("*.q_proj",), (), "model.layers.0.q_proj", True),
        (("*.q_proj",), (), "model.layers.0.k_proj", False),
        ((), ("*.q_proj",), "model.layers.0.q_proj", False),
        (("*.layers.*",), ("*.0.*",), "model.layers.0.q_proj", False),
        (("*.layers.*",), ("*.0.*",), "model.layers.1.q_proj", True),
    ],
)
def test_exclude_wins_over_include(include, exclude, path, taken):
    assert FalqonConfig(include=include, exclude=exclude).selects(path) is taken


def test_a_config_error_is_a_value_error_and_a_falqon_error():
    error = FalqonConfigError("topk", "the count 0 is below 1", "Give an int >= 1")
    assert isinstance(error, ValueError)
    assert isinstance(error, FalqonError)
    assert (error.site, error.problem) == ("option 'topk'", "the count 0 is below 1")
    assert str(error) == "option 'topk': the count 0 is below 1. Give an int >= 1."


def test_an_error_without_a_site_leaves_it_out():
    assert str(FalqonError("", "it is gone", "Look again")) == "it is gone. Look again."


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"topkk": 3}, "The nearest option is 'topk'"),
        ({"update": "rows", "topk": 0}, "the count 0 is below 1"),
        ({"topk": 3}, 'belongs to update="rows"'),
        ({"update": "columns"}, "'columns' is none of 'adapter', 'rows'"),
        ({"init": "qr"}, "'qr' is none of 'svd', 'keep'"),
    ],
)
def test_compile_reports_a_bad_option_and_changes_nothing(options: dict[str, Any], said):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=said):
        torch.compile(model, backend="falqon", options=options)(randn(2, 4))
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("mode", "kernel", "wanted"),
    [
        (None, "auto", "auto"),
        ("reduce-overhead", "auto", "auto"),
        ("max-autotune", "auto", "max-autotune"),
        ("max-autotune-no-cudagraphs", "auto", "max-autotune"),
        ("max-autotune", "triton", "triton"),
        (None, "inductor", "inductor"),
    ],
)
def test_autotuning_is_asked_for_by_inductors_mode(mode, kernel, wanted):
    spec = SiteSpec.from_config(FalqonConfig(mode=mode, kernel=kernel))
    assert spec.kernel == parse_spec(str(spec)).kernel == wanted
