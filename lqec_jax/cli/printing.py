"""What commands print: tables for people, JSON for programs."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lqec_jax.errors import InputError

STDOUT = "-"
LOG_WIDTH = 160  # columns of a table that goes into a file or a pipe


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], right: int = 0) -> None:
    """Prints a table; the last `right` columns are aligned to the right."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, name in enumerate(columns):
        justify = "right" if number >= len(columns) - right else "left"
        table.add_column(Text(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    make_console().print(table)


def print_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """Prints what a run measured after each of its stages."""
    rows = [
        (
            stage["name"],
            format_number(stage["ppl"]),
            f"{format_number(stage['low'])} - {format_number(stage['high'])}",
            stage["protocol"],
            f"{stage['seconds']:.1f}",
        )
        for stage in stages
    ]
    print_table(("stage", "perplexity", "95% interval", "protocol", "seconds"), rows, right=1)


def print_linears(linears: Sequence[Mapping[str, Any]]) -> None:
    """Prints the linears of a block: how many, what they are made of, what they take."""
    rows = [
        (
            linear["path"],
            f"{linear['count']} x [{linear['d_in']}, {linear['d_out']}]",
            linear["format"],
            f"{linear['bits_per_weight']:.4f}",
            linear["stored_bytes"],
        )
        for linear in linears
    ]
    print_table(("linear", "shape", "format", "bits per weight", "stored bytes"), rows, right=2)


def print_line(text: str = "") -> None:
    """Prints one line as it is, however long."""
    make_console().print(Text(text), soft_wrap=True)


def make_console() -> Console:
    """Returns standard output; wide where it is no terminal, so that nothing is cut."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)


def check_json(where: str | None) -> None:
    """Refuses, before any work, a file that cannot be written.

    Raises:
      InputError: its folder is missing, is not writable, or it is a folder itself.
    """
    if where in (None, STDOUT):
        return
    path = Path(where)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            f"--json {where} cannot be written; name a file in a folder that you may write to"
        )


def write_json(where: str, value: Any) -> None:
    """Writes JSON to a file, or to standard output for '-'."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    if where == STDOUT:
        sys.stdout.write(text)
    else:
        Path(where).write_text(text)


def format_size(count: int) -> str:
    """Writes a size in the unit that fits it: '1.50 MB'."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def format_bytes(count: int) -> str:
    """Writes a size with its exact number of bytes: '1.50 MB (1500000 bytes)'."""
    size = format_size(count)
    return size if size.endswith(" bytes") else f"{size} ({count} bytes)"


def format_number(value: float | None, digits: int = 4) -> str:
    """Writes a number of a report, in which None is what was not finite."""
    return "not finite" if value is None else f"{value:.{digits}f}"
