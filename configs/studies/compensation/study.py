"""Every compensation over a 2-bit RTN and a 2-bit GPTQ base, on a small model.

    python configs/studies/compensation/study.py --shared ../shared --work DIR --model babyllama
    python configs/studies/compensation/study.py --shared ../shared --table

The first goes on where it was stopped, row by row, and copies its rows to results-MODEL.json; the
second writes results.md from them.

2 bits, groups of 32, rank 16 and every other argument at its default; 320 calibration windows of
256 tokens of tinystories_calib, the last 64 of them for validation; scored on the first 128 windows
of tinystories_dev, which no step reads. `reference` is what the authors' own code reaches on the
same tokens, with seconds of one thread; ours are wall seconds of the whole compression. MSE is of
final normed hidden states to the teacher's. Methods that make their own base stand under RTN. Rows
that are not here were not run.
"""

import argparse
import json
from pathlib import Path

import lqec_jax as lqec
from lqec_jax.calibration.data import load_tokens
from lqec_jax.evaluate.discrepancy import discrepancy
from lqec_jax.runs.job import prepare

HERE = Path(__file__).parent
MODELS = ("babyllama", "xs279k")
SEQLEN, WINDOWS, SCORED = 256, 320, 128
BASES = {"rtn": "rtn(bits=2, group_size=32)", "gptq": "gptq(bits=2, group_size=32)"}
SLIM = "slim_quant(bits=4) | wanda(sparsity='2:4')"
HISTOGRAM = "slim_quant(bits=4, search='integral') | wanda(sparsity='2:4')"
# LoftQ as its authors' code has it: nothing in 16 bits, the last of its turns.
FLOAT32 = "quantizer=rtn(bits=2, group_size=32, scale_dtype='float32'), dtype='float32'"
GRID = "bits=2, group_size=32, rank=16"

# What is put after a base; {base} is the base itself, where a method takes it inside.
CORRECTIONS = {
    "none": "{base}",
    "svd (lqer, naive_lora)": "{base} | svd(rank=16)",
    "l2qer": "{base} | l2qer(rank=16)",
    "slim_lora": "{base} | slim_lora(rank=16)",
    "qera_approx": "{base} | qera_approx(rank=16)",
    "qera": "{base} | qera(rank=16)",
    "eora": "{base} | eora(rank=16)",
    "aser": "aser(rank=16, quantizer={base})",
    "lq_lora": "{base} | lq_lora(rank=16)",
    "lq_lora, alternating": "lq_lora(rank=16, quantizer={base})",
    "loftq": "loftq(rank=16, quantizer={base})",
    "caldera": "caldera(rank=16, quantizer={base})",
    "caldera, 4-bit factors": "caldera(rank=16, quantizer={base}, factor_bits=4)",
    "rilq, linear scope": "{base} | rilq(rank=16, scope='linear')",
    "rilq, block scope": "{base} | rilq(rank=16, scope='block')",
    "rilq, discrepancy alone": "{base} | rilq(rank=16, token_weight=0.0)",
    "lrec": "{base} | lrec(rank=16)",
    "rilq": "{base} | rilq(rank=16)",
    "rilq after qera": "{base} | qera(rank=16) | rilq()",
    "rilq, pooled": "{base} | rilq(rank=16, pool=True)",
    "rilq, pooled and merged": "{base} | rilq(rank=16, pool=True) | merge()",
}
ALONE = {
    "apiq, linear": f"apiq({GRID}, scope='linear')",
    "apiq, block": f"apiq({GRID}, scope='block')",
    "apiq, block, then rilq": f"apiq({GRID}, scope='block') | rilq()",
    "loftq, float32, last turn": f"loftq(rank=16, {FLOAT32}, keep='last')",
    "block_ap": "block_ap(bits=2, group_size=32)",
    "block_ap | e2e_qp": "block_ap(bits=2, group_size=32) | e2e_qp()",
    "slim 4-bit 2:4, no adapter": SLIM,
    "slim 4-bit 2:4, no adapter, clip by histogram": HISTOGRAM,
    "slim 4-bit 2:4, naive_lora": f"{SLIM} | naive_lora(rank=0.1)",
    "slim 4-bit 2:4": f"{SLIM} | slim_lora(rank=0.1)",
    "slim 4-bit 2:4, clip by histogram": f"{HISTOGRAM} | slim_lora(rank=0.1)",
    "slim 4-bit 2:4, 4-bit adapters": f"{SLIM} | slim_lora(rank=0.1) | quantize_adapter(bits=4)",
}  # fmt: skip
# Row of ours -> methods of the reference, any of which it is held against.
REFERENCE = {
    ("none", "rtn"): ("RTN W2",),
    ("none", "gptq"): ("GPTQ W2",),
    ("qera", "rtn"): ("QERA-exact on rtn_w2",),
    ("qera", "gptq"): ("QERA-exact on gptq_w2",),
    ("eora", "rtn"): ("EoRA on rtn_w2",),
    ("eora", "gptq"): ("EoRA on gptq_w2",),
    ("loftq", "rtn"): ("LoftQ W2 uniform asym g32",),
    ("loftq, float32, last turn", "rtn"): ("LoftQ W2 uniform asym g32",),
    ("rilq", "rtn"): ("RILQ on rtn_w2",),
    ("rilq", "gptq"): ("RILQ on gptq_w2",),
    ("apiq, block", "rtn"): ("ApiQ-bw W2",),
    ("block_ap", "rtn"): ("EfficientQAT Block-AP W2",),
    ("block_ap | e2e_qp", "rtn"): ("EfficientQAT Block-AP + E2E-QP W2",),
    ("slim 4-bit 2:4, no adapter", "rtn"): ("SLiM-Quant4 + Wanda 2:4",),
    ("slim 4-bit 2:4, no adapter, clip by histogram", "rtn"): ("SLiM-Quant4 + Wanda 2:4",),
    ("slim 4-bit 2:4, naive_lora", "rtn"): ("SLiM-Quant4 + Wanda 2:4 + naive LoRA",),
    ("slim 4-bit 2:4", "rtn"): ("SLiM-Quant4 + Wanda 2:4 + SLiM-LoRA",),
    ("slim 4-bit 2:4, clip by histogram", "rtn"): ("SLiM-Quant4 + Wanda 2:4 + SLiM-LoRA",),
}
NAMES = ("bits_per_weight", "ppl", "kl", "train_mse", "held_out_mse", "seconds", "update",
         "peak_rss_mb")  # fmt: skip


def list_rows() -> list[tuple[str, str, str]]:
    """Returns (name, base, recipe) of every row."""
    rows = [
        (name, base, text.format(base=recipe))
        for base, recipe in BASES.items()
        for name, text in CORRECTIONS.items()
    ]
    return rows[: len(CORRECTIONS)] + [(name, "rtn", text) for name, text in ALONE.items()] + (
        rows[len(CORRECTIONS) :]
    )  # fmt: skip


def measure(shared: Path, model: str, work: Path) -> None:
    """Makes what is missing of a model's rows."""
    folder, data, kept = shared / "models" / model, shared / "data", HERE / f"results-{model}.json"
    out = work / model
    done = json.loads(kept.read_text())["rows"] if kept.exists() else []
    teacher = lqec.load(folder)
    calib, text = (str(data / f"tinystories_{name}.jsonl") for name in ("calib", "dev"))
    job = prepare(folder, BASES["rtn"], calib, seqlen=SEQLEN, windows=WINDOWS)
    dev = load_tokens(text, teacher.tokenizer, "documents", seqlen=SEQLEN, limit=SCORED * SEQLEN)
    held_out = dev[: SCORED * SEQLEN].reshape(SCORED, SEQLEN)
    for name, base, recipe in list_rows():
        if any((row["name"], row["base"]) == (name, base) for row in done):
            continue
        results = lqec.compare(
            folder, [recipe], calib=calib, text=text, out=out, seqlen=SEQLEN, windows=WINDOWS,
            text_windows=SCORED, resume=(out / "results.json").exists(),
        )  # fmt: skip
        row = next(r for r in results["rows"] if r["resolved"] == _resolve(recipe))
        row = {"name": name, "base": base} | row
        if row["artifact"]:
            student = lqec.load(out / row["artifact"])
            models = ((teacher.fns, teacher.params), (student.fns, student.params))
            row["train_mse"] = discrepancy(*models, job.text.train).post_norm
            row["held_out_mse"] = discrepancy(*models, held_out).post_norm
            row["update"] = _seconds_an_update(student.report)
        row.pop("artifact"), row.pop("resolved")
        results["environment"].pop("platform", None)
        done = [*done, row]
        facts = {"model": model, "protocol": results["protocol"],
                 "teacher": results["rows"][0]["ppl"],
                 "settings": {"seqlen": SEQLEN, "windows": WINDOWS, "scored": SCORED},
                 "environment": results["environment"], "rows": done}  # fmt: skip
        kept.write_text(json.dumps(facts, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def _resolve(recipe: str) -> str:
    from lqec_jax.recipe import parse_recipe

    return str(parse_recipe(recipe))


def _seconds_an_update(report: dict) -> float | None:
    """Returns seconds an update of a recipe's one training, of the whole model or of its blocks.

    Compiling is counted, and with blocks the statistics of their inputs.
    """
    methods = {fit["method"] for fit in report["fits"]}
    if len(methods) != 1:
        return None
    (method,) = methods
    stage = next(s for s in report["stages"] if method in s["name"].split(" | "))
    updates = sum(fit["history"][-1]["update"] for fit in report["fits"])
    return stage["seconds"] / max(1, updates)


def write_table(shared: Path) -> None:
    """Writes results.md from the rows that are there."""
    references = json.loads((shared / "data" / "reference_results.json").read_text())["rows"]
    lines = [" ".join(__doc__.split("\n\n")[3].split()), ""]
    for model in MODELS:
        path = HERE / f"results-{model}.json"
        if path.exists():
            lines += table(json.loads(path.read_text()), references)
    notes = HERE / "notes.md"
    lines += [notes.read_text()] if notes.exists() else []
    (HERE / "results.md").write_text("\n".join(lines).rstrip() + "\n")


def table(results: dict, references: list[dict]) -> list[str]:
    """Returns a model's table as lines of markdown."""
    lines = [
        f"## {results['model']}: teacher {results['teacher']:.3f}",
        "",
        "| base | method | bits per weight | perplexity | reference | KL | MSE, training "
        "| held out | s | s an update | reference | peak MB | reference |",
        "|---|" + "---|" * 12,
    ]
    for row in results["rows"]:
        theirs = find_reference(references, results["model"], row["name"], row["base"])
        name = row["name"].replace("|", "\\|")
        lines.append("| " + " | ".join([row["base"], name, *cells(row, theirs)]) + " |")
    return [*lines, ""]


def cells(row: dict, theirs: dict | None) -> list[str]:
    if row.get("error"):
        return [row["error"], *[""] * 10]

    def write(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    theirs = theirs or {}
    return [
        write(row["bits_per_weight"], 2), write(row["ppl"], 3), write(theirs.get("ppl"), 3),
        write(row["kl"], 3), write(row["train_mse"], 4), write(row["held_out_mse"], 4),
        write(row["seconds"], 0), write(row["update"], 2),
        write(theirs.get("cpu_seconds_per_update"), 2), write(row["peak_rss_mb"], 0),
        write(theirs.get("peak_rss_mb"), 0),
    ]  # fmt: skip


def find_reference(rows: list[dict], model: str, name: str, base: str) -> dict | None:
    """Returns the best of the reference's rows for one of ours, of rank 16 where it has a rank."""
    wanted = REFERENCE.get((name, base), ())
    found = [
        row for row in rows
        if row["model"] == model and row["method"] in wanted
        and row["settings"].get("rank", 16) == 16
    ]  # fmt: skip
    return min(found, key=lambda row: row["ppl"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="models/ and data/ are in it")
    parser.add_argument("--work", type=Path, help="where artifacts go")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(arguments.shared)
    else:
        measure(arguments.shared, arguments.model, arguments.work)


if __name__ == "__main__":
    main()
