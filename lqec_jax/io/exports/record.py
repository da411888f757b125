"""What lies beside an export: which model it is of, how it was written, each file's hash."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqec_jax.core.hashing import hash_arrays, hash_parts
from lqec_jax.core.tree import drop_corrections
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import is_artifact, name_arrays
from lqec_jax.io.exports.options import DTYPES, ExportOptions
from lqec_jax.io.exports.table import FORMATS
from lqec_jax.io.files import read_json
from lqec_jax.io.tensor_file import read_chunks
from lqec_jax.models.model import Model

RECORD = "lqec_export.json"
RECORD_VERSION = 1
EXACT_INPUTS = (
    "inputs of linears are quantized in the model and exact in this export, which cannot say that; "
    "its reader's own input quantization may take their place"
)


def make_record(
    model: Model, format: str, options: ExportOptions, notes: Sequence[str], files: Sequence[Path]
) -> dict[str, Any]:
    """Returns the record of an export that has these files."""
    # A model in memory may still name the folder it was made from; that is another model.
    own = model.folder is not None and is_artifact(model.folder) == bool(model.recipe)
    base = options.own.get("base")
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
        "base": None if base is None else str(Path(base).absolute()),
        "notes": list(notes),
        "files": {path.name: hash_file(path) for path in files},
    }


def hash_file(path: Path) -> str:
    """Returns a file's sha256, hex."""
    return hash_parts(read_chunks(path, 0, path.stat().st_size))


def read_record(folder: Path) -> dict[str, Any]:
    """Reads what an export says of itself.

    Raises:
      InputError: the folder is no export of ours, or one of another version.
    """
    if not (folder / RECORD).is_file():
        raise InputError(f"{folder} has no {RECORD}; wanted a folder that `lqec export` wrote")
    record = read_json(folder / RECORD)
    version, form = record.get("format_version"), record.get("format")
    if version != RECORD_VERSION or not isinstance(form, str) or form not in FORMATS:
        raise InputError(
            f"{folder / RECORD}: format {form!r} of version {version!r} is not read; export again"
        )
    for name, fits in FIELDS.items():
        if not fits(record.get(name)):
            raise InputError(f"{folder / RECORD}: {name} is missing or damaged; export again")
    return record


def _is_hashes(value: Any) -> bool:
    """Says whether a value maps names of files in one folder to hashes."""
    return isinstance(value, dict) and all(
        isinstance(digest, str) and Path(name).name == name and "\0" not in name
        for name, digest in value.items()
    )


def _is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(value) and "\0" not in value)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)  # None: of an older record


# What a record is read for -> whether its value can be that.
FIELDS = {
    "files": _is_hashes,
    "base_sha256": lambda value: isinstance(value, str),
    "dtype": lambda value: value in ("auto", *DTYPES) if isinstance(value, str) else False,
    "model": _is_name,
    "base": _is_name,
    "base_only": _is_flag,
    "exact_inputs": _is_flag,
}


def find_files(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Returns what is wrong with an export's files: missing, or not as they were written."""
    faults = []
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif hash_file(folder / name) != digest:
            faults.append(f"{name} is not the file that was exported (sha256 differs)")
    return faults


def hash_base(params: Params) -> str:
    """Hashes what adapters are added to: every array but theirs, in order of name, sha256 hex.

    How blocks are stacked in memory does not enter.
    """
    return hash_arrays(sorted(name_arrays(drop_corrections(params))[0].items()))
