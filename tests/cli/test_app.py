"""The entry point: exit codes, one line an error, and no jax before a command needs it."""

import os
import resource
import subprocess
import sys

import pytest
import typer

from lqec_jax.cli import app as app_module
from lqec_jax.cli import main
from lqec_jax.errors import CheckFailed, InputError, MissingExtra

COMMANDS = (
    "demo",
    "compress",
    "eval",
    "compare",
    "export",
    "verify",
    "generate",
    "inspect",
    "methods",
    "doctor",
)


def run_raising(error, monkeypatch, capsys):
    """Runs main on a command that raises; returns the exit code and what went to stderr."""

    def fail(**_):
        raise error

    monkeypatch.setattr(app_module, "app", fail)
    code = main(["any"])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("bits=9; 1 to 8"), 2, "error: bits=9; 1 to 8"),
        (MissingExtra("pyarrow", "parquet", "reading x"), 2, "error: reading x needs the package"),
        (CheckFailed("logits differ"), 3, "error: logits differ"),
        (typer.BadParameter("not a number"), 2, "error: Invalid value: not a number"),
        (OSError(28, "No space left on device", "a/b"), 2, "error: a/b: No space left on device"),
        (PermissionError(13, "Permission denied", "c"), 2, "error: c: Permission denied"),
        (OSError(5, "Input/output error", "d"), 2, "error: d: Input/output error; mend that and"),
        (OSError(9, "Bad file descriptor"), 1, "error: this is our fault, not yours: OSError"),
        (ZeroDivisionError(), 1, "error: this is our fault, not yours: ZeroDivisionError; LQEC_TR"),
        (AssertionError("shape"), 1, "error: this is our fault, not yours: AssertionError: shape;"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_has_its_code_and_its_line(error, code, line, monkeypatch, capsys):
    came, err = run_raising(error, monkeypatch, capsys)
    assert came == code
    assert err.startswith(line)
    assert err.count("\n") == 1 and err.endswith("\n")


def test_a_panic_that_is_no_exception_is_caught_too(monkeypatch, capsys):
    class PanicException(BaseException):
        pass

    code, err = run_raising(PanicException("index out of bounds"), monkeypatch, capsys)
    assert code == 1 and "PanicException: index out of bounds" in err


def test_what_a_message_holds_cannot_break_the_line_or_the_terminal(monkeypatch, capsys):
    error = InputError("no file a\nb\r\n\x1b[31mc\x07.txt")
    assert run_raising(error, monkeypatch, capsys)[1] == "error: no file a b \\x1b[31mc\\x07.txt\n"


def test_the_traceback_is_there_for_who_asks(monkeypatch, capsys):
    monkeypatch.setenv("LQEC_TRACEBACK", "1")
    _, err = run_raising(InputError("bits=9"), monkeypatch, capsys)
    assert err.startswith("Traceback") and err.endswith("error: bits=9\n")


def test_help_and_no_command_show_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert all(f"  {name} " in out for name in COMMANDS)
        assert "130 interrupted" in " ".join(out.split())
        assert err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"Usage: lqec {command}" in capsys.readouterr().out


def test_compress_help_names_what_the_interface_promises(capsys):
    main(["compress", "--help"])
    out = capsys.readouterr().out
    options = (
        "recipe calib seqlen windows val-ratio seed dtype mesh eval config set resume overwrite "
        "dry-run json quiet"
    )
    for option in options.split():
        assert f"--{option} " in out
    for default in ("[default: 512]", "[default: 320]", "[default: 0.2]", "[default: 0]"):
        assert default in " ".join(out.split())


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lqec-jax ")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ([], []),
        (["eval", "m", "--json"], ["eval", "m", "--json=-"]),
        (["eval", "--json", "--text", "t"], ["eval", "--json=-", "--text", "t"]),
        (["eval", "--json", "r.json"], ["eval", "--json", "r.json"]),
        (["eval", "--json", "-"], ["eval", "--json", "-"]),
        (["eval", "--json=r.json"], ["eval", "--json=r.json"]),
    ],
)
def test_json_without_a_file_is_standard_output(given, read):
    assert app_module._complete_json(given) == read


def test_help_and_methods_load_no_jax_and_take_less_than_a_second():
    code = (
        "import sys; from lqec_jax.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'numpy'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments in (["--help"], ["methods"], ["compress", "--help"], ["compres"]):
        before = processor_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
            env=environment,
        )  # fmt: skip
        # Of the processor, not of a clock that other work on the machine moves.
        assert processor_seconds() - before < 1.0
        assert done.returncode == (2 if arguments == ["compres"] else 0), done.stderr


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
