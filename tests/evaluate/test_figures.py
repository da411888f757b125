"""Plots for a page: equal bytes, the page's colours and ids, points where the numbers say."""

import re
from xml.etree import ElementTree

import pytest

from lqec_jax.evaluate.figures import draw_errors, draw_losses, draw_pareto, find_front, find_ticks

HISTORY = [
    {"update": 0, "train_loss": None, "val_loss": 2.0},
    {"update": 10, "train_loss": 1.5, "val_loss": 1.25},
    {"update": 20, "train_loss": 1.0, "val_loss": None},
]
LINEARS = [
    {"kind": kind, "layer": layer, "relative_error": 0.1 * layer + shift}
    for kind, shift in (("attn/q", 0.1), ("mlp/up", 0.3))
    for layer in range(3)
]
ROWS = [
    {"number": 1, "family": "rtn", "bits_per_weight": 2.5, "ppl": 12.0},
    {"number": 2, "family": "rtn", "bits_per_weight": 3.5, "ppl": 4.0},
    {"number": 3, "family": "rtn | svd", "bits_per_weight": 4.0, "ppl": 6.0},
    {"number": 4, "family": "rtn | svd", "bits_per_weight": 9.0, "ppl": None},
]


def draw(name="plot"):
    return {
        "losses": draw_losses(name, HISTORY, 10),
        "errors": draw_errors(name, LINEARS),
        "pareto": draw_pareto(name, ROWS, 2.4),
    }


def texts(svg):
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter("text")]


def lines_in(svg, color):
    """Returns the corners of every line of a colour, in points of the drawing."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: {color}[;"]', svg)
    corners = ([tuple(map(float, c)) for c in re.findall(r"[ML] (\S+) (\S+)", p)] for p in paths)
    return [path for path in corners if len(path) > 2]


def test_equal_numbers_give_equal_bytes():
    assert draw() == draw()
    assert draw_losses("plot", HISTORY[:2], 10) != draw()["losses"]


@pytest.mark.parametrize("kind", ["losses", "errors", "pareto"])
def test_a_drawing_needs_nothing_and_takes_the_pages_colours(kind):
    svg = draw()[kind]
    root = ElementTree.fromstring(svg)  # well formed, and without a namespace
    assert root.tag == "svg" and "width" not in root.attrib and "viewBox" in root.attrib
    assert not re.search(r"https?:|<style|<script|font-family|<image", svg)
    colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
    assert colors <= {
        "none",
        "currentColor",
        "var(--faint)",
        *(f"var(--c{n})" for n in range(1, 9)),
    }
    assert {"currentColor", "var(--c1)"} <= colors


def test_two_drawings_on_a_page_share_no_id_and_refer_to_their_own():
    first, second = draw("one")["errors"], draw("two")["errors"]
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in (first, second)]
    assert ids[0] and not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        referred = set(re.findall(r'(?:href="|url\()#([^")]*)', svg))
        assert referred and referred <= own


def test_a_curve_passes_through_its_losses_and_marks_what_was_kept():
    svg = draw()["losses"]
    assert {"updates", "training", "validation", "kept, update 10"} <= set(texts(svg))
    three = draw_losses("plot", [*HISTORY[:2], {**HISTORY[2], "val_loss": 1.5}], 10)
    ((x0, y0), (x1, y1), (x2, y2)) = lines_in(three, r"var\(--c2\)")[0]
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y1 - y0) / (y2 - y0) == pytest.approx((2.0 - 1.25) / (2.0 - 1.5), rel=1e-4)
    # A loss that is None is no corner: what is left of three is the legend's.
    assert (len(lines_in(three, r"var\(--c2\)")), len(lines_in(svg, r"var\(--c2\)"))) == (2, 1)


def test_errors_make_a_line_a_kind_over_depth():
    svg = draw()["errors"]
    assert {"attn/q", "mlp/up", "block"} <= set(texts(svg))
    for color in (r"var\(--c1\)", r"var\(--c2\)"):
        ((_, y0), (_, y1), (_, y2)) = lines_in(svg, color)[0]
        assert y0 - y1 == pytest.approx(y1 - y2) and y0 > y1  # up is less


def test_the_pareto_plot_numbers_its_points_and_leaves_out_what_is_not_finite():
    shown = texts(draw()["pareto"])
    assert {"1", "2", "3", "rtn", "rtn | svd", "teacher", "bits per weight"} <= set(shown)
    assert shown.count("4") <= 1  # an axis may say 4, no point does
    assert "9" not in shown


def test_more_families_than_colours_are_told_apart_by_number_alone():
    rows = [
        {"number": n, "family": f"method {n}", "bits_per_weight": 2 + n / 10, "ppl": 3.0 + n}
        for n in range(80)
    ]
    named, shown = (set(texts(draw_pareto("plot", rows[:n], 2.4))) for n in (8, 80))
    assert {"method 0", "method 7"} <= named and "a row of the table" not in named
    assert {"0", "79", "a row of the table", "teacher"} <= shown
    assert not any(text.startswith("method") for text in shown)


def test_the_front_is_what_no_other_row_beats():
    points = [(4, 6.0), (2, 9.0), (3, 5.0), (3, 7.0), (5, 5.0), (6, 4.0)]
    assert find_front(points) == [(2, 9.0), (3, 5.0), (6, 4.0)]
    assert find_front([]) == []


@pytest.mark.parametrize(
    ("low", "high"), [(2.4, 12.0), (2.44, 2.6), (1, 1e6), (9.0, 9.01), (900, 4e4), (1.0, 1.3)]
)
def test_ticks_are_few_round_and_inside(low, high):
    ticks = find_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks) and ticks == sorted(ticks)
    assert len({f"{tick:.5g}" for tick in ticks}) == len(ticks)
