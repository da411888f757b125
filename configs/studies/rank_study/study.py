"""Measures how much the rank matters to RILQ and to SVD on a small model.

    python configs/studies/rank_study/study.py --shared ../shared
    python configs/studies/rank_study/study.py --table                # results.md and figure.svg

2-bit rounding in groups of 32, then a correction of rank 2 to 32 (1/64 to 1/4 of the width). RILQ
is trained in three ways, for y += gamma (x A) B with b = gamma B stored:

- gamma = 16/r, as its authors do, with a learning rate that grows with the rank, so that gamma
  times it, which is how far b moves an update, is the same at every rank;
- gamma = 1 and one learning rate;
- gamma = 16/r and one learning rate, the best one at rank 16; one seed. At rank 2 b then moves
  eight times as far an update as at rank 16.

At rank 16 all three are one run. SVD is a closed form and has neither a gamma nor a seed. Every run
is scored on the first 128 windows of tinystories_dev, which none of them reads.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, table

MODEL, BASE = "babyllama", "rtn(bits=2, group_size=32)"
RANKS, SEEDS = (2, 4, 8, 16, 32), (0, 1, 2)
SEQLEN, WINDOWS, SCORED = 256, 320, 128
# Half of RILQ's default, so that thirty runs end in an hour of one core.
UPDATES = 200
BEST_LR, BEST_RANK = 0.002, 16  # see ../rilq_defaults


class Way(NamedTuple):
    """How RILQ's alpha and learning rate follow the rank, and with which seeds it is run."""

    alpha: Callable[[int], int]
    lr: Callable[[int], float]
    seeds: tuple[int, ...] = SEEDS


WAYS = {
    "γ = 16/r": Way(lambda rank: 16, lambda rank: BEST_LR * rank / BEST_RANK),
    "γ = 1": Way(lambda rank: rank, lambda rank: BEST_LR),
    "γ = 16/r, one lr": Way(lambda rank: 16, lambda rank: BEST_LR, seeds=(0,)),
}


def list_runs(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yields what identifies every run, the cheap and the most wanted first."""
    yield {"method": "teacher"}
    yield {"method": "rtn"}
    for rank in RANKS:
        yield {"method": "svd", "rank": rank}
    for seed in SEEDS:
        for way in WAYS.values():
            yield from (find_run(way, rank, seed) for rank in RANKS if seed in way.seeds)


def find_run(way: Way, rank: int, seed: int) -> dict:
    """Returns what identifies one training run."""
    alpha, lr = way.alpha(rank), way.lr(rank)
    return {"method": "rilq", "rank": rank, "alpha": alpha, "lr": lr, "seed": seed}


def write_recipe(run: dict) -> str:
    """Returns the recipe of a run of any method but the teacher."""
    if run["method"] == "rtn":
        return BASE
    if run["method"] == "svd":
        return f"{BASE} | svd(rank={run['rank']})"
    given = ", ".join(f"{name}={run[name]}" for name in ("rank", "alpha", "lr"))
    return f"{BASE} | rilq({given}, updates={UPDATES}, patience=0)"


def measure(run: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Makes one model and scores it."""
    import lqec_jax as lqec
    from lqec_jax.calibration.data import load_tokens

    folder, data = arguments.shared / "models" / MODEL, arguments.shared / "data"
    dense = model = lqec.load(folder)
    calibration = load_tokens(data / "tinystories_calib.jsonl", dense.tokenizer, "documents")
    dev = load_tokens(data / "tinystories_dev.jsonl", dense.tokenizer, "documents")
    started, row = time.process_time(), {}
    if run["method"] == "teacher":
        row["bits_per_weight"] = 32.0
    else:
        recipe, seed = write_recipe(run), run.get("seed", 0)
        model = lqec.compress(
            folder, recipe, calibration, seqlen=SEQLEN, windows=WINDOWS, seed=seed
        )
        row["bits_per_weight"] = model.report["bits_per_weight"]
        row["cpu_seconds"] = time.process_time() - started
    for fit in model.report.get("fits", []):
        row["best_update"] = fit["best_update"]
        row["updates"] = fit["history"][-1]["update"]
        row["validation_loss"] = min(point["val_loss"] for point in fit["history"])
    score = lqec.perplexity(model, dev[: SCORED * SEQLEN], SEQLEN, protocol="documents")
    names = ("nll", "ppl", "low", "high", "protocol")
    return row | {name: getattr(score, name) for name in names}


def find_curves(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """Returns the measured curves by name, rank -> row: SVD's, then RILQ's by way and seed."""
    curves = {"SVD": {row["rank"]: row for row in rows if row["method"] == "svd"}}
    for name, way in WAYS.items():
        for seed in way.seeds:
            runs = [find_run(way, rank, seed) for rank in RANKS]
            found = [row for run in runs for row in rows if row.items() >= run.items()]
            curves[f"RILQ, {name}, seed {seed}"] = {row["rank"]: row for row in found}
    return {name: curve for name, curve in curves.items() if curve}


def find_spread(curve: dict[int, dict]) -> float | None:
    """Returns max - min of the held-out loss over the ranks, nats; None while some are missing."""
    losses = [row["nll"] for row in curve.values()]
    return max(losses) - min(losses) if set(curve) == set(RANKS) else None


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a row a curve: held-out loss by rank, its spread, and the spread over SVD's."""
    rows = results["rows"]
    curves, by_method = find_curves(rows), {row["method"]: row for row in rows}
    teacher, rounded, of_svd = by_method["teacher"], by_method["rtn"], find_spread(curves["SVD"])
    lines = [
        f"Held-out loss (nats a token; perplexity in brackets) of `{BASE}` with a correction of "
        f"rank 2 to 32, on {MODEL} (width 128), {SCORED} windows, `{teacher['protocol']}`. RILQ: "
        f"{UPDATES} updates, {WINDOWS} calibration windows, lr {BEST_LR} (times r/{BEST_RANK} "
        "where γ = 16/r, but for the last rows), other arguments by default. "
        f"Teacher {format_score(teacher)}; without a correction {format_score(rounded)} at "
        f"{rounded['bits_per_weight']:.2f} bits per weight.",
        "",
    ]
    shown = []
    for name, curve in curves.items():
        spread = find_spread(curve)
        scores = {rank: format_score(row) for rank, row in curve.items()}
        over = spread and of_svd and spread / of_svd
        shown.append({"name": name, "ranks": scores, "spread": spread, "over": over})
    columns = [("", "{name}"), *((f"rank {rank}", f"{{ranks[{rank}]}}") for rank in RANKS)]
    made = table([*columns, ("max − min", "{spread:.3f}"), ("over SVD's", "{over:.2f}")], shown)
    bits = " | ".join(f"{curves['SVD'][rank]['bits_per_weight']:.2f}" for rank in RANKS)
    lines += [*made[:2], f"| bits per weight | {bits} | | |", *made[2:]]
    draw_figure(rows, arguments.out.with_name("figure.svg"))
    return [*lines, "", "![Held-out loss by rank](figure.svg)"]


def format_score(row: dict) -> str:
    return f"{row['nll']:.3f} ({row['ppl']:.2f})"


def draw_figure(rows: list[dict], path: Path) -> None:
    """Draws loss over rank: SVD's line, a line a way through RILQ's means, a point a seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "rank study"
    figure, axes = pyplot.subplots(figsize=(6.4, 4.6), layout="constrained")
    by_method = {row["method"]: row for row in rows}
    for method, label in (("rtn", "no correction"), ("teacher", "teacher")):
        axes.axhline(by_method[method]["nll"], color="#808080", linestyle=":", linewidth=1)
        axes.annotate(label, (RANKS[0], by_method[method]["nll"]), xytext=(0, 3),
                      textcoords="offset points", color="#808080", fontsize=8)  # fmt: skip
    groups: dict[str, list[dict]] = {}
    for name, curve in find_curves(rows).items():
        groups.setdefault(name.rpartition(", seed")[0] or name, []).extend(curve.values())
    styles = (("#d1495b", "s", "-"), ("#2274a5", "o", "-"), ("#e08e1b", "^", "--"),
              ("#808080", "x", ":"))  # fmt: skip
    for (name, points), (color, marker, line) in zip(groups.items(), styles, strict=False):
        ranks = sorted({row["rank"] for row in points})
        losses = [[row["nll"] for row in points if row["rank"] == rank] for rank in ranks]
        axes.plot(ranks, [sum(values) / len(values) for values in losses], line, color=color,
                  label=name)  # fmt: skip
        axes.plot([row["rank"] for row in points], [row["nll"] for row in points], marker,
                  color=color, markersize=4, linestyle="none")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set_xlabel(f"rank (of a width of 128), over {BASE}")
    axes.set_ylabel("held-out loss, nats a token")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    figure.savefig(path, metadata={"Date": None})


STUDY = Study(__doc__, __file__, list_runs, measure, write_page, needs=("shared",))


if __name__ == "__main__":
    STUDY.run()
