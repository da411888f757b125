"""The table of formats: every line has its writer with the options it names, and its reader."""

import ast
import inspect
from importlib import import_module

import pytest

from lqec_jax.io.exports.table import FORMATS
from tests.sources import ROOT, imported, parse

ROOMS = ("lqec_jax.io.exports", "lqec_jax.io.artifact")


@pytest.mark.parametrize("name", FORMATS)
def test_a_writer_takes_the_options_of_its_line_and_no_other(name):
    parameters = inspect.signature(import_module(FORMATS[name].writer).write).parameters.values()
    assert [p.name for p in parameters][:3] == ["model", "folder", "dtype"]
    own = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert tuple(p.name for p in own) == FORMATS[name].own == tuple(p.name for p in parameters)[3:]
    assert all(p.default is not inspect.Parameter.empty for p in own)


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_shares_nothing_with_what_wrote(name):
    row = FORMATS[name]
    assert list(inspect.signature(import_module(row.reader).read).parameters) == [
        "folder",
        "record",
    ]
    for module in (row.module, "bits", "operators"):
        names = imported(parse(ROOT / f"lqec_jax/io/verify/{module}.py"))
        assert not [name for name in names if name.startswith(ROOMS)], module


def test_a_line_is_one_line():
    lines = (ROOT / "lqec_jax/io/exports/table.py").read_text().splitlines()
    for name in FORMATS:
        assert sum(line.startswith(f'    "{name}": Format(') for line in lines) == 1
    assert all(row.holds <= {"base", "adapters", "inputs"} for row in FORMATS.values())


def test_no_format_is_named_where_all_are_meant():
    """A new format is a module and a line: what reads the table asks it, not for a name."""
    for path in ("exports/export", "exports/options", "exports/record", "verify/verify"):
        constants = {
            node.value
            for node in ast.walk(parse(ROOT / f"lqec_jax/io/{path}.py"))
            if isinstance(node, ast.Constant)
        }
        assert not constants & set(FORMATS), path
