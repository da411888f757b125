"""Every quantizer at 2, 3 and 4 bits, alone and under RILQ, on two small models.

    python configs/studies/quantizers/study.py --shared ../shared --work DIR --model babyllama
    python configs/studies/quantizers/study.py --shared ../shared --table

Groups of 32, 320 calibration windows of 256 tokens of tinystories_calib of which RILQ keeps 64 for
validation; scored on the first 128 windows of tinystories_dev, which no step reads. `reference` is
what the authors' own code reaches on the same tokens; s are wall seconds of one run on a machine
that did other work too. Rows that are not here were not run.
"""

import argparse
import sys
from pathlib import Path

import lqec_jax as lqec

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Row, Study, quote, read_reference, table

MODELS = ("babyllama", "xs279k")
BITS = (2, 3, 4)
SEQLEN, WINDOWS, SCORED = 256, 320, 128

# What each makes at `bits`; {b} is put in. Only uniform grids have zeros, groups are 32 for all
# that have any.
QUANTIZERS = {
    "rtn": "rtn(bits={b}, group_size=32)",
    "rtn, clip by weight error": "rtn(bits={b}, group_size=32, clip_search='weight')",
    "rtn, clip by channel error": "rtn(bits={b}, group_size=32, clip_search='output')",
    "hqq": "hqq(bits={b}, group_size=32)",
    "gptq": "gptq(bits={b}, group_size=32)",
    "awq": "awq(bits={b}, group_size=32)",
    "omniquant": "omniquant(bits={b}, group_size=32)",
    "block_ap": "block_ap(bits={b}, group_size=32)",
    "slim_quant": "slim_quant(bits={b})",
    "nf": "nf(bits={b}, group_size=32)",
    "higgs": "higgs(bits={b})",
    "e8p": "e8p(bits={b})",
    "squeezellm": "squeezellm(bits={b})",
    "bcq": "bcq(bits={b}, group_size=32)",
}
# Of a width of their own: three levels and two.
STARTS = {"ternary": (1.58, "ternary(group_size=32)"), "onebit": (1, "onebit()")}
# The same quantizer with other grids: alone.
VARIANTS = ("rtn, clip by weight error", "rtn, clip by channel error")
# Fewer of RILQ's updates than its default of 400, fewest where less is to be repaired.
RILQ = {2: "rilq(rank=16, updates=150)", 3: "rilq(rank=16, updates=50)",
        4: "rilq(rank=16, updates=50)"}  # fmt: skip
# Row of ours -> method and bits of the reference's.
REFERENCE = {"rtn": "RTN W{b}", "gptq": "GPTQ W{b}", "omniquant": "OmniQuant LWC W{b}",
             "block_ap": "EfficientQAT Block-AP W{b}"}  # fmt: skip


FIGURES = {"bits": "{bits_per_weight:.2f}", "ppl": "{ppl:.3f}", "kl": "{kl:.3f}",
           "s": "{seconds:.0f}"}  # fmt: skip
COLUMNS = (
    ("bits", "{bits}"),
    ("quantizer", "{name}"),
    ("bits per weight", "{alone[bits]}"),
    ("perplexity", "{alone[ppl]}"),
    ("reference", "{reference:.3f}"),
    ("KL", "{alone[kl]}"),
    ("s", "{alone[s]}"),
    ("with RILQ: bits per weight", "{repaired[bits]}"),
    ("perplexity", "{repaired[ppl]}"),
    ("KL", "{repaired[kl]}"),
    ("s", "{repaired[s]}"),
)


def list_quantizers() -> list[tuple[str, float, str, str]]:
    """Returns (name, bits, recipe, recipe under RILQ)."""
    rows = [
        (name, bits, text.format(b=bits), f"{text.format(b=bits)} | {RILQ[bits]}")
        for bits in BITS
        for name, text in QUANTIZERS.items()
    ]
    return rows + [(name, b, text, f"{text} | {RILQ[2]}") for name, (b, text) in STARTS.items()]


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    """Returns the teacher and every recipe; those without RILQ are cheap and come first."""
    rows = list_quantizers()
    recipes = [alone for *_, alone, _ in rows]
    recipes += [repaired for name, *_, repaired in rows if name not in VARIANTS]
    return [{"recipe": recipe} for recipe in ["teacher", *recipes]]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Compresses by one recipe and scores what comes."""
    out, data = arguments.work / arguments.model, arguments.shared / "data"
    # A comparison of any recipe scores the teacher.
    recipe = QUANTIZERS["rtn"].format(b=BITS[0]) if key["recipe"] == "teacher" else key["recipe"]
    found = lqec.compare(
        arguments.shared / "models" / arguments.model, [recipe],
        calib=str(data / "tinystories_calib.jsonl"), text=str(data / "tinystories_dev.jsonl"),
        out=out, seqlen=SEQLEN, windows=WINDOWS, text_windows=SCORED,
        resume=(out / "results.json").exists(),
    )  # fmt: skip
    results |= {"model": arguments.model, "protocol": found["protocol"],
                "settings": {"seqlen": SEQLEN, "windows": WINDOWS, "scored": SCORED}}  # fmt: skip
    row = next(row for row in found["rows"] if row["recipe"] == key["recipe"])
    return {name: value for name, value in row.items() if name not in ("artifact", "resolved")}


def write_page(models: dict, arguments: argparse.Namespace) -> list[str]:
    """Returns a table a model, beside what the authors' own codes reach."""
    references, lines = read_reference(arguments.shared), quote(__doc__, 2)
    for model, results in models.items():
        found = {row["recipe"]: row for row in results["rows"]}
        rows = (
            {"bits": bits, "name": name, "alone": write_figures(found[alone]),
             "repaired": write_figures(found.get(repaired), "" if name in VARIANTS else "not run"),
             "reference": find_reference(references, model, name, bits)}
            for name, bits, alone, repaired in list_quantizers() if alone in found
        )  # fmt: skip
        teacher = f"## {model}: teacher {found['teacher']['ppl']:.3f}"
        lines += [teacher, "", *table(COLUMNS, rows), ""]
    return [*lines, Path(__file__).with_name("notes.md").read_text()]


def write_figures(row: Row | None, absent: str = "") -> dict[str, str]:
    if row is None or row["error"]:
        return dict.fromkeys(FIGURES, absent) | ({"bits": row["error"]} if row else {})
    return {name: text.format_map(row) for name, text in FIGURES.items()}


def find_reference(rows: list[dict], model: str, name: str, bits: float) -> float | None:
    """Returns the best perplexity of the authors' own code."""
    wanted = REFERENCE.get(name, "").format(b=bits)
    ppl = [row["ppl"] for row in rows if row["model"] == model and row["method"] == wanted]
    return min(ppl, default=None)


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, split="model",
    options={"--model": {"choices": MODELS}}, needs=("shared", "work", "model"),
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
