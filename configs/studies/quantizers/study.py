"""Every quantizer at 2, 3 and 4 bits, alone and under RILQ, on two small models.

    python configs/studies/quantizers/study.py --shared ../shared --work DIR --model babyllama
    python configs/studies/quantizers/study.py --shared ../shared --table

The first goes on where it was stopped, row by row, and copies its rows to results-MODEL.json; the
second writes results.md from them.

Groups of 32, 320 calibration windows of 256 tokens of tinystories_calib of which RILQ keeps 64 for
validation; scored on the first 128 windows of tinystories_dev, which no step reads. `reference` is
what the authors' own code reaches on the same tokens; s are wall seconds of one run on a machine
that did other work too. Rows that are not here were not run.
"""

import argparse
import json
from pathlib import Path

import lqec_jax as lqec

HERE = Path(__file__).parent
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


def list_rows() -> list[tuple[str, float, str, str]]:
    """Returns (name, bits, recipe, recipe under RILQ), alone ones are cheap and come first."""
    rows = [
        (name, bits, text.format(b=bits), f"{text.format(b=bits)} | {RILQ[bits]}")
        for bits in BITS
        for name, text in QUANTIZERS.items()
    ]
    return rows + [(name, b, text, f"{text} | {RILQ[2]}") for name, (b, text) in STARTS.items()]


def measure(shared: Path, model: str, work: Path) -> None:
    """Makes what is missing of a model's rows."""
    rows = list_rows()
    recipes = [alone for *_, alone, _ in rows]
    recipes += [repaired for name, *_, repaired in rows if name not in VARIANTS]
    out = work / model
    kept = HERE / f"results-{model}.json"
    for recipe in recipes:  # one a call: every call checks all of its recipes
        results = lqec.compare(
            shared / "models" / model,
            [recipe],
            calib=str(shared / "data" / "tinystories_calib.jsonl"),
            text=str(shared / "data" / "tinystories_dev.jsonl"),
            out=out,
            seqlen=SEQLEN,
            windows=WINDOWS,
            text_windows=SCORED,
            resume=(out / "results.json").exists(),
        )
        drop = ("artifact", "resolved")
        results["rows"] = [
            {key: value for key, value in row.items() if key not in drop} for row in results["rows"]
        ]
        results["model"] = model
        results["environment"].pop("platform", None)
        results["settings"] = {"seqlen": SEQLEN, "windows": WINDOWS, "scored": SCORED}
        kept.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["rows"][-1]), flush=True)


def write_table(shared: Path) -> None:
    """Writes results.md from the rows that are there."""
    references = json.loads((shared / "data" / "reference_results.json").read_text())["rows"]
    lines = [" ".join(__doc__.split("\n\n")[3].split()), ""]
    for model in MODELS:
        path = HERE / f"results-{model}.json"
        if path.exists():
            lines += table(model, json.loads(path.read_text()), references)
    notes = HERE / "notes.md"
    lines += [notes.read_text()] if notes.exists() else []
    (HERE / "results.md").write_text("\n".join(lines).rstrip() + "\n")


def table(model: str, results: dict, references: list[dict]) -> list[str]:
    found = {row["recipe"]: row for row in results["rows"]}
    teacher = results["rows"][0]
    lines = [
        f"## {model}: teacher {teacher['ppl']:.3f}",
        "",
        "| bits | quantizer | bits per weight | perplexity | reference | KL | s "
        "| with RILQ: bits per weight | perplexity | KL | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, bits, alone, repaired in list_rows():
        one, two = found.get(alone), found.get(repaired)
        if one is None:
            continue
        cells = [str(bits), name, *numbers(one)]
        cells.insert(4, reference(references, model, name, bits))
        absent = [""] * 4 if name in VARIANTS else ["not run"] * 4
        lines.append("| " + " | ".join(cells + (numbers(two) if two else absent)) + " |")
    return [*lines, ""]


def numbers(row: dict) -> list[str]:
    if row.get("error"):
        return [row["error"], "", "", ""]
    return [f"{row['bits_per_weight']:.2f}", f"{row['ppl']:.3f}", f"{row['kl']:.3f}",
            f"{row['seconds']:.0f}"]  # fmt: skip


def reference(rows: list[dict], model: str, name: str, bits: float) -> str:
    wanted = REFERENCE.get(name, "").format(b=bits)
    ppl = [row["ppl"] for row in rows if row["model"] == model and row["method"] == wanted]
    return f"{min(ppl):.3f}" if ppl else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="models/ and data/ are in it")
    parser.add_argument("--work", type=Path, help="where artifacts go")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        write_table(arguments.shared)
    elif arguments.model and arguments.work:
        measure(arguments.shared, arguments.model, arguments.work)
    else:
        parser.error("give --table, or --model and --work")


if __name__ == "__main__":
    main()
