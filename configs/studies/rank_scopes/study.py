"""How much the rank matters, by the scope of the discrepancy that adapters are made for.

    python configs/studies/rank_scopes/study.py --shared ../shared --work DIR
    python configs/studies/rank_scopes/study.py --table

`lqec analyze rank` of `rtn(bits=2, group_size=32)` on babyllama; plots are in DIR/analysis.

Held-out perplexity of 128 windows of 256 tokens of tinystories_dev, which nothing read, and the
mean square by which final normed hidden states differ from the teacher's, on the 256 training
windows. Every training takes 200 updates of rilq, scope after scope with the same windows, and none
stops early; the model scope has no next-token loss here.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lqec_jax.analysis.ranks import analyze_ranks

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, quote, table

RANKS, SCOPES, UPDATES = (2, 4, 8, 16, 32), ("weight", "linear", "block", "model"), 200
KEPT = ("scope", "rank", "bits_per_weight", "ppl", "kl", "relative_error", "train_mse",
        "held_out_mse", "train_by_block", "seconds")  # fmt: skip
TABLES = (
    ("perplexity", "ppl"),
    ("MSE, training windows", "train_mse"),
    ("MSE, held-out windows", "held_out_mse"),
)


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> list[dict]:
    """Runs the analysis, all rows in one; it goes on where it was stopped by itself."""
    shared, out = arguments.shared, arguments.work / "analysis"
    found = analyze_ranks(
        model=shared / "models" / "babyllama", base="rtn(bits=2, group_size=32)",
        calib=str(shared / "data" / "tinystories_calib.jsonl"),
        text=str(shared / "data" / "tinystories_dev.jsonl"),
        out=out, ranks=RANKS, scopes=SCOPES, updates=UPDATES, seqlen=256,
        windows=320, text_windows=128, resume=(out / "runs" / "results.json").exists(),
    )  # fmt: skip
    results |= {"protocol": found["protocol"], "teacher": found["teacher"]["ppl"],
                "base": found["base"]}  # fmt: skip
    return [{name: row.get(name) for name in KEPT} for row in found["rows"]]


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a table a figure, by scope and rank."""
    bare, *rows = results["rows"]
    lines = [
        *quote(__doc__, 3),
        f"Teacher {results['teacher']:.3f}; the base alone {bare['ppl']:.3f}, "
        f"{bare['train_mse']:.3f} from the teacher.",
    ]
    for title, figure in TABLES:
        columns = [(f"rank {rank}", f"{{ranks[{rank}]:.3f}}") for rank in RANKS]
        columns = [(title, "{scope}"), *columns, ("spread", "{spread}")]
        lines += ["", *table(columns, find_curves(rows, figure))]
    return lines


def find_curves(rows: list[dict], figure: str) -> Iterator[dict]:
    """Yields a row a scope: the figure by rank."""
    for scope in SCOPES:
        values = {row["rank"]: row[figure] for row in rows if row["scope"] == scope}
        yield {"scope": scope, "ranks": values, "spread": spread(figure, values)}


def spread(name: str, values: dict[int, float]) -> str:
    """Returns what the rank decides: of perplexities in nats, of errors as a difference."""
    numbers = np.array(list(values.values()))
    numbers = np.log(numbers) if name == "ppl" else numbers
    return f"{np.ptp(numbers):.3f}" + (" nats" if name == "ppl" else "")


STUDY = Study(__doc__, __file__, lambda _: [{}], measure, write_page, needs=("shared", "work"))


if __name__ == "__main__":
    STUDY.run()
