"""The commands of `lqec`, and what becomes of their errors."""

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from lqec_jax.cli import analyze
from lqec_jax.cli.compare import compare
from lqec_jax.cli.compress import compress
from lqec_jax.cli.demo import demo
from lqec_jax.cli.doctor import doctor, find_version
from lqec_jax.cli.evaluate import evaluate
from lqec_jax.cli.export import export, verify
from lqec_jax.cli.finetune import finetune
from lqec_jax.cli.generate import generate
from lqec_jax.cli.inspect import inspect
from lqec_jax.cli.methods import methods
from lqec_jax.cli.plan import plan
from lqec_jax.cli.reproduce import reproduce
from lqec_jax.errors import CheckFailed, InputError, shorten

# click's error of usage, of which typer carries a copy.
USAGE_ERROR = typer.BadParameter.__base__
# What a disk or its owner refuses: nothing the program did wrong.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
        errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.ELOOP, errno.EIO}  # fmt: skip
TRACEBACK = "LQEC_TRACEBACK"
DONE, OUR_FAULT, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="lqec",
    help="Large language models at 2-4 bits that still work.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are brackets
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 2 your input, 3 a check failed, 1 our fault, 130 interrupted.",
)
app.command("demo")(demo)
app.command("compress")(compress)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.add_typer(analyze.app, name="analyze")
app.command("finetune")(finetune)
app.command("export")(export)
app.command("verify")(verify)
app.command("reproduce")(reproduce)
app.command("generate")(generate)
app.command("plan")(plan)
app.command("inspect")(inspect)
app.command("methods")(methods)
app.command("doctor")(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lqec-jax {find_version('lqec-jax') or 'not installed, run from its sources'}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; prints one line for an error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=_complete_json(arguments), prog_name="lqec", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # a panic of the tokenizers' Rust side is no Exception
        return _explain(error)
    if code == INTERRUPTED:
        _print_line("interrupted")
    return code or DONE


def _complete_json(arguments: list[str]) -> list[str]:
    """Reads `--json` without a file as `--json -`: where it is last, or another option follows."""
    following = [*arguments, "--"][1:]
    return [
        "--json=-" if word == "--json" and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def _explain(error: BaseException) -> int:
    """Prints what went wrong as one line and returns the exit code."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    if isinstance(error, InputError | CheckFailed):
        _print_line(f"error: {error}")
        return error.exit_code
    if isinstance(error, USAGE_ERROR):
        _print_line(f"error: {error.format_message().rstrip('.')}{_see_help(error)}")
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno in DISK:
        _print_line(f"error: {error.filename or 'the disk'}: {error.strerror}; mend that and run "
                    "again, a compression with --resume")  # fmt: skip
        return BAD_INPUT
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    _print_line(f"error: this is our fault, not yours: {what[:500]}; {TRACEBACK}=1 shows where")
    return OUR_FAULT


def _see_help(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"; see {context.command_path} --help" if context else ""


def _print_line(text: str) -> None:
    """Prints to stderr as one line, whatever a file name or another's message holds."""
    words = " ".join(text.split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    print(shorten(shown), file=sys.stderr)
