"""What adapters are worth as the start of fine-tuning on a task, at equal steps.

    python configs/studies/finetune_start/study.py --shared ../shared --work DIR
    python configs/studies/finetune_start/study.py --table

A 2-bit base in groups of 32 with rank-16 adapters, which are RILQ's or ApiQ's, or new ones (a
normal, b = 0) on the same base; then the same fine-tuning of the adapters on 1000 questions and
answers of gsm8k_train, loss on answers, the last 100 rows looked at. Loss is nats per token of the
answers there, before the first update and at the best look.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

import lqec_jax as lqec
from lqec_jax.core.tree import is_compressed
from lqec_jax.models.model import Model

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, quote, table

MODELS = ("babyllama", "xs279k")
GRID = "bits=2, group_size=32"
STARTS = {
    "rtn": f"rtn({GRID}) | rilq(rank=16)",
    "gptq": f"gptq({GRID}) | rilq(rank=16)",
    "apiq": f"apiq({GRID}, rank=16)",
}
ROWS, SEQLEN, UPDATES = 1000, 256, 100
COLUMNS = (
    ("model", "{model}"),
    ("base", "{base}"),
    ("adapters", "{adapters}"),
    ("before", "{before:.4f}"),
    ("best", "{best:.4f}"),
    ("updates", "{updates}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    return [
        {"model": model, "base": base, "adapters": adapters}
        for model in MODELS
        for base in STARTS
        for adapters in ("its own", "new")
    ]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Fine-tunes from one start."""
    shared, work = arguments.shared, arguments.work
    data = write_task(shared / "data" / "gsm8k_train.jsonl", work / "task.jsonl")
    folder = work / f"{key['model']}-{key['base']}"
    start, rank = make_start(shared, key["model"], STARTS[key["base"]], folder), None
    if key["adapters"] == "new":
        start, rank = drop_adapters(start), 16
    settings = {"rank": rank, "updates": UPDATES, "eval_every": 20, "patience": 0}
    tuned = lqec.finetune(start, data, seqlen=SEQLEN, **settings)
    history = tuned.report["fits"][-1]["history"]
    losses = [point["val_loss"] for point in history]
    return {"before": losses[0], "best": min(losses), "updates": history[-1]["update"],
            "history": losses}  # fmt: skip


def write_task(source: Path, target: Path) -> Path:
    """Writes the first rows of the task as prompts and completions."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open() as lines, target.open("w") as out:
        for line, _ in zip(lines, range(ROWS), strict=False):
            row = json.loads(line)
            out.write(json.dumps({"prompt": row["question"], "completion": "\n" + row["answer"]}))
            out.write("\n")
    return target


def make_start(shared: Path, model: str, recipe: str, folder: Path) -> Model:
    """Returns a compressed model, made once."""
    if not folder.exists():
        calib = str(shared / "data" / "tinystories_calib.jsonl")
        lqec.compress(shared / "models" / model, recipe, calib, seqlen=256, windows=320, out=folder)
    return lqec.load(folder)


def drop_adapters(model: Model) -> Model:
    """Returns the model with its base alone."""
    bare = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, corrections=()) if is_compressed(leaf) else leaf,
        model.params,
        is_leaf=is_compressed,
    )
    return dataclasses.replace(model, params=bare)


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    return [*quote(__doc__, 2), *table(COLUMNS, results["rows"])]


STUDY = Study(__doc__, __file__, list_rows, measure, write_page, needs=("shared", "work"))


if __name__ == "__main__":
    STUDY.run()
