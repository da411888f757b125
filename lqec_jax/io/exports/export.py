"""Exports: a model written as a folder that other tools read, whole or absent.

A format is one module and one line of `table`; this file gives it an empty folder, and records
beside what it wrote which model it was and the hash of every file.
"""

import os
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from lqec_jax.core.tree import drop_corrections, drop_input_grids, has_input_grids
from lqec_jax.errors import InputError
from lqec_jax.io.carried import find_carried
from lqec_jax.io.exports.options import read_options
from lqec_jax.io.exports.record import EXACT_INPUTS, RECORD, make_record
from lqec_jax.io.exports.table import FORMATS
from lqec_jax.io.files import staged_folder, write_json
from lqec_jax.models.model import Model


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, its bytes, and what its reader should know."""

    folder: Path
    format: str
    stored_bytes: int
    notes: tuple[str, ...]


def export_model(model: Model, out: str | Path, format: str, **given: Any) -> Exported:
    """Writes a model in another tool's format.

    Args:
      format: a key of `table.FORMATS`.
      given: the options of `options.ExportOptions`, dtype by its name or 'auto', and the format's
        own.
    Raises:
      InputError: an unknown format, an option that the format does not have, something that the
        format cannot say (the weight is named), `out` is there already.
    """
    options, row = read_options(format, given), FORMATS[format]
    out = Path(out)
    if options.base_only:
        model = replace(model, params=drop_corrections(model.params))
    if os.path.lexists(out):
        raise InputError(f"{out} exists; an export replaces nothing, choose another name")
    find_carried(model.tokenizer, model.folder)  # refuses a link, before minutes of writing
    # A weight that is unpacked has no place to say how its inputs are rounded.
    said = "inputs" in row.holds and not options.own.get("dense")
    exact = has_input_grids(model.params) and not said
    if exact:
        model = replace(model, params=drop_input_grids(model.params))
    with staged_folder(out) as folder:
        write = import_module(row.writer).write
        notes = tuple(write(model, folder, options.dtype, **options.own))
        notes += (EXACT_INPUTS,) * exact
        files = sorted(path for path in folder.iterdir())
        write_json(folder / RECORD, make_record(model, format, options, notes, files))
        size = sum(path.stat().st_size for path in files)
    return Exported(out, format, size, notes)
