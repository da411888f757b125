"""report.html: made of the report alone, whole without any other file, and safe to open."""

import json
import re
from html.parser import HTMLParser

import pytest

from lqec_jax.evaluate.page import format_number, render_report, tabulate_stages

VOID = {"meta", "br", "link", "img", "input", "hr"}
STAGE = {"tokens": 100, "protocol": "documents/64", "low": 2.0, "high": 3.0, "windows": 2}
REPORT = {
    "base": {"name": "tiny"},
    "recipe": "rtn(bits=2) | rilq(rank=4)",
    "seed": 7,
    "bits_per_weight": 2.5625,
    "stages": [
        {"name": "teacher", "ppl": 2.4586, "nll": 0.8996, "seconds": 0.0, **STAGE},
        {"name": "rtn", "ppl": 11.472, "nll": 2.43997, "seconds": 1.25, **STAGE},
        {"name": "rilq", "ppl": None, "nll": None, "seconds": 61.5, **STAGE},
    ],
    "linears": [
        {"path": f"blocks/{layer}/{kind}", "d_in": 32, "d_out": 64, "bits_per_weight": bits,
         "relative_error": error, "steps": [{"method": "rtn", "objective": "weight error",
         "before": 1.0, "after": error, "notes": ["damped"]}]}
        for layer, kind, bits, error in [
            (0, "attn/q", 2.5, 0.1), (1, "attn/q", 2.5, 0.2), (0, "mlp/up", 2.0, 0.3),
            (1, "mlp/up", 3.0, None),
        ]
    ],
    "fits": [
        {"method": "rilq", "best_update": 5, "notes": ["stopped early"], "history": [
            {"update": 0, "train_loss": None, "val_loss": 2.0},
            {"update": 5, "train_loss": 1.5, "val_loss": 1.25}]},
        {"method": "block_ap", "layer": 3, "best_update": 0, "notes": [], "history": [
            {"update": 0, "train_loss": None, "val_loss": 0.5}]},
    ],
    "skipped": [{"path": "embed", "reason": "looked up, not multiplied by"}],
    "peak_rss_mb": 880.4,
    "seconds": 62.75,
    "environment": {"python": "3.11", "devices": ["cpu", "cpu"], "versions": {"jax": "1.0"}},
}  # fmt: skip


class Page(HTMLParser):
    """Reads a page: every tag is closed where it should be; texts by cell, links, resources."""

    def __init__(self, html):
        super().__init__()
        self.open, self.rows, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.rows[-1][-1] += " ".join(data.split())

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html():
    return render_report(REPORT)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_same_report_gives_the_same_page_also_from_its_file(html):
    assert render_report(json.loads(json.dumps(REPORT))) == html
    assert render_report({**REPORT, "seed": 8}) != html


def test_a_page_loads_nothing(html, page):
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, *_ in page.attributes}
    references = [v for _, name, v in page.attributes if name in ("src", "href", "xlink:href")]
    assert references and all(value.startswith("#") for value in references)
    assert not re.search(r"https?:|@import|url\((?!#)", html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_page_suits_a_phone_and_both_colour_schemes(html, page):
    metas = {dict_of(page, "meta", i) for i in ("viewport", "color-scheme")}
    assert metas == {"width=device-width, initial-scale=1", "light dark"}
    dark = html[html.index("@media (prefers-color-scheme: dark)") :]
    named = set(re.findall(r"(--[\w-]+):", html[: html.index("@media")]))
    assert set(re.findall(r"(--[\w-]+):", dark)) == named
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= named
    # A table is as wide as it likes, in a box of its own that scrolls.
    assert html.count("<table") == html.count('<div class="box"><table')
    assert re.search(r"\.box \{[^}]*overflow-x: auto", html)


def dict_of(page, tag, name):
    """Returns the content of the meta element of a name."""
    found = [i for i, entry in enumerate(page.attributes) if entry == (tag, "name", name)]
    return page.attributes[found[0] + 1][2]


def test_contrast_is_enough_to_read_by_in_both_schemes(html):
    for scheme in html[: html.index("</style>")].split("@media")[:2]:
        colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", scheme))
        for name in ("--ink", "--soft", *(f"--c{number}" for number in range(1, 9))):
            for ground in ("--paper", "--panel"):
                assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)


def contrast(first, second):
    """Returns the contrast of WCAG 2 between two colours, 1 to 21."""

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_a_page_says_what_the_report_says(page):
    assert ["teacher", "2.459", "2.000 to 3.000", "0.8996", "100", "0.0"] in page.rows
    assert ["rilq", "not finite", "2.000 to 3.000", "not finite", "100", "61.5"] in page.rows
    assert ["attn/q", "2", "32 × 64", "2.500", "0.1500", "0.2000"] in page.rows
    assert ["mlp/up", "2", "32 × 64", "2.000 to 3.000", "not finite", "not finite"] in page.rows
    assert ["blocks/1/attn/q", "2.500", "0.2000",
            "rtn: weight error 1.0000 → 0.2000, damped"] in page.rows  # fmt: skip
    assert ["embed", "looked up, not multiplied by"] in page.rows
    assert ["devices", "cpu, cpu"] in page.rows and ["versions", "jax 1.0"] in page.rows
    for words in ("tiny, compressed", "rtn(bits=2) | rilq(rank=4)", "bits per weight 2.562",
                  "seconds 62.8", "880 MB", "seed 7", "stopped early", "the teacher’s 2.459",
                  "validation loss 2.0000 before, 1.2500 at update 5 of 5",
                  "block_ap, block 3: validation loss 0.5000 before"):  # fmt: skip
        assert words in page.text
    assert page.text.count("documents/64") == 1


def test_what_a_report_holds_is_text_and_never_markup():
    evil = "<script>alert('&')</script>"
    html = render_report({**REPORT, "recipe": evil, "base": {"name": evil},
                          "stages": [{**REPORT["stages"][0], "name": evil}]})  # fmt: skip
    assert "<script" not in html and html.count("&lt;script&gt;") >= 4
    assert evil in Page(html).text


def test_two_protocols_never_share_a_column():
    teacher, rounded, _ = REPORT["stages"]
    other = {**rounded, "protocol": "gptq/64"}
    tables = list(tabulate_stages([teacher, other, rounded]))
    assert [table["protocol"] for table in tables] == ["documents/64", "gptq/64"]
    assert [[row["name"] for row in table["rows"]] for table in tables] == [
        ["teacher", "rtn"], ["rtn"]]  # fmt: skip
    # The number at the top is not set beside one of another protocol.
    assert "the teacher’s" not in render_report({**REPORT, "stages": [teacher, other]})


@pytest.mark.parametrize("left", [set(), {"stages"}, {"linears"}, {"fits", "environment"}])
def test_a_page_leaves_out_what_a_report_does_not_hold(left):
    page = Page(render_report({name: REPORT[name] for name in left}))
    assert ("Training" in page.text) == ("fits" in left)
    assert ("Weights" in page.text) == ("linears" in left)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not finite"), (2.45859, "2.459"), (999.9994, "999.999"), (123456.7, "123457")],
)
def test_numbers_have_the_digits_that_matter(value, text):
    assert format_number(value) == text


def test_an_error_from_before_a_training_is_told_from_one_that_is_no_number():
    linears = [
        {**linear, "relative_error": None, "relative_error_before": linear["relative_error"]}
        for linear in REPORT["linears"][:2]
    ]
    fit = {**REPORT["fits"][0], "method": "finetune", "data": {"file": "rows.jsonl"}}
    page = Page(render_report({**REPORT, "linears": linears, "fits": [fit]}))
    (kind,) = (row for row in page.rows if row[:1] == ["attn/q"])
    assert kind[-2:] == ["not measured"] * 2
    (linear,) = (row for row in page.rows if row[:1] == ["blocks/1/attn/q"])
    assert "0.2000 before it was trained" in linear
    assert "finetune, on rows.jsonl" in " ".join(page.words)
