"""`lqec demo`: the main job on the model that comes with the package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lqec_jax.cli.options import NumbersJson, Quiet, flag, option

Out = option(Path, "DIR", "The folder to write: numbers, a plot, the compressed model.")
Seed = option(int, "N", "Of RILQ's training and the sample texts.")
Overwrite = flag("--overwrite", "Replace an earlier demo at DIR.")


def demo(
    *,
    out: Out = Path("lqec-demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: NumbersJson = None,
    quiet: Quiet = False,
) -> None:
    """Round a small model to 2 bits and bring it back; minutes on two cores, no network."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    from lqec_jax.demo.run import run_demo

    with reporting(quiet) as reporter:
        result = run_demo(out, seed=seed, overwrite=overwrite, reporter=reporter)
    if json is not None:
        write_json(json, result)
    if json != STDOUT and not quiet:
        print_demo(result, out)


def print_demo(result: Mapping[str, Any], out: Path) -> None:
    """Prints the table of rows and what each of them writes."""
    from lqec_jax.cli.printing import format_number, print_line, print_table

    rows = result["rows"]
    columns = ("model", "bits per weight", "perplexity", "95% interval", "gap closed", "seconds")
    table = [
        (
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            format_number(row["ppl"], 2),
            f"{format_number(row['low'], 2)} - {format_number(row['high'], 2)}",
            _show_share(row),
            f"{row['seconds']:.1f}",
        )
        for row in rows
    ]
    print_table(columns, table, right=5)
    print_line(
        f"perplexity on held-out text, protocol {rows[0]['protocol']}; gap closed: how much of the "
        "loss that rounding added is taken back"
    )
    print_line()
    for row in rows[1:]:
        print_line(f"{row['name']} is {row['recipe']}")
    print_line()
    texts = [(row["name"], _on_one_line(result["prompt"] + row["text"])) for row in rows]
    print_table(("model", "what it writes"), texts)
    print_line()
    print_line(f"{result['seconds']:.0f} s, {result['peak_rss_mb']:.0f} MB at most; all of it, a "
               f"plot and the compressed model are in {out}")  # fmt: skip


def _show_share(row: Mapping[str, Any]) -> str:
    """Writes how much of the gap is closed, for the rows that tried."""
    share = row["gap_closed"]
    return "" if share is None or row["name"] in ("teacher", "rtn") else f"{100 * share:.0f}%"


def _on_one_line(text: str) -> str:
    """Joins lines, and replaces what would move a terminal's cursor: a model may write anything."""
    words = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
