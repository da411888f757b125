"""How much the rank matters, by the scope of the discrepancy that adapters are made for.

    python configs/studies/rank_scopes/study.py --shared ../shared --work DIR
    python configs/studies/rank_scopes/study.py --table

`lqec analyze rank` of `rtn(bits=2, group_size=32)` on babyllama; the first goes on where it was
stopped and keeps results.json, the second writes results.md. Plots are in DIR/analysis.

Held-out perplexity of 128 windows of 256 tokens of tinystories_dev, which nothing read, and the
mean square by which final normed hidden states differ from the teacher's, on the 256 training
windows. Every training takes 200 updates of rilq, scope after scope with the same windows, and none
stops early; the model scope has no next-token loss here.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from lqec_jax.analysis.ranks import analyze_ranks

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
RANKS, SCOPES, UPDATES = (2, 4, 8, 16, 32), ("weight", "linear", "block", "model"), 200
KEPT = ("scope", "rank", "bits_per_weight", "ppl", "kl", "relative_error", "train_mse",
        "held_out_mse", "train_by_block", "seconds")  # fmt: skip


def measure(shared: Path, work: Path) -> None:
    """Runs the analysis and keeps what it found."""
    found = analyze_ranks(
        model=shared / "models" / "babyllama", base="rtn(bits=2, group_size=32)",
        calib=str(shared / "data" / "tinystories_calib.jsonl"),
        text=str(shared / "data" / "tinystories_dev.jsonl"),
        out=work / "analysis", ranks=RANKS, scopes=SCOPES, updates=UPDATES, seqlen=256,
        windows=320, text_windows=128,
        resume=(work / "analysis" / "runs" / "results.json").exists(),
    )  # fmt: skip
    rows = [{name: row.get(name) for name in KEPT} for row in found["rows"]]
    found["environment"].pop("platform", None)
    facts = {"protocol": found["protocol"], "teacher": found["teacher"]["ppl"],
             "base": found["base"], "environment": found["environment"], "rows": rows}  # fmt: skip
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


def write_table() -> None:
    """Writes results.md from results.json."""
    facts = json.loads(RESULTS.read_text())
    bare, *rows = facts["rows"]
    lines = [
        " ".join(__doc__.split("\n\n")[3].split()),
        "",
        f"Teacher {facts['teacher']:.3f}; the base alone {bare['ppl']:.3f}, "
        f"{bare['train_mse']:.3f} from the teacher.",
    ]
    for name, write in (("perplexity", "ppl"), ("MSE, training windows", "train_mse"),
                        ("MSE, held-out windows", "held_out_mse")):  # fmt: skip
        lines += ["", f"| {name} | " + " | ".join(f"rank {rank}" for rank in RANKS) + " | spread |",
                  "|---|" + "---|" * (len(RANKS) + 1)]  # fmt: skip
        for scope in SCOPES:
            values = {row["rank"]: row[write] for row in rows if row["scope"] == scope}
            digits = [f"{values[rank]:.3f}" for rank in RANKS]
            lines.append(f"| {scope} | " + " | ".join([*digits, spread(write, values)]) + " |")
    TABLE.write_text("\n".join(lines) + "\n")


def spread(name: str, values: dict[int, float]) -> str:
    """Returns what the rank decides: of perplexities in nats, of errors as a difference."""
    numbers = np.array(list(values.values()))
    numbers = np.log(numbers) if name == "ppl" else numbers
    return f"{np.ptp(numbers):.3f}" + (" nats" if name == "ppl" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="models/ and data/ are in it")
    parser.add_argument("--work", type=Path, help="where artifacts go")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        write_table()
    else:
        measure(arguments.shared, arguments.work)


if __name__ == "__main__":
    main()
