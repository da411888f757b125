"""Measures RILQ's hyper-parameters on small models: one row a setting.

    python configs/studies/rilq_defaults/study.py --shared ../shared --out results.json \
        --model babyllama --set lr=2e-3 --set lr=4e-3,decay=constant

Every row: 2-bit rounding in groups of 32, rank 16, 256 training and 64 validation windows of 256
tokens of tinystories_calib; perplexity on the first 128 windows of tinystories_dev (`dev`) and on
the windows of calibration stories after the first 320 (`unseen`), which no run reads. The choice is
made on the validation loss; the two perplexities are reported whatever they are.
"""

import argparse
import ast
import sys
import time
from pathlib import Path

import lqec_jax as lqec
from lqec_jax.calibration.data import load_tokens

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, table

SEQLEN, WINDOWS, SCORED = 256, 320, 128
COLUMNS = (
    ("model", "{model}"),
    ("settings", lambda row: write_settings(row["settings"], "{}={}")),
    ("validation loss", "{validation_loss:.4f}"),
    ("best update", "{best_update}"),
    ("dev ppl", "{dev:.3f}"),
    ("unseen ppl", "{unseen:.3f}"),
    ("CPU s", "{cpu_seconds:.0f}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    return [
        {"model": model, "settings": read_settings(text), "seed": arguments.seed}
        for text in arguments.set
        for model in arguments.model
    ]


def read_settings(text: str) -> dict:
    """Reads name=value,name=value."""
    pairs = (pair.split("=") for pair in text.split(",") if pair)
    return {"rank": 16} | {name: ast.literal_eval(value) for name, value in pairs}


def write_settings(settings: dict, one: str) -> str:
    return ", ".join(one.format(name, value) for name, value in settings.items())


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Runs one setting and scores it."""
    folder, data = arguments.shared / "models" / key["model"], arguments.shared / "data"
    dense = lqec.load(folder)
    calibration = load_tokens(data / "tinystories_calib.jsonl", dense.tokenizer, "documents")
    dev = load_tokens(data / "tinystories_dev.jsonl", dense.tokenizer, "documents")
    recipe = f"rtn(bits=2, group_size=32) | rilq({write_settings(key['settings'], '{}={!r}')})"
    started = time.process_time()
    small = lqec.compress(
        folder, recipe, calib=calibration, seqlen=SEQLEN, windows=WINDOWS, seed=key["seed"]
    )
    seconds = time.process_time() - started
    unseen = calibration[WINDOWS * SEQLEN : (WINDOWS + SCORED) * SEQLEN]
    fit = small.report["fits"][0]
    return {
        "validation_loss": min(point["val_loss"] for point in fit["history"]),
        "best_update": fit["best_update"],
        "updates": fit["history"][-1]["update"],
        "dev": lqec.perplexity(small, dev[: SCORED * SEQLEN], SEQLEN).ppl,
        "unseen": lqec.perplexity(small, unseen, SEQLEN).ppl,
        "cpu_seconds": seconds,
    }


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns the rows, sorted by model and setting."""
    rows = sorted(results["rows"], key=lambda row: (row["model"], str(row["settings"])))
    return table(COLUMNS, rows)


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, needs=("shared", "model", "set"),
    options={
        "--model": {"action": "append", "help": "a folder of SHARED/models"},
        "--set": {"action": "append", "help": "name=value,name=value"},
        "--seed": {"type": int, "default": 0},
    },
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
