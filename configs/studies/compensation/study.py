"""Every compensation over a 2-bit RTN and a 2-bit GPTQ base, on a small model.

    python configs/studies/compensation/study.py --shared ../shared --work DIR --model babyllama
    python configs/studies/compensation/study.py --shared ../shared --table

2 bits, groups of 32, rank 16 and every other argument at its default; 320 calibration windows of
256 tokens of tinystories_calib, the last 64 of them for validation; scored on the first 128 windows
of tinystories_dev, which no step reads. `reference` is what the authors' own code reaches on the
same tokens, with seconds of one thread; ours are wall seconds of the whole compression. MSE is of
final normed hidden states to the teacher's. Methods that make their own base stand under RTN. Rows
that are not here were not run.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import lqec_jax as lqec
from lqec_jax.calibration.data import load_tokens
from lqec_jax.evaluate.discrepancy import discrepancy
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.job import prepare

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, quote, read_reference, table

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
COLUMNS = (
    ("base", "{base}"),
    ("method", "{name}"),
    ("bits per weight", lambda row: row["error"] or f"{row['bits_per_weight']:.2f}"),
    ("perplexity", "{ppl:.3f}"),
    ("reference", "{theirs[ppl]:.3f}"),
    ("KL", "{kl:.3f}"),
    ("MSE, training", "{train_mse:.4f}"),
    ("held out", "{held_out_mse:.4f}"),
    ("s", "{seconds:.0f}"),
    ("s an update", "{update:.2f}"),
    ("reference", "{theirs[cpu_seconds_per_update]:.2f}"),
    ("peak MB", "{peak_rss_mb:.0f}"),
    ("reference", "{theirs[peak_rss_mb]:.0f}"),
)


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    """Returns name, base and recipe of every row."""
    rows = [
        {"name": name, "base": base, "recipe": text.format(base=recipe)}
        for base, recipe in BASES.items()
        for name, text in CORRECTIONS.items()
    ]
    alone = [{"name": name, "base": "rtn", "recipe": text} for name, text in ALONE.items()]
    return rows[: len(CORRECTIONS)] + alone + rows[len(CORRECTIONS) :]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Compresses by one recipe and scores what comes."""
    folder, data = arguments.shared / "models" / arguments.model, arguments.shared / "data"
    calib, text = (str(data / f"tinystories_{name}.jsonl") for name in ("calib", "dev"))
    out = arguments.work / arguments.model
    found = lqec.compare(
        folder, [key["recipe"]], calib=calib, text=text, out=out, seqlen=SEQLEN, windows=WINDOWS,
        text_windows=SCORED, resume=(out / "results.json").exists(),
    )  # fmt: skip
    resolved = str(parse_recipe(key["recipe"]))
    row = next(row for row in found["rows"] if row["resolved"] == resolved)
    if row["artifact"]:
        teacher, train, held_out = read_windows(folder, calib, text)
        student = lqec.load(out / row["artifact"])
        models = ((teacher.fns, teacher.params), (student.fns, student.params))
        row["train_mse"] = discrepancy(*models, train).post_norm
        row["held_out_mse"] = discrepancy(*models, held_out).post_norm
        row["update"] = _seconds_an_update(student.report)
    del row["artifact"], row["resolved"]
    results |= {"model": arguments.model, "protocol": found["protocol"],
                "teacher": found["rows"][0]["ppl"],
                "settings": {"seqlen": SEQLEN, "windows": WINDOWS, "scored": SCORED}}  # fmt: skip
    return row


@cache
def read_windows(folder: Path, calib: str, text: str) -> tuple:
    """Returns the teacher, the windows that are trained on, and windows that no step reads."""
    teacher = lqec.load(folder)
    job = prepare(folder, BASES["rtn"], calib, seqlen=SEQLEN, windows=WINDOWS)
    dev = load_tokens(text, teacher.tokenizer, "documents", seqlen=SEQLEN, limit=SCORED * SEQLEN)
    return teacher, job.text.train, dev[: SCORED * SEQLEN].reshape(SCORED, SEQLEN)


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


def write_page(models: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a table a model, beside what the authors' own codes reach."""
    references, lines = read_reference(arguments.shared), quote(__doc__, 2)
    for model, results in models.items():
        rows = (
            row | {"theirs": find_reference(references, model, row["name"], row["base"])}
            for row in results["rows"]
        )
        lines += [f"## {model}: teacher {results['teacher']:.3f}", "", *table(COLUMNS, rows), ""]
    return [*lines, Path(__file__).with_name("notes.md").read_text()]


def find_reference(rows: list[dict], model: str, name: str, base: str) -> dict | None:
    """Returns the best of the reference's rows for one of ours, of rank 16 where it has a rank."""
    wanted = REFERENCE.get((name, base), ())
    found = [
        row for row in rows
        if row["model"] == model and row["method"] in wanted
        and row["settings"].get("rank", 16) == 16
    ]  # fmt: skip
    return min(found, key=lambda row: row["ppl"], default=None)


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, split="model",
    options={"--model": {"choices": MODELS}}, needs=("shared", "work", "model"),
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
