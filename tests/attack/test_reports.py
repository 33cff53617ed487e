"""Reports that nobody should trust: read from a file, shown in each view, made into a program."""

from __future__ import annotations

import copy
import html
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falqon_fx import FalqonError, GraphReport, Rejected, RewriteReport, Site
from falqon_fx.report.data import Cost, GraphBreak, Line, Memory, Note, Source
from falqon_fx_cli.main import main
from tests.attack.harness import places
from tests.hostile import NAMES, TEXTS, obeyed

pytestmark = pytest.mark.slow

CRAFTED = 2000
SPEC = "row pow2 e5m2 bfloat16 auto fast auto #0123456789ab"


def whole() -> RewriteReport:
    """A report with all that one can hold."""
    at = Source("/home/me/model.py", 7, "forward", "f(x)")
    cost = Cost("H100", "merged", 512, 2e-3, 1e-3, 10, 9, 8, 7, 300, {512: 2.0, 1024: 2.5})
    sites = [
        Site(
            f"model.layers.{i}.q_proj",
            *(64, 32, 4, 2.0, 0.1, "bfloat16", SPEC, at),
            x_shape=("s77", "32"),
            tokens="s77",
            tokens_hint=8,
            x_dtype="bfloat16",
            base_dtype="bfloat16",
            adapter_dtype="float32",
            group=i,
            device="cuda",
            architecture=90 * i,
            kernel=("aten", "triton:some_kernel")[i],
            kernel_reason="it is the fastest",
            memory=Memory(663552, 400000, 73728),
            cost=cost,
            nodes=(f"linear_{i}",),
        )
        for i in range(2)
    ]
    left = Rejected("model.head", "it is a head", "It runs as it was", at)
    before = tuple(Line(f"linear_{i}", f"linear_{i} = linear(x, W)", ("x",)) for i in range(2))
    x, out = Line("x", "x: bf16[4, 32]"), Line("output", "return linear_1", ("linear_1",))
    op = Line("merged", "merged = falqon.merged_linear(x, W)", ("x",))
    graph = GraphReport(
        *(tuple(sites), (left,), 9, 3, (left,), (Note("model.q_proj", "few tokens"),)),
        pass_seconds={"match": 0.5},
        ended_by=GraphBreak("a break", at),
        before=(x, *before, out),
        after=(x, op, out),
    )
    modules = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.head")
    return RewriteReport((graph,), {"update": "adapter"}, modules, ("a note",))


WHOLE = json.loads(whole().to_json(graphs=True))


PLACES = [*places(WHOLE)]
NESTED: Any = "x"
for _ in range(200):
    NESTED = [NESTED]
VALUES = st.one_of(
    TEXTS,
    st.sampled_from([None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -0.0, [], {}, [[]], NESTED]),
    st.floats(),
    st.integers(),
    st.dictionaries(TEXTS, st.integers(), max_size=3),
    st.lists(TEXTS, max_size=3),
    st.sampled_from(PLACES).map(lambda place: _get(WHOLE, place)),  # another part of a report
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["set", "delete", "add"]), VALUES),
    min_size=1,
    max_size=4,
)


def _get(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def changed(changes: list[tuple[tuple[Any, ...], str, Any]]) -> str:
    """The report with some of its values changed; a change that no longer has a place is none."""
    tree = copy.deepcopy(WHOLE)
    for (*above, key), how, value in changes:
        try:
            parent = _get(tree, tuple(above))
            if how == "delete":
                del parent[key]
            elif how == "add" and isinstance(parent, list):
                parent.append(value)
            elif how == "add":
                parent[str(value)[:50]] = value
            else:
                parent[key] = value
        except (LookupError, TypeError):
            continue
    return json.dumps(tree)


def look_at(text: str) -> None:
    """Read a report and show it in every way; what can't be shown is refused by name."""
    refused = ""
    try:
        report = RewriteReport.from_json(text, "evil.json")
    except FalqonError as error:
        refused = str(error)
    if refused:
        assert refused.startswith("evil.json: is no report")
        assert not obeyed(refused)
        return
    assert RewriteReport.from_json(report.to_json(graphs=True)) == report
    drawn = [shown(report.to_svg, site.path) for site in report.sites]
    for text in (str(report), shown(report.to_diff), shown(report.to_html), *drawn):
        assert not obeyed(text)
    assert "<script>alert" not in "".join([shown(report.to_html), *drawn])


def shown(view: Callable[..., str], *args: str) -> str:
    """What a view shows, or why it shows nothing."""
    try:
        return view(*args)
    except FalqonError as error:
        return html.escape(str(error))


@settings(max_examples=CRAFTED)
@given(CHANGES)
def test_a_crafted_report_is_shown_or_refused(changes):
    look_at(changed(changes))


@settings(max_examples=CRAFTED // 2)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_report_is_shown_or_refused(place, byte):
    text = bytearray(json.dumps(WHOLE).encode())
    text[place % len(text)] = byte
    look_at(text.decode(errors="replace"))


@settings(max_examples=CRAFTED // 8)
@given(st.integers(0, 10**6))
def test_a_cut_report_is_refused(place):
    text = json.dumps(WHOLE)
    with pytest.raises(FalqonError, match=r"^evil\.json: is no report"):
        RewriteReport.from_json(text[: place % len(text)], "evil.json")


@settings(max_examples=CRAFTED // 8)
@given(CHANGES)
def test_the_commands_take_a_crafted_report_or_exit_with_1(tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("report")
    file = folder / "evil.json"
    file.write_text(changed(changes))
    for words in (["repro", "--write", str(folder / "r.py")], ["kernels"], ["kernels", "--source"]):
        assert main([words[0], str(file), *words[1:]]) in (0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_in_each_place(name):
    for place in PLACES:
        look_at(changed([(place, "set", name)]))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "null", "3", '"x"', "[]"])
def test_what_is_no_report_at_all_is_refused(text, tmp_path, capsys):
    look_at(text)
    file = tmp_path / "evil.json"
    file.write_text(text)
    assert main(["repro", str(file)]) == 1
    assert capsys.readouterr().err.startswith(f"falqon-fx: {file}: is no report")
