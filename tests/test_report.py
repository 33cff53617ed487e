from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falqon_fx import GraphReport, Rejected, RewriteReport, Site

SITE = Site("model.layers.0.self_attn.q_proj", 576, 576, 16, 2.0, 0.0, "bfloat16", "row pow2")
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
    st.just("row pow2"),
)


def report(*graphs: tuple[list[Site], list[Rejected]]) -> RewriteReport:
    return RewriteReport(tuple(GraphReport(tuple(s), tuple(r), 9, 3) for s, r in graphs))


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
    text = str(report(([SITE], [LEFT])))
    assert "1 sites rewritten, 1 rejected" in text
    for part in (SITE.path, "576 x 576", "16", "bfloat16", LEFT.site, "rejected"):
        assert part in text
    for word in f"{LEFT.reason}. {LEFT.remedy}.".split():
        assert word in text


@given(
    st.lists(SITES, max_size=4),
    st.lists(st.builds(Rejected, PATHS, TEXTS, TEXTS), max_size=4),
)
def test_no_line_of_the_text_is_wider_than_100_columns(sites, rejected):
    assert max(map(len, str(report((sites, rejected))).splitlines())) <= 100


@given(st.builds(Rejected, PATHS, TEXTS, TEXTS))
def test_reasons_lose_nothing_but_spaces(item):
    """Brackets and colons are text, not rich's markup."""
    lines = str(report(([], [item]))).splitlines()
    column = "".join(line.split("│", 5)[5][:-1] for line in lines if line.startswith("│"))
    assert column.replace(" ", "") == f"{item.reason}.{item.remedy}.".replace(" ", "")


def test_brackets_in_a_reason_are_kept():
    item = Rejected("a", "the weight is stored [in, out]", "Store it as [/out, in] :warning:")
    text = str(report(([], [item])))
    for part in ("[in,", "out]", "[/out,", ":warning:"):
        assert part in text


@given(SITES)
def test_long_paths_fold_and_lose_nothing(site):
    lines = str(report(([site], []))).splitlines()
    column = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert column == site.path


def test_an_empty_report_has_a_text():
    assert "0 sites rewritten, 0 rejected" in str(RewriteReport(()))


def test_printing_writes_nothing_by_itself(capsys: pytest.CaptureFixture[str]):
    text = str(report(([SITE], [LEFT])))
    assert capsys.readouterr() == ("", "")
    assert "\x1b" not in text
