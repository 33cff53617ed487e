from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx import GraphReport, Rejected, RewriteReport, Site
from falqon_fx.report import Cost, GraphBreak, Memory, Source

COST = Cost("H100", "merged", 512, 2e-3, 1e-3, 10, 9, 8, 7, 300, {512: 2.0})
SITE = Site(
    "model.layers.0.self_attn.q_proj",
    576,
    576,
    16,
    2.0,
    0.0,
    "bfloat16",
    "row pow2 apply e5m2 topk=10 stochastic seed=0 #0123456789ab",
    tokens="2*s27",
    memory=Memory(663552, 400000, 73728),
    cost=COST,
    kernel="aten",
    kernel_reason="on cpu: casts",
)
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
)
REJECTIONS = st.builds(Rejected, PATHS, TEXTS, TEXTS)


def report(*graphs: tuple[list[Site], list[Rejected]]) -> RewriteReport:
    return RewriteReport(tuple(GraphReport(tuple(s), tuple(r), 9, 3) for s, r in graphs))


def squeeze(text: str) -> str:
    """The text without what a table adds: borders, spaces and line ends."""
    return re.sub(r"[│┃\s]", "", text)


def column(text: str, title: str, index: int) -> str:
    """What a column of the table under ``title`` holds, its folds undone."""
    lines = text[text.index(title) :].splitlines()
    body = [line for line in lines[4:] if line.startswith("│")]
    return "".join(line.split("│")[index + 1] for line in body).replace(" ", "")


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
    assert "1sitesrewritten,1rejected" in text
    for part in ("576x576", "16", "2*s27", "300tokens", "2.00", LEFT.site):
        assert part in text
    assert column(str(report(([SITE], []))), "sites rewritten", 0) == SITE.path
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


def test_sites_with_a_gap_between_their_numbers_keep_their_rows():
    layers = [replace(SITE, path=f"model.layers.{i}.q_proj") for i in (0, 2)]
    text = squeeze(str(report((layers, []))))
    assert "0.q_proj" in text
    assert "2.q_proj" in text


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
    assert column(str(report(([site], []))), "sites rewritten", 0) == site.path


def test_graph_breaks_name_the_users_line():
    why = GraphBreak("a call that Dynamo skips", Source("/home/me/model.py", 7, "forward", "f(x)"))
    graphs = tuple(GraphReport((SITE,), (), 9, 3, {"match": 0.5}, end) for end in (why, None))
    text = str(RewriteReport(graphs))
    for part in ("a call that Dynamo skips", "me/model.py:7", "9 > 3", "0.50", "return"):
        assert part in text


def test_notes_are_printed():
    assert "no cache" in str(RewriteReport((), notes=("no cache",)))


def test_an_empty_report_has_a_text():
    assert "0 sites rewritten, 0 rejected" in str(RewriteReport(()))


def test_printing_writes_nothing_by_itself(capsys: pytest.CaptureFixture[str]):
    text = str(report(([SITE], [LEFT])))
    assert capsys.readouterr() == ("", "")
    assert "\x1b" not in text
