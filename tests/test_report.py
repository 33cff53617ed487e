from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx import FalqonConfig, GraphReport, Rejected, RewriteReport, Site
from falqon_fx.report.compare import Change, compare
from falqon_fx.report.data import Cost, GraphBreak, Memory, Note, Source
from falqon_fx.report.report import ReportError
from falqon_fx.report.text import CAST_ERROR
from falqon_fx.report.totals import sentence
from falqon_fx.site.numerics import E4M3, E5M2, amax_to_scale, round_to_fp8

COST = Cost("H100", "merged", 512, 2e-3, 1e-3, 10, 9, 8, 7, 300, {512: 2.0})
SITE = Site(
    "model.layers.0.self_attn.q_proj",
    576,
    576,
    16,
    2.0,
    0.0,
    "bfloat16",
    "row pow2 e5m2 bfloat16 auto fast auto #0123456789ab",
    tokens="2*s27",
    adapter_dtype="float32",
    train_a=True,
    train_b=True,
    memory=Memory(663552, 400000, 73728),
    cost=COST,
    kernel="aten",
    kernel_reason="on cpu: casts",
)
FROZEN = replace(SITE, path="model.layers.0.mlp.up_proj", adapters=0, rank=0, scaling=0.0)
FROZEN = replace(FROZEN, train_a=False, train_b=False)
LEFT = Rejected("model.embed", "it adapts an embedding, not a linear", "The layer runs as it was")

PATHS = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=300)
PRINTED = st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"])
TEXTS = st.text(PRINTED, min_size=1, max_size=300)
SITES = st.builds(
    Site,
    PATHS,
    st.integers(1, 10**7),
    st.integers(1, 10**7),
    st.integers(1, 4096),
    st.floats(allow_nan=False),
    st.floats(0, 1),
    st.sampled_from(["bfloat16", "float32", "float16"]),
    st.just(SITE.spec),
    tokens=st.just("s0*s1"),
    memory=st.builds(Memory, *[st.integers(1, 10**12)] * 3),
    cost=st.none() | st.just(COST),
    adapters=st.integers(0, 3),
    train_a=st.booleans(),
    train_b=st.booleans(),
)
REJECTIONS = st.builds(Rejected, PATHS, TEXTS, TEXTS)


def report(
    *graphs: tuple[list[Site], list[Rejected]], left: Sequence[Rejected] = (), **options: str
) -> RewriteReport:
    made = (GraphReport(tuple(s), tuple(r), 9, 3, left=tuple(left)) for s, r in graphs)
    return RewriteReport(tuple(made), options)


def squeeze(text: str) -> str:
    """The text without what a table adds: borders, spaces and line ends."""
    return re.sub(r"[│┃\s]", "", text)


def column(text: str, title: str, index: int) -> str:
    """What a column of the table under ``title`` holds, its folds undone."""
    return "".join(column_lines(text, title, index)).replace(" ", "")


def column_lines(text: str, title: str, index: int) -> list[str]:
    """A column of the table under ``title``, line by line."""
    lines = text[text.index(title) :].splitlines()
    table = itertools.dropwhile(lambda line: not line.startswith("┡"), lines)
    rows = itertools.takewhile(lambda line: not line.startswith("└"), table)
    body = [line for line in rows if line.startswith("│")]
    return [line.split("│")[index + 1].strip() for line in body]


def test_a_rejected_site_reads_as_site_reason_remedy():
    assert str(LEFT) == (
        "model.embed: it adapts an embedding, not a linear. The layer runs as it was."
    )


def test_sites_and_rejections_of_all_graphs_come_in_order():
    other = Rejected("b", "reason", "remedy")
    all_of_them = report(([SITE], [LEFT]), ([], [other]), ([SITE], []))
    assert all_of_them.sites == (SITE, SITE)
    assert all_of_them.rejected == (LEFT, other)
    assert len(all_of_them.graphs) == 3


def test_the_text_names_each_site_with_its_numbers_and_each_reason():
    text = squeeze(str(report(([SITE], [LEFT]))))
    assert "1siterewritten(1withanadapter),1rejected,0left" in text
    for part in ("576x576", "16", "2*s27", "300tokens", "2.00", LEFT.site):
        assert part in text
    assert column(str(report(([SITE], []))), "rewritten (", 0) == SITE.path
    for word in f"{LEFT.reason} {LEFT.remedy}".split():
        assert word in text


def test_totals_are_sums_over_the_sites():
    twin = replace(SITE, path=SITE.path.replace("0", "1"))
    text = str(report(([SITE, SITE, twin], [])))
    # One weight is kept once, however often it is used; its time is spent each time.
    before, after = (2 * (663552 + 73728), 2 * (400000 + 73728))
    assert f"{before / 1e6:.6g} MB before, {after / 1e6:.6g} MB after" in text
    assert "predicted for H100 (merged): 6 ms" in text
    assert "3 ms after (2.00 times as fast)" in text.replace("\n", "")


def test_equal_sites_of_many_layers_share_a_row():
    layers = [replace(SITE, path=f"model.layers.{i}.q_proj", group=i) for i in range(80)]
    text = squeeze(str(report((layers, []))))
    assert "pathsbelowmodel.layers" in text
    assert "{0..79}.q_proj" in text
    assert text.count("q_proj") == 1
    different = [*layers[:3], replace(layers[3], rank=8)]
    text = squeeze(str(report((different, []))))
    assert "{0..2}.q_proj" in text
    assert "3.q_proj" in text


@pytest.mark.parametrize(
    ("pattern", "numbers", "shown"),
    [
        ("model.layers.{}.q_proj", [(0,), (2,), (5,), (6,)], ["{0,2,5..6}.q_proj"]),
        (
            "model.layers.{}.experts.{}.w1",
            [(i, j) for i in (0, 1) for j in range(8)],
            ["{0..1}.experts.{0..7}.w1"],
        ),
        ("model.layers.{}.w.{}.up", [(0, 0), (1, 1)], ["0.w.0.up", "1.w.1.up"]),
    ],
)
def test_a_row_stands_for_all_the_paths_that_it_names_and_no_other(pattern, numbers, shown):
    paths = [pattern.format(*each) for each in numbers]
    layers = [replace(SITE, path=path) for path in paths]
    table = column(str(report((layers, []))), "rewritten (", 0)
    assert table == "".join(shown)


def test_each_use_of_a_layer_has_its_row():
    table = column(str(report(([SITE, SITE], []))), "rewritten (", 0)
    assert table == 2 * SITE.path


def test_a_layer_that_two_graphs_refuse_counts_and_stands_once():
    text = str(report(([], [LEFT]), ([], [LEFT])))
    assert "1 rejected" in text
    assert column(text, "left exactly", 0) == LEFT.site


def test_layers_that_are_left_for_one_reason_share_a_row():
    heads = [Rejected(f"model.{n}", "it is an output head", "It runs as it was") for n in "ab"]
    small = Rejected("model.gate", "it is too small to gain (8 x 64)", "It runs as it was")
    text = str(report(([SITE], []), left=[*heads, small]))
    assert "0 rejected, 3 left" in text
    lines = text[text.index("frozen layers that stay") :].splitlines()
    (row,) = [line for line in lines if "output head" in line]
    assert "model.a, model.b" in row
    assert sum("too small" in line for line in lines) == 1
    assert column(text, "frozen layers that stay", 2) == 2 * "Itrunsasitwas"


def test_the_text_says_what_trains_and_what_is_constant():
    """A column says it per site only where sites differ."""
    text = str(report(([SITE, FROZEN], [])))
    assert "2 sites rewritten (1 with an adapter)" in text
    assert "trains: A and B of 1 site\n" in text
    assert "constant: W of 2 sites, cast to FP8 (E4M3) once" in text
    assert column(text, "rewritten (", 2) == "r16,s2none"
    fixed_a = replace(SITE, path="model.k_proj", train_a=False)
    text = str(report(([SITE, fixed_a, FROZEN], [])))
    assert "trains: A and B of 1 site, B of 1 site\n" in text
    assert column(text, "rewritten (", 3) == "A,BB-"


def test_several_adapters_show_their_number_and_common_rank():
    text = str(report(([replace(SITE, adapters=2, rank=24)], [])))
    assert column(text, "rewritten (", 2) == "2ofr24inall"


def test_with_update_rows_the_text_says_that_w_is_written():
    text = str(report(([replace(SITE, train_a=False), FROZEN], []), update="rows", topk="10"))
    assert "trains: B of 1 site: each step is written into W row by row" in text
    assert "constant: W of 1 site" in text
    assert "options: update=rows topk=10 granularity=row" in text


@pytest.mark.parametrize("kind", ["e4m3", "e4m3 heavy", "e5m2", "e5m2 heavy", "int8"])
def test_the_stated_cost_of_a_cast_is_what_a_cast_costs(kind):
    """|dq(q(x)) - x| / |x| of normal and heavy-tailed rows, to the digits that are printed."""
    fp8, _, heavy = kind.partition(" ")
    dtype = {"e4m3": E4M3, "e5m2": E5M2, "int8": torch.int8}[fp8]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator)
    if heavy:  # Student's t of four degrees: a normal over the root of a mean of four squares
        x /= torch.randn(4, 64, 4096, generator=generator).square().mean(0).sqrt()
    scale = amax_to_scale(x.abs().amax(1, keepdim=True), dtype, "amax" if fp8 == "int8" else "pow2")
    off = (round_to_fp8(x / scale, dtype) * scale - x).norm() / x.norm()
    assert abs(float(off) - CAST_ERROR[fp8]) < 0.001
    site = SITE if fp8 != "int8" else replace(SITE, spec=SITE.spec.replace(" #", " int8 #"))
    assert f"{CAST_ERROR[fp8]:.1%}" in str(report(([site], [])))


def test_options_go_by_the_names_of_the_config():
    known = [field.name for field in dataclasses.fields(FalqonConfig)]
    assert set(SITE.options) <= set(known)
    assert SITE.options["grad_dtype"] == "e5m2"


@given(st.lists(SITES, max_size=4), st.lists(REJECTIONS, max_size=4))
def test_no_line_of_the_text_is_wider_than_100_columns(sites, rejected):
    assert max(map(len, str(report((sites, rejected))).splitlines())) <= 100


@given(REJECTIONS)
def test_reasons_lose_nothing_but_spaces(item):
    """Brackets and colons are text, not rich's markup."""
    text = str(report(([], [item])))
    assert squeeze(item.reason) in column(text, "left exactly", 1) or "│" in item.reason
    assert squeeze(item.remedy) in column(text, "left exactly", 2)


def test_brackets_in_a_reason_are_kept():
    item = Rejected("a", "the weight is stored [in, out]", "Store it as [/out, in] :warning:")
    text = str(report(([], [item])))
    for part in ("[in,", "out]", "[/out,", ":warning:"):
        assert part in text


@given(SITES)
def test_long_paths_fold_and_lose_nothing(site):
    assert column(str(report(([site], []))), "rewritten (", 0) == site.path


@given(st.from_regex(r"([abc019]{1,16}[._/]){0,11}[abc019]{1,16}", fullmatch=True))
def test_no_path_breaks_in_mid_word_in_80_columns(path):
    """Names of models have at most sixteen letters between dots and underscores."""
    left = Rejected(path, f"{path} is no linear layer", f"Leave out {path}")
    with mock.patch.dict(os.environ, COLUMNS="80"):
        text = str(report(([replace(SITE, path=path)], [left])))
    assert max(map(len, text.splitlines())) <= 80
    for title, index in (("rewritten (", 0), *(("left exactly", i) for i in range(3))):
        lines = list(filter(None, column_lines(text, title, index)))
        for line, following in itertools.pairwise(lines):
            at_a_space = f"{line} {following}" in f"{left.reason} | {left.remedy}"
            assert at_a_space or line.endswith((".", "_", "/"))
    assert column(text, "rewritten (", 0) == column(text, "left exactly", 0) == path


def test_graph_breaks_name_the_users_line():
    why = GraphBreak("a call that Dynamo skips", Source("/home/me/model.py", 7, "forward", "f(x)"))
    graphs = tuple(
        GraphReport((SITE,), (), 9, 3, pass_seconds={"match": 0.5}, ended_by=end)
        for end in (why, None)
    )
    text = str(RewriteReport(graphs))
    for part in ("a call that Dynamo skips", "me/model.py:7", "9 > 3", "0.50", "return"):
        assert part in text


def test_graphs_that_end_at_one_line_share_a_row():
    why = GraphBreak("a break", Source("/home/me/model.py", 7, "forward", "f(x)"))
    ends = [why, None, why, why]
    graphs = tuple(GraphReport((SITE,), (), 9, 3, ended_by=end) for end in ends)
    text = str(RewriteReport(graphs))
    assert column(text, "\ngraphs", 0) == "0,2..31"
    assert column(text, "\ngraphs", 2) == "27>99>3"


def test_notes_are_printed():
    assert "no cache" in str(RewriteReport((), notes=("no cache",)))


def test_notes_of_passes_are_printed_once_for_each_site_and_survive_json():
    notes = tuple(Note(site, "few tokens") for site in ("a.q", "a.k"))
    made = RewriteReport((GraphReport((SITE,), (), 9, 3, notes=notes),) * 2)
    text = str(made)
    assert [text.count(f"{note.site}: few tokens.") for note in notes] == [1, 1]
    assert RewriteReport.from_json(made.to_json()) == made


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("rank",), "4", "graphs.0.sites.0.rank: Input should be a valid integer"),
        (("rank",), True, "sites.0.rank: Input should be a valid integer"),
        (("rank",), -1, "sites.0.rank: Input should be greater than or equal to 0"),
        (("rank",), 2**63, "sites.0.rank: Input should be less than"),
        (("out_features",), 0, "sites.0.out_features: Input should be greater than 0"),
        (("scaling",), float("nan"), "sites.0.scaling: Input should be a finite number"),
        (("scaling",), 10**400, "sites.0.scaling: Input should be a finite number"),
        (("path",), None, "sites.0.path: Input should be a valid string"),
        (("nodes",), "abc", "sites.0.nodes: Input should be a valid array"),
        (("nodes",), [1], "sites.0.nodes.0: Input should be a valid string"),
        (("cost",), 3, "sites.0.cost: Input should be an object"),
        (("cost", "speedup"), {"x": 2.0}, "sites.0.cost.speedup.x.[key]: Input should be a valid"),
        (("cost", "seconds_after"), 0.0, "cost.seconds_after: Input should be greater than 0"),
        (("memory", "base"), -5, "memory.base: Input should be greater than or equal to 0"),
        (("spec",), "row", "the spec of site"),
    ],
)
def test_a_report_of_wrong_types_or_values_is_refused_by_place(place, value, said):
    made = RewriteReport((GraphReport((SITE,), (), 9, 3),))
    tree = json.loads(made.to_json())
    parent = tree["graphs"][0]["sites"][0]
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    with pytest.raises(ReportError, match=r"^r\.json: is no report \(") as caught:
        RewriteReport.from_json(json.dumps(tree), "r.json")
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "3", '{"schema": 2}', '{"schema": 1}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(ReportError, match=r"^the report: is no report"):
        RewriteReport.from_json(text)


def test_a_report_from_before_passes_had_notes_is_read():
    made = RewriteReport((GraphReport((SITE,), (), 9, 3),))
    tree = json.loads(made.to_json())
    del tree["graphs"][0]["notes"]
    assert RewriteReport.from_json(json.dumps(tree)) == made


def test_an_empty_report_has_a_text():
    assert str(RewriteReport(())) == "0 sites rewritten (0 with an adapter), 0 rejected, 0 left\n"


def test_printing_writes_nothing_by_itself(capsys: pytest.CaptureFixture[str]):
    text = str(report(([SITE], [LEFT])))
    assert capsys.readouterr() == ("", "")
    assert "\x1b" not in text


# -- two reports -----------------------------------------------------------------------------------


def test_equal_reports_have_no_difference():
    one = report(([SITE], [LEFT]))
    assert compare(one, report(([SITE], [LEFT]))).changes == ()
    assert str(compare(one, one)) == "No difference.\n"


def test_a_comparison_says_what_became_of_each_layer():
    layers = [replace(SITE, path=f"model.layers.{i}.q_proj", group=i) for i in range(3)]
    faster = [replace(s, spec=SITE.spec.replace("e5m2", "e4m3")) for s in layers]
    gone = Rejected(FROZEN.path, "it is too small", "Leave it")
    found = compare(report(([*layers, FROZEN], [])), report((faster, [gone]), extra="1"))
    (state,) = (change for change in found.changes if change.what == "state")
    assert (state.path, state.before) == (FROZEN.path, "FP8, frozen")
    assert state.after == "rejected: it is too small"
    others = [change for change in found.changes if change is not state]
    wanted = ("option grad_dtype", "e5m2", "e4m3")
    assert others == [Change(site.path, *wanted) for site in layers]
    assert {total.what for total in found.totals} == {
        "layers", "weights once prepared", "predicted for a step", "option extra",
    }  # fmt: skip
    text = str(found)
    assert text.count("q_proj") == 1
    assert "{0..2}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_layer_that_one_report_has_not_is_not_there():
    (change,) = compare(report(([SITE], [])), report(([], []))).changes
    assert (change.what, change.after) == ("state", "not there")


def test_the_sentence_says_what_happens_to_the_model():
    said = sentence(report(([SITE, FROZEN], [LEFT])))
    assert said == (
        "2 layers run in FP8, 1 with an adapter and 1 frozen; 1 rejected, 0 left as it was; "
        "their weights take 0.9475 MB instead of 1.475 MB once prepared; a step in them is "
        "predicted to take 2 ms instead of 4 ms on H100."
    )
