"""The demo as one picture: what each row loses, and how RILQ's training went."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEACHER, OURS, OTHER = "#555555", "#0b62a8", "#b4b4b4"


def draw_demo(path: Path, result: Mapping[str, Any]) -> None:
    """Draws perplexities as bars and the losses over updates into a PNG.

    Args:
      result: as `demo.run.run_demo` returns it.
    """
    from matplotlib.figure import Figure

    # That it builds a list of fonts the first time is no news to whoever asked for a demo.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    bars, losses = figure.subplots(1, 2, width_ratios=(1, 1.2))
    _draw_bars(bars, result["rows"])
    _draw_losses(losses, result["fits"][-1])
    figure.savefig(path, dpi=150)


def _draw_bars(axes: Any, rows: list[Mapping[str, Any]]) -> None:
    colors = {"teacher": TEACHER, "rilq": OURS}
    names = [f"{row['name']}\n{row['bits_per_weight']:.2f} bits" for row in rows]
    drawn = axes.bar(
        names, [row["ppl"] for row in rows], color=[colors.get(r["name"], OTHER) for r in rows]
    )
    axes.bar_label(drawn, fmt="%.1f", padding=2)
    axes.set_yscale("log")
    axes.set_ylim(1, 2 * max(row["ppl"] for row in rows))
    axes.set_ylabel(f"perplexity on held-out text, {rows[0]['protocol']}")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_losses(axes: Any, fit: Mapping[str, Any]) -> None:
    for key, label, color in (
        ("train_loss", "training", OTHER),
        ("val_loss", "validation", OURS),
    ):
        points = [(p["update"], p[key]) for p in fit["history"] if p[key] is not None]
        axes.plot(*zip(*points, strict=True), color=color, label=label)
    axes.axvline(fit["best_update"], color=TEACHER, linestyle=":", label="kept")
    axes.set_xlabel("updates")
    axes.set_ylabel(f"{fit['method']}: mean loss of a window")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
