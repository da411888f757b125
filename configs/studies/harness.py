"""One harness for every study: its command line, its rows one after the other, and its page.

A study says what identifies a row, how one is measured, and what its page shows. Everything else is
here:

    python configs/studies/NAME/study.py --help
    python configs/studies/NAME/study.py ...         measures the rows that are not there yet
    python configs/studies/NAME/study.py --table     writes results.md from results.json

A row is kept as soon as it is measured, with the device, machine, versions and date, so that a
killed study goes on where it was stopped. `--again` measures rows that are there already;
`--out FILE.json` keeps them somewhere else, the page beside them.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, str | Callable[[Row], str]]


def find_rows(results: dict, arguments: argparse.Namespace) -> list[Row]:
    """Returns the rows of a file's results, to be appended to."""
    return results.setdefault("rows", [])


@dataclass(frozen=True)
class Study:
    """A table of measurements.

    Args:
      about: the study's docstring.
      file: its `__file__`; results lie beside it.
      rows: arguments -> what identifies each row, in the order in which they are measured.
      measure: what identifies a row, arguments, the file's results -> its figures, or all rows at
        once. Facts about the whole file go into its results.
      page: results, arguments -> lines of results.md; results by `split` where that is given.
      options: flags of this study alone -> keywords of `add_argument`.
      needs: arguments without which nothing can be measured.
      split: an argument; what is measured for each value of it is in a file of its own.
      place: results, arguments -> the list that rows are appended to.
      packages: whose versions a row carries beside jax's.
    """

    about: str
    file: str
    rows: Callable[[argparse.Namespace], Iterable[Row]]
    measure: Callable[[Row, argparse.Namespace, dict], Row | list[Row]]
    page: Callable[[dict, argparse.Namespace], list[str]]
    options: dict[str, dict] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    split: str | None = None
    place: Callable[[dict, argparse.Namespace], list[Row]] = find_rows
    packages: tuple[str, ...] = ()

    def run(self, argv: list[str] | None = None) -> None:
        """Does what the command line asks for."""
        arguments = self.read_arguments(argv)
        if not arguments.table:
            self.measure_rows(arguments)
        self.write_page(arguments)

    def read_arguments(self, argv: list[str] | None = None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=self.about.splitlines()[0])
        parser.add_argument("--shared", type=Path, help="a folder with models/ and data/")
        parser.add_argument("--work", type=Path, help="where artifacts go")
        beside = Path(self.file).with_name("results.json")
        parser.add_argument("--out", type=Path, default=beside, help="FILE.json of rows")
        parser.add_argument("--table", action="store_true", help="only write the page")
        parser.add_argument("--again", action="store_true", help="measure rows that are there too")
        for flag, keywords in self.options.items():
            parser.add_argument(flag, **keywords)
        arguments = parser.parse_args(argv)
        missing = [f"--{name}" for name in self.needs if not vars(arguments)[name]]
        if missing and not arguments.table:
            parser.error(f"give --table, or {' and '.join(missing)}")
        return arguments

    def measure_rows(self, arguments: argparse.Namespace) -> None:
        """Measures rows that are missing, and keeps each as soon as it is there."""
        path = arguments.out
        if self.split:
            path = path.with_stem(f"{path.stem}-{vars(arguments)[self.split]}")
        results = read_results(path)
        rows = self.place(results, arguments)
        for key in self.rows(arguments):
            key = json.loads(json.dumps(key))  # a tuple is a list in a file
            known = [row for row in rows if row | key == row]
            if known and not arguments.again:
                continue
            found = self.measure(key, arguments, results)
            made = describe_environment(self.packages)
            found = [key | row | {"environment": made} for row in as_list(found)]
            rows[:] = [row for row in rows if row not in known] + found
            write_results(path, results)
            print(json.dumps(found), flush=True)

    def write_page(self, arguments: argparse.Namespace) -> None:
        """Writes results.md from the rows that are there."""
        text = "\n".join(self.page(self.read(arguments.out), arguments)).rstrip() + "\n"
        arguments.out.with_suffix(".md").write_text(text)

    def read(self, path: Path) -> dict:
        """Returns the results, by the values of `split` where that is given."""
        if not self.split:
            return read_results(path)
        files = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
        return {file.stem.removeprefix(f"{path.stem}-"): read_results(file) for file in files}


def as_list(found: Row | list[Row]) -> list[Row]:
    return found if isinstance(found, list) else [found]


def read_results(path: Path) -> dict:
    """Returns a file's results; a list is its rows."""
    results = json.loads(path.read_text()) if path.exists() else {}
    return {"rows": results} if isinstance(results, list) else results


def write_results(path: Path, results: dict) -> None:
    """Replaces a file in one step, so that a kill leaves the old results or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def describe_environment(packages: Iterable[str] = ()) -> dict:
    """Returns where and when a row was made; the device where this process has asked for one."""
    made = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "python": platform.python_version(),
        "jax": version("jax"),
        "versions": {name: version(name) for name in packages},
        "date": date.today().isoformat(),
    }
    jax = sys.modules.get("jax")
    return made | ({"device": jax.devices()[0].device_kind} if jax else {})


def open_row(row: Row) -> Row:
    """Returns a row with its environment among its figures, as rows of older files have it."""
    return row.get("environment", {}) | row


def quote(about: str, *numbers: int) -> list[str]:
    """Returns paragraphs of a docstring as lines of a page: lists as they stand, others on one."""
    chosen = [about.split("\n\n")[number].strip("\n") for number in numbers]
    lines = [text if text.startswith("- ") else " ".join(text.split()) for text in chosen]
    return [line for text in lines for line in (text, "")]


def table(columns: Iterable[Column], rows: Iterable[Row]) -> list[str]:
    """Returns a markdown table.

    Args:
      columns: heading, and what stands below it: a format of the row's figures, left empty where
        one is absent or None, or a function of the row.
    """
    names, cells = zip(*columns, strict=True)
    lines = [[write_cell(cell, open_row(row)) for cell in cells] for row in rows]
    head = "|".join(f" {name} " if name else " " for name in names)
    return [f"|{head}|", "|" + "---|" * len(names), *(f"| {' | '.join(line)} |" for line in lines)]


def write_cell(cell: str | Callable[[Row], str], row: Row) -> str:
    text = cell(row) if callable(cell) else fill(cell, row)
    return text.replace("|", "\\|")


def fill(text: str, row: Row) -> str:
    try:
        return text.format_map(row)
    except (KeyError, TypeError):  # not measured
        return ""


def read_reference(shared: Path | None) -> list[Row]:
    """Returns what the authors' own codes reach on the same tokens."""
    if shared is None:
        sys.exit("--shared: the page quotes the rows of SHARED/data/reference_results.json")
    return json.loads((shared / "data" / "reference_results.json").read_text())["rows"]
