"""`lqec analyze rank`: the spectra of weight errors, and what a rank buys by scope."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from lqec_jax.cli.compare import Quiet, read_numbers
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
    json_of,
    option,
)
from lqec_jax.errors import InputError

Base = option(str, "R", "A recipe that quantizes alone.")
Ranks = option(str, "2,4,8", "Of the adapters.")
Scopes = option(str, "A,B", "What adapters are made for: weight, linear, block, model.")
Updates = option(int | None, "N", "Of every training. [default: rilq's]")
Seed = option(int, "N", "Of every run.")
Json = json_of("The analysis")

app = typer.Typer(help="Why a model is hard to compress.", rich_markup_mode=None)


@app.callback()
def _options() -> None:
    """Why a model is hard to compress."""


@app.command("rank")
def rank(
    model: DenseModel,
    *,
    calib: Calib,
    text: ScoredText,
    out: FolderOut,
    base: Base = "rtn(bits=2, group_size=64)",
    ranks: Ranks = "2,4,8,16,32",
    scopes: Scopes = "weight,linear,block,model",
    updates: Updates = None,
    seqlen: Seqlen = 512,
    windows: Windows = 320,
    val_ratio: ValRatio = 0.2,
    text_windows: TextWindows = None,
    protocol: Protocol = "documents",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    resume: ResumeRows = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Measure the spectra of the weight errors, and what each rank repairs by each scope."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    asked = {"ranks": _read_ranks(ranks), "scopes": [word.strip() for word in scopes.split(",")]}
    from lqec_jax.analysis.ranks import analyze_ranks

    with reporting(quiet) as reporter:
        analysis = analyze_ranks(
            model=model, base=base, calib=calib, text=text, out=out, updates=updates, seed=seed,
            seqlen=seqlen, windows=windows, val_ratio=val_ratio, text_windows=text_windows,
            protocol=protocol, dtype=dtype, resume=resume, reporter=reporter, **asked,
        )  # fmt: skip
    if json is not None:
        write_json(json, analysis)
    if json != STDOUT and not quiet:
        _print_analysis(analysis, out)


def _read_ranks(text: str) -> list[int]:
    ranks = read_numbers("--ranks", text)
    if not all(isinstance(rank, int) for rank in ranks):
        raise InputError(f"--ranks {text!r}; whole numbers with commas were wanted, as 2,4,8")
    return ranks


def _print_analysis(analysis: Mapping[str, Any], out: Path) -> None:
    from lqec_jax.cli.printing import print_line, print_table
    from lqec_jax.evaluate.rank_page import find_spreads, show_rank, tabulate_spectra

    names = ("kind", "shape", "relative_error", "stable_rank", "half", "most")
    columns = ("kind", "shape", "relative error", "stable rank", "rank for 50%", "for 90%")
    kinds = tabulate_spectra(analysis["spectra"])
    print_table(columns, [[row[name] for name in names] for row in kinds], right=4)
    print_line()
    names = ("scope", "rank", "bits_per_weight", "ppl", "kl", "relative_error", "train_mse",
             "held_out_mse", "seconds")  # fmt: skip
    columns = ("scope", "rank", "bits", analysis["protocol"], "KL", "weight error",
               "MSE, training", "held out", "seconds")  # fmt: skip
    rows = [show_rank(row) for row in analysis["rows"]]
    print_table(columns, [[row[name] for name in names] for row in rows], right=8)
    for row in find_spreads(analysis["rows"]):
        print_line(f"{row['scope']}: over the ranks the loss spreads by {row['nll']} nats")
    print_line("MSE is of final normed hidden states to the teacher's; KL in nats against it")
    print_line(f"written to {out}: analysis.json, analysis.html, runs/")
