"""Plots of a report as inline SVG: no file, no script, readable on light and on dark pages.

A plot is drawn in stand-in colours that are then replaced by the page's own, `currentColor` and
`var(--c1)`, so that one drawing serves both colour schemes. Equal input, equal bytes.
"""

import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

INK, FAINT = "#010101", "#020202"
SERIES = tuple(f"#0303{number:02x}" for number in range(1, 9))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH, HEIGHT = 4.4, 3.0  # inches of 72 points; a phone shows a point as about a pixel
STYLE = {
    "svg.fonttype": "none",  # letters stay letters: selectable, and drawn by the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def draw_losses(name: str, history: Sequence[Mapping[str, Any]], best: int) -> str:
    """Draws a training curve: mean loss over updates, and the look that won.

    Args:
      name: unique on the page.
      history: {update, train_loss, val_loss}, a loss None where there is none.
    """
    with _drawing(name, "updates", "mean loss of a window") as (axes, finish):
        lines = (("train_loss", "training"), ("val_loss", "validation"))
        for color, (key, label) in zip(SERIES, lines, strict=False):
            points = [(p["update"], p[key]) for p in history if p[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=label)
        chosen = [p["val_loss"] for p in history if p["update"] == best]
        if chosen and chosen[0] is not None:
            axes.plot(best, chosen[0], "o", color=SERIES[1], label=f"kept, update {best}")
        axes.legend()
    return finish()


def draw_errors(name: str, linears: Sequence[Mapping[str, Any]]) -> str:
    """Draws relative weight error over depth, a line a kind of linear.

    Args:
      linears: {kind, layer, relative_error}.
    """
    with _drawing(name, "block", "relative weight error") as (axes, finish):
        kinds = dict.fromkeys(linear["kind"] for linear in linears)
        for number, kind in enumerate(kinds):
            points = [
                (linear["layer"], linear["relative_error"])
                for linear in linears
                if linear["kind"] == kind and linear["relative_error"] is not None
            ]
            marker = MARKERS[number % len(MARKERS)]
            color = SERIES[number % len(SERIES)]
            if points:
                axes.plot(*zip(*points, strict=True), f"{marker}-", color=color, label=kind)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.figure.legend(loc="outside lower center", ncols=4)
    return finish()


def draw_pareto(name: str, rows: Sequence[Mapping[str, Any]], teacher: float | None) -> str:
    """Draws perplexity over bits per weight; a line joins the rows that no other row beats.

    Args:
      rows: {number, family, bits_per_weight, ppl}; one colour a family, the number beside a point.
        More families than there are colours have one together: their numbers tell them apart.
      teacher: its perplexity, a dotted line.
    """
    with _drawing(name, "bits per weight", "perplexity") as (axes, finish):
        shown = [row for row in rows if row["ppl"] is not None]
        front = find_front([(row["bits_per_weight"], row["ppl"]) for row in shown])
        if front:
            axes.step(*zip(*front, strict=True), where="post", color=FAINT, linewidth=1, zorder=1)
        families = {row["number"]: row["family"] for row in shown}
        if len(set(families.values())) > len(SERIES):
            families = dict.fromkeys(families, "a row of the table")
        for number, family in enumerate(dict.fromkeys(families.values())):
            points = [
                (row["bits_per_weight"], row["ppl"])
                for row in shown
                if families[row["number"]] == family
            ]
            marker = MARKERS[number % len(MARKERS)]
            color = SERIES[number % len(SERIES)]
            axes.plot(*zip(*points, strict=True), marker, color=color, label=family)
        for row in shown:
            axes.annotate(str(row["number"]), (row["bits_per_weight"], row["ppl"]),
                          xytext=(4, 4), textcoords="offset points", fontsize=8)  # fmt: skip
        if teacher is not None:
            axes.axhline(teacher, color=INK, linestyle=":", linewidth=1, label="teacher")
        axes.set_yscale("log")
        ticks = find_ticks(*axes.get_ylim())
        axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.figure.legend(loc="outside lower center", ncols=2)
    return finish()


def draw_curves(
    name: str,
    axes_names: tuple[str, str],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    logarithmic: str = "",
    lines: Mapping[str, float] | None = None,
) -> str:
    """Draws a curve a name over one pair of axes.

    Args:
      curves: label -> points (x, y), at most eight; a label in brackets is drawn dotted and faint.
      logarithmic: which axes are, 'x', 'y' or 'xy'.
      lines: label -> a level drawn across, such as a teacher's.
    """
    with _drawing(name, *axes_names) as (axes, finish):
        shown = {label: points for label, points in curves.items() if points}
        for number, (label, points) in enumerate(shown.items()):
            bracketed = label.startswith("(")
            style = ":" if bracketed else f"{MARKERS[number % len(MARKERS)]}-"
            color = FAINT if bracketed else SERIES[number % len(SERIES)]
            axes.plot(*zip(*points, strict=True), style, color=color, label=label)
        for label, level in (lines or {}).items():
            axes.axhline(level, color=INK, linestyle=":", linewidth=1, label=label)
        if "x" in logarithmic:
            axes.set_xscale("log", base=2)
            places = sorted({x for points in shown.values() for x, _ in points})
            axes.set_xticks(places[:: -(-len(places) // 10)])
            axes.xaxis.set_major_formatter("{x:g}")
        if "y" in logarithmic:
            axes.set_yscale("log")
            ticks = find_ticks(*axes.get_ylim())
            axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        axes.figure.legend(loc="outside lower center", ncols=3)
    return finish()


def find_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points that no other is at most equal to in both, by their first coordinate.

    Example:
      >>> find_front([(2, 9.0), (3, 5.0), (4, 6.0)])
      [(2, 9.0), (3, 5.0)]
    """
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def find_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers for a logarithmic axis, at least four of them.

    Example:
      >>> find_ticks(2.4, 12.0)
      [3.0, 5.0, 7.0, 10.0]
    """
    powers = [10.0**power for power in range(-3, 9)]
    for digits in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        (1, 1.2, 1.5, 2, 2.5, 3, 4, 6, 8),
    ):
        ticks = [digit * power for power in powers for digit in digits]
        within = [tick for tick in ticks if low <= tick <= high]
        if len(within) >= 4:
            return within
    # So short an axis is nearly linear.
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(power * digit for digit in (1, 2, 5) if power * digit * 3 <= high - low)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


@contextmanager
def _drawing(name: str, x: str, y: str):
    """Yields axes to draw on, and what returns the drawing once the block is left."""
    import matplotlib
    from matplotlib.figure import Figure

    # That it builds a list of fonts the first time is no news to whoever asked for a report.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    written = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        yield axes, lambda: _inline(name, written.getvalue())
        figure.savefig(written, format="svg", metadata=NO_METADATA)


def _inline(name: str, svg: str) -> str:
    """Makes an SVG file part of a page: ids of its own, the page's colours, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;]*; |<defs>\s*<style.*?</style>\s*</defs>\s*", "", svg)
    names = {INK: "currentColor", FAINT: "var(--faint)"}
    names |= {color: f"var(--c{number})" for number, color in enumerate(SERIES, start=1)}
    for color, page_color in names.items():
        svg = svg.replace(color, page_color)
    return svg.strip()
