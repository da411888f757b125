"""Options of commands: how one is declared, and those that several commands share.

An option that one command alone has stands beside it; what two commands call by one name and mean
alike is declared here.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

TEXTS = ".txt, .jsonl, .parquet, a .npy of token ids, or hf:NAME."


def option(kind: Any, metavar: str, help: str | None = None, *names: str) -> Any:
    """Returns the annotation of an option; its name is the parameter's unless others are given."""
    return Annotated[kind, typer.Option(*names, metavar=metavar, help=help)]


def flag(name: str, help: str, *more: str) -> Any:
    """Returns the annotation of an option that is given or not."""
    return Annotated[bool, typer.Option(name, *more, help=help)]


def argument(kind: Any, help: str) -> Any:
    return Annotated[kind, typer.Argument(help=help)]


def json_of(what: str) -> Any:
    """Returns the annotation of --json."""
    help = f"{what} as JSON, to FILE or standard output."
    return option(str | None, "[FILE]", help, "--json")


# Arguments.
DenseModel = argument(str, "A Hugging Face folder or hub id.")
AnyModel = argument(str, "A Hugging Face folder, hub id or artifact.")
ArtifactOut = argument(Path, "The artifact folder to write.")

# Whatever computes.
NumbersJson = json_of("The numbers")
Quiet = flag("--quiet", "No progress, no tables.", "-q")
Dtype = option(str, "D", "Of activations: float32, bfloat16 or auto.")

# Whatever reads an artifact.
Check = option(
    str,
    "full|fast|none",
    "Compare an artifact with its digests: full reads the weights too. [default: full up to 2 GiB, "
    "then fast]",
)

# compress and finetune: a run that can be gone on with, and its report.
ReportJson = json_of("The report")
Resume = flag("--resume", "Continue an unfinished run.")
Overwrite = flag("--overwrite", "Replace the artifact at OUT, or an unfinished run to it.")

# compare and analyze: many runs on one text.
Calib = option(str, "TEXT", f"Calibration text: {TEXTS}")
ScoredText = option(str, "FILE", "What every row is scored on.")
FolderOut = option(Path, "DIR", "The folder to write.")
Seqlen = option(int, "N", "Tokens of a window, of both texts.")
Windows = option(int, "N", "How many of --calib are read.")
ValRatio = option(float, "X", "Of them, the fraction for validation.")
TextWindows = option(int | None, "N", "Only the first so many of --text.")
Protocol = option(str, "P", "How documents of --text become windows: documents or gptq.")
ResumeRows = flag("--resume", "Go on with the comparison at DIR; recipes may be added.")
