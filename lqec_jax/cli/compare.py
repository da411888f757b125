"""`lqec compare`: recipes side by side on one model, in one table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lqec_jax.errors import InputError

Recipes = Annotated[list[str], typer.Option("--recipe", metavar="R",
    help="A row of the table; may be repeated.")]  # fmt: skip
Calib = Annotated[str, typer.Option(metavar="TEXT",
    help="Calibration text: .txt, .jsonl, .parquet, a .npy of token ids, or hf:NAME.")]  # fmt: skip
Text = Annotated[str, typer.Option(metavar="FILE", help="What every row is scored on.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")]
Bits = Annotated[str | None, typer.Option(metavar="2,3,4",
    help="A row for each, in place of the bits= that a recipe writes.")]  # fmt: skip
Ranks = Annotated[str | None, typer.Option(metavar="4,16",
    help="A row for each, in place of the rank= that a recipe writes.")]  # fmt: skip
Seeds = Annotated[list[int] | None, typer.Option("--seed", metavar="N",
    help="May be repeated: a row for each. [default: 0]")]  # fmt: skip
Seqlen = Annotated[int, typer.Option(metavar="N", help="Tokens of a window, of both texts.")]
Windows = Annotated[int, typer.Option(metavar="N", help="How many of --calib are read.")]
ValRatio = Annotated[float, typer.Option(metavar="X",
    help="Of them, the fraction for validation.")]  # fmt: skip
TextWindows = Annotated[int | None, typer.Option(metavar="N",
    help="Only the first so many of --text.")]  # fmt: skip
Protocol = Annotated[str, typer.Option(metavar="P",
    help="How documents of --text become windows: documents or gptq.")]  # fmt: skip
Dtype = Annotated[str, typer.Option(metavar="D",
    help="Of activations: float32, bfloat16 or auto.")]  # fmt: skip
Resume = Annotated[bool, typer.Option("--resume",
    help="Go on with the comparison at DIR; recipes may be added.")]  # fmt: skip
Json = Annotated[str | None, typer.Option("--json", metavar="[FILE]",
    help="The rows as JSON, to FILE or standard output.")]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]


def compare(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id.")],
    *,
    recipe: Recipes,
    calib: Calib,
    text: Text,
    out: Out,
    bits: Bits = None,
    ranks: Ranks = None,
    seed: Seeds = None,
    seqlen: Seqlen = 512,
    windows: Windows = 320,
    val_ratio: ValRatio = 0.2,
    text_windows: TextWindows = None,
    protocol: Protocol = "documents",
    dtype: Dtype = "auto",
    resume: Resume = False,
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
