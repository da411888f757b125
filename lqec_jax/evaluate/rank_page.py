"""analysis.html: what a rank buys by the scope of the discrepancy, and the spectra behind it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lqec_jax.evaluate.figures import draw_curves
from lqec_jax.evaluate.page import format_number, render

BARE = "no adapter"
NOISE = "(independent errors)"
RANKS_OF_SPECTRUM = 64  # of a kind's spectrum that is drawn


def render_ranks(analysis: Mapping[str, Any]) -> str:
    """Returns an analysis of `analysis.ranks` as an HTML page; equal input, equal bytes."""
    spectra, rows = analysis["spectra"], analysis["rows"]
    plots = list(_plot_ranks(rows, analysis["teacher"])) + list(_plot_spectra(spectra))
    return render(
        "ranks.html.j2",
        title=f"{analysis['model']}: what a rank buys",
        base=analysis["base"],
        protocol=analysis["protocol"],
        plots=[{"svg": Markup(svg), "words": words} for svg, words in plots],
        rows=[show_rank(row) for row in rows],
        kinds=list(tabulate_spectra(spectra)),
        spread=list(find_spreads(rows)),
    )


def show_rank(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns a row's numbers as text."""
    return {
        "scope": row["scope"] or BARE,
        "rank": "" if row["rank"] is None else str(row["rank"]),
        "bits_per_weight": format_number(row["bits_per_weight"]),
        "ppl": format_number(row["ppl"]),
        "kl": format_number(row["kl"], 4),
        "relative_error": format_number(row["relative_error"], 4),
        "train_mse": format_number(row["train_mse"], 4),
        "held_out_mse": format_number(row["held_out_mse"], 4),
        "seconds": format_number(row["seconds"], 0),
    }


def find_spreads(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yields, a scope, the largest minus the smallest over its ranks: loss and both distances."""
    for scope in _scopes(rows):
        same = [row for row in rows if row["scope"] == scope]
        if len(same) > 1:
            spreads = {name: max(r[name] for r in same) - min(r[name] for r in same)
                       for name in ("nll", "train_mse", "held_out_mse")}  # fmt: skip
            yield {"scope": scope, **{k: format_number(v, 4) for k, v in spreads.items()}}


def tabulate_spectra(spectra: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yields means over blocks, a kind of linear."""
    for kind in dict.fromkeys(row["kind"] for row in spectra):
        same = [row for row in spectra if row["kind"] == kind]

        def mean(name: str, digits: int, same: list = same) -> str:
            return format_number(sum(row[name] for row in same) / len(same), digits)

        yield {
            "kind": kind,
            "shape": f"{same[0]['d_in']} x {same[0]['d_out']}",
            "relative_error": mean("relative_error", 4),
            "stable_rank": mean("stable_rank", 1),
            "half": mean("half", 1),
            "most": mean("most", 1),
        }


def _plot_ranks(rows, teacher) -> Iterator[tuple[str, str]]:
    def over_rank(name: str) -> dict[str, list]:
        return {
            scope: [(row["rank"], row[name]) for row in rows if row["scope"] == scope]
            for scope in _scopes(rows)
        }

    yield (
        draw_curves("ppl", ("rank", "perplexity"), over_rank("ppl"), logarithmic="xy",
                    lines={"teacher": teacher["ppl"]}),
        "Held-out perplexity over the rank, a line a scope.",
    )  # fmt: skip
    for name, words in (("train_mse", "training windows"), ("held_out_mse", "held-out text")):
        yield (
            draw_curves(name, ("rank", "mean (H_q - H)²"), over_rank(name), logarithmic="xy"),
            f"Distance of the final normed states on the {words}.",
        )
    yield (
        draw_curves("weights", ("rank", "relative weight error"), over_rank("relative_error"),
                    logarithmic="xy"),
        "Mean squared error of the weights themselves, which only the narrowest scope lowers.",
    )  # fmt: skip
    largest = max((row["rank"] for row in rows if row["rank"]), default=None)
    by_block = {
        row["scope"] or BARE: list(enumerate(row["held_out_by_block"], start=1))
        for row in rows
        if row["rank"] in (largest, None)
    }
    yield (
        draw_curves("blocks", ("block", "E (h_q - h)² / E h²"), by_block, logarithmic="y"),
        f"Distance of hidden states after every block at rank {largest}, held-out text: a wide "
        "scope leaves those in between further away and the last one nearer.",
    )


def _plot_spectra(spectra) -> Iterator[tuple[str, str]]:
    captured: dict[str, list] = {}
    for kind in dict.fromkeys(row["kind"] for row in spectra):
        captured[kind] = _mean_curve([row for row in spectra if row["kind"] == kind], "captured")
    if not captured:
        return
    captured[NOISE] = _mean_curve(spectra[:1], "noise")
    yield (
        draw_curves("captured", ("rank", "share of the error captured"), captured, logarithmic="x"),
        "What the best correction of a rank takes of the weight error, means over blocks; dotted, "
        f"of independent errors in the shape of {spectra[0]['kind']}.",
    )
    half = {
        kind: [(row["layer"], row["half"]) for row in spectra if row["kind"] == kind]
        for kind in dict.fromkeys(row["kind"] for row in spectra)
    }
    yield (
        draw_curves("half", ("block", "rank"), half),
        "The rank that captures half of the weight error, by block and kind.",
    )


def _mean_curve(rows, name: str) -> list[tuple[int, float]]:
    ranks = [rank for rank in rows[0]["ranks"] if rank <= RANKS_OF_SPECTRUM]
    return [(r, sum(row[name][i] for row in rows) / len(rows)) for i, r in enumerate(ranks)]


def _scopes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [scope for scope in dict.fromkeys(row["scope"] for row in rows) if scope]
