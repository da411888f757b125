"""`lqec compare`: recipes side by side on one model, in one table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lqec_jax.cli.options import (
    Calib,
    DenseModel,
    Dtype,
    FolderOut,
    Protocol,
    ResumeRows,
    ScoredText,
    Seqlen,
    TextWindows,
    ValRatio,
    Windows,
    flag,
    json_of,
    option,
)
from lqec_jax.errors import InputError

Recipes = option(list[str], "R", "A row of the table; may be repeated.")
Bits = option(str | None, "2,3,4", "A row for each, in place of the bits= that a recipe writes.")
Ranks = option(str | None, "4,16", "A row for each, in place of the rank= that a recipe writes.")
Seeds = option(list[int] | None, "N", "May be repeated: a row for each. [default: 0]")
Json = json_of("The rows")
Quiet = flag("--quiet", "No progress, no table.", "-q")


def compare(
    model: DenseModel,
    *,
    recipe: Recipes,
    calib: Calib,
    text: ScoredText,
    out: FolderOut,
    bits: Bits = None,
    ranks: Ranks = None,
    seed: Seeds = None,
    seqlen: Seqlen = 512,
    windows: Windows = 320,
    val_ratio: ValRatio = 0.2,
    text_windows: TextWindows = None,
    protocol: Protocol = "documents",
    dtype: Dtype = "auto",
    resume: ResumeRows = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Make a model by several recipes and measure them alike: bits, perplexity, KL, seconds."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    grid = {"bits": read_numbers("--bits", bits), "ranks": read_numbers("--ranks", ranks)}
    with _resumable(out):
        from lqec_jax.analysis import comparison

        with reporting(quiet) as reporter:
            results = comparison.compare(
                model, recipe, calib=calib, text=text, out=out, seeds=seed or (0,), seqlen=seqlen,
                windows=windows, val_ratio=val_ratio, text_windows=text_windows,
                protocol=protocol, dtype=dtype, resume=resume, reporter=reporter, **grid,
            )  # fmt: skip
    if json is not None:
        write_json(json, results)
    if json != STDOUT and not quiet:
        _print_results(results, out)


def read_numbers(option: str, text: str | None) -> list[int | float]:
    """Reads '2,3,4', or '0.1,16'.

    Raises:
      InputError: something else is there.
    """
    if text is None:
        return []
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}; numbers with commas were wanted, as 2,3,4") from None


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Says after an interruption that what was measured is kept."""
    try:
        yield
    except KeyboardInterrupt:
        import sys

        if (out / "results.json").is_file():
            print(f"{out} keeps what is finished; the same command with --resume goes on with it",
                  file=sys.stderr)  # fmt: skip
        raise


def _print_results(results: Mapping[str, Any], out: Path) -> None:
    from lqec_jax.cli.printing import print_line, print_table
    from lqec_jax.evaluate.page import show_row

    names = ("recipe", "seed", "bits_per_weight", "ppl", "interval", "kl", "top1", "seconds",
             "peak_rss_mb")  # fmt: skip
    columns = ("recipe", "seed", "bits", results["protocol"], "95% interval", "KL", "same first",
               "seconds", "peak MB")  # fmt: skip
    rows = [show_row(row) for row in results["rows"]]
    print_table(columns, [[row[name] for name in names] for row in rows], right=8)
    for row in results["rows"]:
        if row["error"]:
            print_line(f"{row['recipe']}: {row['error']}")
    print_line(f"perplexity by {results['protocol']}; KL in nats and first choices are against "
               "the teacher; peak MB is this process's while it made the row")  # fmt: skip
    print_line(f"written to {out}: results.json, results.csv, report.html, rows/")
