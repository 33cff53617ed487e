from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import falqon_fx
from falqon_fx import FalqonConfig, FalqonError, RewriteReport
from falqon_fx.report.data import Audit, CastAudit, Line
from falqon_fx.report.totals import sentence
from falqon_fx.report.views import around, layout, near, replacing, rows, stretch
from tests.browser import needs_chromium, opened
from tests.models import LoraLinear, Stack


class Mixed(nn.Module):
    """Two blocks with adapters, a frozen layer beside them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(width=64, hidden=96)
        self.between = nn.Linear(64, 64).requires_grad_(False)
        self.lm_head = nn.Linear(64, 80).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.between(self.stack(x)))


@pytest.fixture(scope="module")
def mixed() -> RewriteReport:
    config = FalqonConfig(card="H100", exclude=("*.1.down",))
    return falqon_fx.explain(Mixed(), torch.randn(3, 64), config=config)


@pytest.fixture(scope="module")
def report() -> RewriteReport:
    config = FalqonConfig(card="H100", exclude=("*.1.down",))
    return falqon_fx.explain(Stack(), torch.randn(3, 32), config=config)


def audits(site: str) -> list[Audit]:
    return [
        Audit(site, i, 1.0, 0.9, 0.1, 0, 2.5, 0.0, 0.25, 48, tuple(range(i, i + 10)))
        for i in range(1, 6)
    ]


def test_rows_keep_both_listings_in_order(report):
    (graph,) = report.graphs
    found = rows(graph)
    assert tuple(row.before for row in found if row.before) == graph.before
    assert tuple(row.after for row in found if row.after) == graph.after
    gone = {row.node for row in found if row.kind == "gone"}
    assert gone == {name for site in graph.sites for name in site.nodes}
    new = [row for row in found if row.kind == "new"]
    assert sum("falqon.merged_linear(" in row.after.text for row in new if row.after) == 3


def test_around_a_site_lie_all_its_nodes_and_its_op(report):
    (graph,) = report.graphs
    found = rows(graph)
    for site in graph.sites:
        first, last = around(found, site.nodes)
        part = found[first:last]
        assert set(site.nodes) <= {row.node for row in part}
        assert any(row.after and "merged_linear" in row.after.text for row in part)
        assert last - first < len(found) / 2


class Siblings(nn.Module):
    """Three layers that read one input: one op, where the first of them stands."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = LoraLinear(64, 64), LoraLinear(64, 64)
        self.k = nn.Linear(64, 64, bias=False)
        self.k.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.relu(torch.sigmoid(torch.tanh(self.q(x))))
        k = torch.relu(torch.sigmoid(torch.tanh(self.k(x))))
        return q + k + self.v(x)


def test_siblings_show_the_op_that_they_share():
    config = FalqonConfig(card="H100")
    report = falqon_fx.explain(Siblings(), torch.randn(3, 64), config=config)
    (graph,) = report.graphs
    assert {site.group for site in graph.sites} == {0}
    for site in graph.sites:
        new = replacing(graph, found := rows(graph), site)
        assert "falqon.merged_linear(" in new[0].after.text
        assert [row.node for row in new[1:]] == [f"getitem_{i}" for i in range(6, 9)]
        part = stretch(graph, found, site)
        assert set(site.nodes) <= {row.node for row in part}
        assert [row for row in part if row.kind == "new"] == new
        image = ElementTree.fromstring(report.to_svg(site.path))
        names = {"s": "http://www.w3.org/2000/svg"}
        assert len(image.findall(".//s:g[@class='new']", names)) == 4


def test_the_diff_folds_what_stays_and_fits(report):
    text = report.to_diff(width=120)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert any(re.fullmatch(r"  \.\.\. \d+ unchanged", line) for line in lines)
    assert sum(line.startswith("-") for line in lines) == sum(len(s.nodes) for s in report.sites)
    hidden = sum(int(line.split()[1]) for line in lines if line.startswith("  ..."))
    assert hidden + len(lines) - 1 - text.count("unchanged") == len(rows(report.graphs[0]))


def test_a_sites_own_parameters_are_named_from_the_site_on(report):
    (graph,) = report.graphs
    site = graph.sites[0]
    text = "\n".join(line.text for line in near(site, graph.before))
    assert re.search(r"linear\(\w+, base_layer\.weight, None\)", text)


def test_svg_shows_the_nodes_of_a_site(report):
    image = report.to_svg("blocks.0.up")
    root = ElementTree.fromstring(image)
    names = {"s": "http://www.w3.org/2000/svg"}
    titles = [t.text or "" for t in root.findall(".//s:g/s:title", names)]
    (site,) = [s for s in report.sites if s.path == "blocks.0.up"]
    assert len(root.findall(".//s:g[@class='gone']", names)) == len(site.nodes)
    assert any("falqon.merged_linear" in title for title in titles)
    assert any("lora_A.weight" in title for title in titles)
    with pytest.raises(FalqonError, match=r"nearest is 'blocks\.0\.up'"):
        report.to_svg("blocks.0.upp")


def test_a_drawing_has_three_boxes_a_row_and_what_is_read_above():
    inputs = [Line(f"w{i}", f"w{i} = x") for i in range(7)]
    names = tuple(line.node for line in inputs)
    lines = [*inputs, Line("op", "op = f(...)", names), Line("out", "out = g(op)", ("op",))]
    boxes = layout(lines, {"op", "out"})
    at = {box.line.node: (box.row, box.column) for box in boxes}
    assert sorted(at[name] for name in names) == [(i // 3, i % 3) for i in range(7)]
    assert (at["op"], at["out"]) == ((3, 0), (4, 0))
    reads = {box.line.node: {boxes[i].line.node for i in box.reads} for box in boxes}
    assert reads == {**{name: set() for name in names}, "op": {*names}, "out": {"op"}}


class Links(HTMLParser):
    """Everything that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]


def test_the_page_loads_nothing_and_its_data_cannot_end_the_script(report):
    evil = replace(report.sites[0], path="</script><script>alert(1)</script>")
    graph = replace(report.graphs[0], sites=(evil, *report.sites[1:]))
    page = replace(report, graphs=(graph,)).to_html()
    assert Links(page).found == []
    assert "@import" not in page
    assert "url(" not in page
    assert "<script>alert" not in page


@needs_chromium
def test_the_map_shows_every_module_and_its_state(mixed, tmp_path):
    dom = opened(mixed.to_html(), tmp_path)
    found = re.findall(r'<(?:button|i) class="cell ([a-z]+)"', dom)
    wanted = {"adapter": 3, "rejected": 1, "frozen": 1, "left": 1, "untouched": 2}  # two norms
    assert Counter(found) == wanted
    assert "4 sites rewritten (3 with an adapter), 1 rejected, 1 left" in dom
    # The two blocks have the same modules: one line of names for both.
    (names,) = re.findall(r'<div class="block names".*?</div>', dom)
    assert re.findall(r"<i>(\w+)</i>", names) == ["norm", "up", "down"]
    assert re.findall(r'<span title="[\w.]+">([\w.]+)</span>', dom) == ["blocks.0", "blocks.1"]


@needs_chromium
def test_the_map_shows_what_the_casts_cost_over_two_powers_of_ten(mixed, tmp_path):
    costs = {"between": 1e-3, "stack.blocks.0.up": 1e-4, "stack.blocks.0.down": 1e-6}
    page = replace(mixed, sensitivity=costs).to_html()
    dom = opened(page, tmp_path)
    heat = r'title="(\w+): \w+, casts cost (\S+) nats" data-heat="(\d+)"'
    wanted = {("between", "0.001", "100"), ("up", "0.0001", "50"), ("down", "0.000001", "0")}
    assert {*re.findall(heat, dom)} == wanted
    assert 'aria-label="Layers of the model" class="heat"' in dom
    last = 'document.querySelectorAll(".layers th button")[7].click();'
    dom = opened(page, tmp_path, f'document.getElementById("heat").click();{last}{last}')
    assert 'class="heat"' not in dom
    paths = re.findall(r'<tr><td><button title="([\w.]+)">', dom)
    assert paths[:3] == list(costs)
    assert "casts cost" not in mixed.to_html().split("<script>")[0]


@needs_chromium
@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("between", ["constant", "none: a frozen layer", "falqon.merged_linear("]),
        ("stack.blocks.0.up", ["constant", "rank 4, scaling 2, float32; A and B train"]),
        ("lm_head", ["it is an output head"]),
        ("stack.blocks.1.down", ["exclude= leaves it out"]),
    ],
)
def test_a_layer_says_what_is_constant_what_trains_and_why_it_stays(mixed, tmp_path, path, texts):
    dom = opened(mixed.to_html(), tmp_path, fragment=path)
    section = dom[dom.index(f"<h2>{path}</h2>") :]
    for text in texts:
        assert text in section[: section.index("</section>")], text


def test_with_update_rows_a_layer_says_that_its_weight_is_written():
    model = Stack()
    for block in model.blocks:
        for layer in (block.up, block.down):
            layer.lora_A.requires_grad_(False)
    found = falqon_fx.explain(model, torch.randn(3, 32), config=FalqonConfig(update="rows"))
    page = found.to_html()
    assert "each step is written into it row by row" in page
    assert "B trains" in page
    assert "topk=None" in page


@needs_chromium
def test_a_link_opens_a_site_with_graph_kernel_costs_and_live_state(report, tmp_path):
    page = report.to_html(audits("blocks.0.up"))
    dom = opened(page, tmp_path, fragment="blocks.0.up")
    for text in (
        "<h2>blocks.0.up</h2>",
        "Predicted speed-up by tokens",
        "Graph, before and after",
        'aria-label="the graph before: ',
        '<g class="gone">',
        '<g class="new">',
        "falqon.merged_linear(",
        "Kernel: triton:",
        '<span class="k">def</span>',
        "50, 10 in the last step",
        'aria-label="times as fast by tokens"',
        'aria-label="norm of ΔW by optimizer step"',
        'aria-label="% of elements written by optimizer step"',
        "25.00 %",
        "<canvas",
    ):
        assert text in dom, text


@needs_chromium
def test_the_history_of_the_default_is_drawn_for_a_layer_and_for_all(report, tmp_path):
    """By step, with names and units on the axes."""
    paths = "blocks.0.up", "blocks.0.down"
    history = [
        CastAudit(path, i, 0.02, 0.001 * i, 0.01 * i, i) for i in range(1, 6) for path in paths
    ]
    page = report.to_html(history)
    of_one, of_all = opened(page, tmp_path, fragment=paths[0]), opened(page, tmp_path)
    for dom in (of_one, of_all):
        for label in ("% that the cast takes", "s·B·A in % of W", "elements clamped"):
            assert f'aria-label="{label} by optimizer step"' in dom
    assert "5 elements" in of_one
    assert "0.500 % off" in of_one
    assert "Casts of all adapters" in of_all
    largest = re.findall(r'aria-label="elements clamped by.*?</svg>', of_all, re.DOTALL)[0]
    assert ">10.0</text>" in largest  # five of each of two layers


@needs_chromium
def test_the_page_begins_with_one_sentence_and_a_table_that_sorts(mixed, tmp_path):
    def column(dom: str) -> list[str]:
        return re.findall(r'<tr><td><button title="([\w.]+)">', dom)

    dom = opened(mixed.to_html(), tmp_path)
    assert sentence(mixed) in dom
    listed = {*(s.path for s in mixed.sites), *(r.site for r in (*mixed.rejected, *mixed.left))}
    assert sorted(column(dom)) == sorted(listed)
    sort = 'document.querySelectorAll(".layers th button")[3].click();'
    rising = opened(mixed.to_html(), tmp_path, sort)
    ranks = re.findall(r'<td class="number">(\d+)</td>', rising)
    assert 'aria-sort="ascending"' in rising
    assert column(rising)[0] == "between"  # the frozen one has rank 0
    falling = opened(mixed.to_html(), tmp_path, sort + sort)
    assert column(falling)[0].startswith("stack.blocks.")
    assert ranks
    escape = 'document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));'
    assert column(opened(mixed.to_html(), tmp_path, escape, "between")) == column(dom)


BROKEN = r"""
const broken = [], walk = document.createTreeWalker(document.querySelector("main"), 4);  // text
while (walk.nextNode()) {
    const node = walk.currentNode, holder = node.parentElement;
    const upright = getComputedStyle(holder).writingMode !== "horizontal-tb";
    if (upright || !holder.checkVisibility()) continue;
    for (const word of node.data.matchAll(/[A-Za-z0-9]+/g)) {
        const range = document.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        const lines = new Set([...range.getClientRects()].map((box) => box.top));
        if (lines.size > 1) broken.push(word[0]);
    }
}
parent.postMessage(`${innerWidth} ${document.documentElement.scrollWidth} [${broken}]`, "*");
"""


@needs_chromium
@pytest.mark.parametrize("fragment", ["", "stack.blocks.0.up"])
def test_it_fits_420_pixels_and_breaks_no_word(mixed, tmp_path, fragment):
    """A word has no dot, slash or underscore in it. No window is that narrow, but a frame is."""
    page = mixed.to_html(audits("stack.blocks.0.up"))
    (tmp_path / "framed.html").write_text(
        page.replace("</body>", f"<script>{BROKEN}</script></body>")
    )
    listen = "onmessage = (event) => { document.title = event.data; };"
    frame = f'<iframe width="420" height="900" src="framed.html#{fragment}"></iframe>'
    outer = f"<body><script>{listen}</script>{frame}</body>"
    dom = opened(outer, tmp_path, flags=["--virtual-time-budget=5000"])
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None
    inner, wide, *broken = title[1].split(" ")
    assert int(inner) <= 420
    assert int(wide) <= int(inner)
    assert broken == ["[]"]


@needs_chromium
def test_arrow_keys_go_from_site_to_site(report, tmp_path):
    press = 'document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));'
    look = 'document.title = document.querySelector("h2").textContent;'
    assert "<title>blocks.0.up</title>" in opened(report.to_html(), tmp_path, press + look)
    dom = opened(report.to_html(), tmp_path, press * 4 + look)
    assert "<title>blocks.1.down</title>" in dom
    assert "exclude= leaves it out" in dom


@needs_chromium
def test_a_click_opens_a_site_and_sets_the_address(report, tmp_path):
    click = 'document.querySelectorAll("button.cell")[1].click(); document.title = location.hash;'
    dom = opened(report.to_html(), tmp_path, click)
    assert "<title>#blocks.0.down</title>" in dom
    assert "<h2>blocks.0.down</h2>" in dom


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_chromium
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_page_is_readable_in_light_and_dark(report, tmp_path, scheme):
    """Contrast of text, faint text, highlighted source and comments: WCAG 2.2's AA, 4.5 to 1."""
    look = """document.title = ["body", ".legend", "pre.code", "pre.code .k", "pre.code .c1"]
        .map((name) => getComputedStyle(document.querySelector(name)).color)
        .concat(["body", "pre.code"].map((name) =>
            getComputedStyle(document.querySelector(name)).backgroundColor)).join(";");"""
    flags = [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    dom = opened(report.to_html(), tmp_path, look, "blocks.0.up", flags)
    title = re.search(r"<title>(.*)</title>", dom)
    assert title is not None
    *texts, page, panel = map(luminance, title[1].split(";"))
    assert (page > 0.5) == (scheme == "light")
    for text, ground in zip(texts, (page, page, panel, panel, panel), strict=True):
        high, low = max(text, ground), min(text, ground)
        assert (high + 0.05) / (low + 0.05) >= 4.5


@needs_chromium
def test_280_sites_open_within_a_second(report, tmp_path):
    """The page's own clock, from the start of navigation to the drawn map."""
    (graph,) = report.graphs
    graphs, modules = [], []
    for i in range(94):
        sites = tuple(replace(s, path=s.path.replace("blocks", f"layers.{i}")) for s in graph.sites)
        graphs.append(replace(graph, sites=sites, rejected=()))
        modules += [f"{site.path}.base_layer" for site in sites]
    page = RewriteReport(tuple(graphs), {}, tuple(modules)).to_html()
    look = "document.title = document.documentElement.dataset.ready;"
    dom = opened(page, tmp_path, look)
    assert dom.count('<button class="cell adapter"') == 282
    milliseconds = re.search(r"<title>(\d+)</title>", dom)
    assert milliseconds is not None
    assert int(milliseconds[1]) < 1000
