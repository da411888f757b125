"""Measures RILQ's hyper-parameters on small models: one row a setting, appended to a JSON file.

    python configs/studies/rilq_defaults/study.py --shared ../shared --out results.json \
        --model babyllama --set lr=2e-3 --set lr=4e-3,decay=constant

Every row: 2-bit rounding in groups of 32, rank 16, 256 training and 64 validation windows of 256
tokens of tinystories_calib; perplexity on the first 128 windows of tinystories_dev (`dev`) and on
the windows of calibration stories after the first 320 (`unseen`), which no run reads. The choice is
made on the validation loss; the two perplexities are reported whatever they are.
"""

import argparse
import ast
import json
import time
from pathlib import Path

import lqec_jax as lqec
from lqec_jax.calibration.data import load_tokens

SEQLEN, WINDOWS, SCORED = 256, 320, 128


def measure(folder: Path, data: Path, settings: dict, seed: int) -> dict:
    """Runs one setting and scores it."""
    dense = lqec.load(folder)
    calibration = load_tokens(data / "tinystories_calib.jsonl", dense.tokenizer, "documents")
    dev = load_tokens(data / "tinystories_dev.jsonl", dense.tokenizer, "documents")
    text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    recipe = f"rtn(bits=2, group_size=32) | rilq({text})"
    started = time.process_time()
    small = lqec.compress(
        folder, recipe, calib=calibration, seqlen=SEQLEN, windows=WINDOWS, seed=seed
    )
    seconds = time.process_time() - started
    unseen = calibration[WINDOWS * SEQLEN : (WINDOWS + SCORED) * SEQLEN]
    fit = small.report["fits"][0]
    return {
        "model": folder.name,
        "settings": settings,
        "seed": seed,
        "validation_loss": min(point["val_loss"] for point in fit["history"]),
        "best_update": fit["best_update"],
        "updates": fit["history"][-1]["update"],
        "dev": lqec.perplexity(small, dev[: SCORED * SEQLEN], SEQLEN).ppl,
        "unseen": lqec.perplexity(small, unseen, SEQLEN).ppl,
        "cpu_seconds": seconds,
    }


def write_table(rows: list[dict], path: Path) -> None:
    """Writes the rows as a markdown table, sorted by model and setting."""
    lines = [
        "| model | settings | validation loss | best update | dev ppl | unseen ppl | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], str(row["settings"]))):
        settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        lines.append(
            f"| {row['model']} | {settings} | {row['validation_loss']:.4f} | {row['best_update']} "
            f"| {row['dev']:.3f} | {row['unseen']:.3f} | {row['cpu_seconds']:.0f} |"
        )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--set", action="append", required=True, help="name=value,name=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    for text in arguments.set:
        pairs = (pair.split("=") for pair in text.split(",") if pair)
        settings = {"rank": 16} | {name: ast.literal_eval(value) for name, value in pairs}
        for name in arguments.model:
            folder = arguments.shared / "models" / name
            rows.append(measure(folder, arguments.shared / "data", settings, arguments.seed))
            print(json.dumps(rows[-1]), flush=True)
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
            write_table(rows, arguments.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
