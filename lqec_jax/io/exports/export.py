"""Exports: a model written as a folder that other tools read, whole or absent.

A format is one module with `write(model, folder, options) -> notes`; this file gives it an empty
folder, and records beside what it wrote which model it was and the hash of every file.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.io.artifact.artifact import is_artifact
from lqec_jax.io.base import drop_corrections, drop_input_grids, has_input_grids, hash_base
from lqec_jax.io.files import read_json, staged_folder, write_json
from lqec_jax.io.tensor_file import read_chunks
from lqec_jax.models.model import Model

FORMATS = {
    "hf": "lqec_jax.io.exports.dense",
    "peft": "lqec_jax.io.exports.peft",
    "gptq": "lqec_jax.io.exports.gptq",
    "compressed-tensors": "lqec_jax.io.exports.compressed_tensors",
    "flax": "lqec_jax.io.exports.flax",
}
# What only some formats know.
OWN_OPTIONS = {"peft": {"base"}, "gptq": {"gptq_version"}, "flax": {"dense"}}
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
EXACT_INPUTS = (
    "inputs of linears are quantized in the model and exact in this export, which cannot say that; "
    "its reader's own input quantization may take their place"
)
RECORD = "lqec_export.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class ExportOptions:
    """How to write.

    Attributes:
      dtype: of every floating tensor; None keeps each as stored, and writes float32 where a packed
        weight becomes a dense one, so that nothing is rounded.
      base_only: low-rank corrections are left out.
      gptq_version: 1 stores zeros less one, 2 as they are; None is 1.
      base: for `peft`, the exported folder that the adapter belongs to.
      dense: for `flax`, packed weights are unpacked.
    """

    dtype: np.dtype | None = None
    base_only: bool = False
    gptq_version: int | None = None
    base: Path | None = None
    dense: bool = False


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
      format: a key of `FORMATS`.
      given: fields of `ExportOptions`, dtype by its name or 'auto'.
    Raises:
      InputError: an unknown format, an option that the format does not have, something that the
        format cannot say (the weight is named), `out` is there already.
    """
    options = read_options(format, given)
    out = Path(out)
    if options.base_only:
        model = replace(model, params=drop_corrections(model.params))
    if os.path.lexists(out):
        raise InputError(f"{out} exists; an export replaces nothing, choose another name")
    exact = has_input_grids(model.params) and (format != "flax" or options.dense)
    if exact:
        model = replace(model, params=drop_input_grids(model.params))
    with staged_folder(out) as folder:
        notes = tuple(import_module(FORMATS[format]).write(model, folder, options))
        notes += (EXACT_INPUTS,) * exact
        files = sorted(path for path in folder.iterdir())
        write_json(folder / RECORD, _describe(model, format, options, notes, files))
        size = sum(path.stat().st_size for path in files)
    return Exported(out, format, size, notes)


def read_options(format: str, given: Mapping[str, Any]) -> ExportOptions:
    """Reads options, and refuses an unknown format and an option that it does not have."""
    if format not in FORMATS:
        raise InputError(
            f"export: format {format!r} is unknown{did_you_mean(str(format), FORMATS)}"
        )
    known = [field.name for field in fields(ExportOptions)]
    for name in given:
        if name not in known:
            raise InputError(f"export: option {name!r} is unknown{did_you_mean(name, known)}")
    options = ExportOptions(**{**given, "dtype": _resolve_dtype(given.get("dtype", "auto"))})
    for owner, names in OWN_OPTIONS.items():
        for name in names if owner != format else ():
            if getattr(options, name) not in (None, False):
                raise InputError(
                    f"export: {name} is for format {owner}, not {format}; leave it out"
                )
    if format == "peft" and options.base_only:
        raise InputError("export: base_only leaves out the adapters, which are all that peft holds")
    if options.gptq_version not in (None, 1, 2):
        raise InputError(f"export: gptq_version={options.gptq_version!r}; 1 or 2 was wanted")
    return replace(options, base=None if options.base is None else Path(options.base))


def hash_file(path: Path) -> str:
    """Returns a file's sha256, hex."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path, 0, path.stat().st_size):
        digest.update(chunk)
    return digest.hexdigest()


def read_record(folder: Path) -> dict[str, Any]:
    """Reads what an export says of itself.

    Raises:
      InputError: the folder is no export of ours, or one of another version.
    """
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} has no {RECORD}; wanted a folder that `lqec export` wrote")
    record = read_json(folder / RECORD)
    if record.get("format_version") != RECORD_VERSION or record.get("format") not in FORMATS:
        raise InputError(
            f"{folder / RECORD}: format {record.get('format')!r} of version "
            f"{record.get('format_version')!r} is not read; export again"
        )
    for name, kind in (("files", dict), ("base_sha256", str), ("dtype", str)):
        if not isinstance(record.get(name), kind):
            raise InputError(f"{folder / RECORD}: {name} is missing or damaged; export again")
    return record


def _describe(
    model: Model, format: str, options: ExportOptions, notes: tuple[str, ...], files: list[Path]
) -> dict[str, Any]:
    """Returns the record that lies beside an export."""
    # A model in memory may still name the folder it was made from; that is another model.
    own = model.folder is not None and is_artifact(model.folder) == bool(model.recipe)
    return {
        "format_version": RECORD_VERSION,
        "format": format,
        "model": str(model.folder.absolute()) if own else None,
        "recipe": model.recipe,
        "fingerprint": model.fingerprint,
        "base_sha256": hash_base(model.params),
        "dtype": "auto" if options.dtype is None else options.dtype.name,
        "base_only": options.base_only,
        "exact_inputs": EXACT_INPUTS in notes,
        "base": None if options.base is None else str(options.base.absolute()),
        "notes": list(notes),
        "files": {path.name: hash_file(path) for path in files},
    }


def _resolve_dtype(dtype: str) -> np.dtype | None:
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise InputError(f"export: dtype={dtype!r}; one of auto, {', '.join(DTYPES)} was wanted")
    return DTYPES[dtype]


def find_files(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns what is wrong with an export's files: missing, or not as they were written."""
    faults = []
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif hash_file(folder / name) != digest:
            faults.append(f"{name} is not the file that was exported (sha256 differs)")
    return faults
