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
from pathlib import Path

import jax

import lqec_jax as lqec
from lqec_jax.core.tree import is_compressed
from lqec_jax.models.model import Model

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
MODELS = ("babyllama", "xs279k")
GRID = "bits=2, group_size=32"
STARTS = {
    "rtn": f"rtn({GRID}) | rilq(rank=16)",
    "gptq": f"gptq({GRID}) | rilq(rank=16)",
    "apiq": f"apiq({GRID}, rank=16)",
}
ROWS, SEQLEN, UPDATES = 1000, 256, 100


def measure(shared: Path, work: Path) -> None:
    """Makes the rows that are missing."""
    data = write_task(shared / "data" / "gsm8k_train.jsonl", work / "task.jsonl")
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for model in MODELS:
        for base, recipe in STARTS.items():
            if any((row["model"], row["base"]) == (model, base) for row in rows):
                continue
            folder = work / f"{model}-{base}"
            started = make_start(shared, model, recipe, folder)
            plain = drop_adapters(started)
            for name, start, rank in (("its own", started, None), ("new", plain, 16)):
                settings = {"rank": rank, "updates": UPDATES, "eval_every": 20, "patience": 0}
                tuned = lqec.finetune(start, data, seqlen=SEQLEN, **settings)
                history = tuned.report["fits"][-1]["history"]
                losses = [point["val_loss"] for point in history]
                rows.append({"model": model, "base": base, "adapters": name, "before": losses[0],
                             "best": min(losses), "updates": history[-1]["update"],
                             "history": losses})  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


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


def write_table() -> None:
    """Writes results.md from the rows that are there."""
    rows = json.loads(RESULTS.read_text())
    lines = [
        " ".join(__doc__.split("\n\n")[2].split()),
        "",
        "| model | base | adapters | before | best | updates |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['base']} | {row['adapters']} | {row['before']:.4f} "
        f"| {row['best']:.4f} | {row['updates']} |"
        for row in rows
    ]
    TABLE.write_text("\n".join(lines) + "\n")


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
