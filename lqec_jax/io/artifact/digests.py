"""Digests of an artifact: what it was when it was written, so that a changed bit has a name.

`lqec.json` keeps, as `digests`, sha256 of each tensor (with its name, dtype and shape), of
config.json, of every file of the tokenizer, of the index, and of its own other fields. What each
run measures anew, report.json and the pages made of it, decides nothing and is left out: the same
run gives the same `lqec.json`. Digests tell damage and careless edits, not an author: who can write
the folder can write its digests.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.core.hashing import hash_arrays, hash_parts
from lqec_jax.errors import InputError, shorten
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.sources.index import count, few
from lqec_jax.io.sources.scan import WEIGHT_DTYPES, check_finite
from lqec_jax.io.sources.tokenizer import FILES, GENERATION
from lqec_jax.io.tensor_file import INDEX

META, DIGESTS = "lqec.json", "digests"
CONFIG = "config.json"
CHECKS = ("auto", "full", "fast", "none")
# Weights of so many bytes and less are hashed when they are loaded: at the 0.4 GB/s of one core
# without instructions for it, in five seconds.
FULL_BYTES = 2 * 2**30
_log = logging.getLogger(__name__)


class Hashing:
    """Named arrays, each hashed as it is handed on to be written; `digests` has them then."""

    def __init__(self, arrays: Iterable[tuple[str, np.ndarray]]):
        self._arrays, self.digests = arrays, {}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in self._arrays:
            self.digests[name] = hash_arrays([(name, array)])
            yield name, array


def make_digests(
    folder: Path, meta: Mapping[str, Any], tensors: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the digests of an artifact whose other files are written.

    Args:
      meta: the fields of lqec.json, without these.
      tensors: of each tensor, see `Hashing`.
    """
    files = (CONFIG, INDEX, *FILES)
    return {
        "record": _hash_record(meta),
        "files": {n: _hash_small(folder / n) for n in files if (folder / n).is_file()},
        "tensors": dict(tensors),
    }


def check_name(check: str) -> None:
    """Refuses a word that names no check."""
    if check not in CHECKS:
        raise InputError(f"check={check!r}; one of {', '.join(CHECKS)} was wanted")


def choose_check(check: str, checkpoint: Checkpoint) -> str:
    """Returns what is compared with the digests: 'full', 'fast' or 'none'.

    'full' is everything, 'fast' all but the numbers in the weights, 'none' nothing; 'auto' is full
    for weights of `FULL_BYTES` and less, and fast for larger ones.

    Raises:
      InputError: another word.
    """
    check_name(check)
    if check != "auto":
        return check
    size = sum(entry.bytes for entry in checkpoint.entries.values())
    return "full" if size <= FULL_BYTES else "fast"


def read_digests(folder: Path, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the digests on record; None, and says so, for an artifact that is older than they.

    Raises:
      InputError: they are damaged.
    """
    if DIGESTS not in meta and "made" not in meta:  # who writes the one writes the other
        _log.warning("%s", shorten(f"{folder / META} has no digests, as artifacts before this "
                                   "version: whether its bytes are those that were written cannot "
                                   "be told"))  # fmt: skip
        return None
    found = meta.get(DIGESTS)
    kinds = {"record": str, "files": dict, "tensors": dict}
    if not isinstance(found, dict) or not all(
        isinstance(found.get(n), k) for n, k in kinds.items()
    ):
        raise InputError(f"{folder / META}: digests are damaged; restore the file")
    return found


def find_changes(
    folder: Path, meta: Mapping[str, Any], digests: Mapping[str, Any], tensors: Iterable[str]
) -> list[str]:
    """Returns what is not as it was written, in words; weights by their names alone.

    Args:
      tensors: the names of the tensors that are there.
    """
    record = {name: value for name, value in meta.items() if name != DIGESTS}
    faults = [] if _hash_record(record) == digests["record"] else [f"{META} was edited"]
    faults += _find_changed_files(folder, digests["files"])
    here, known = set(tensors), set(digests["tensors"])
    for names, what in ((known - here, "missing"), (here - known, "more than were written")):
        if names:
            faults.append(f"{count(sorted(names))} {what}: {few(sorted(names))}")
    return faults


def read_tensors(
    checkpoint: Checkpoint, digests: Mapping[str, str] | None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads all tensors, each once, and hashes one while the next is read.

    Args:
      digests: by name; None hashes nothing.
    Returns:
      The arrays, and what is not as it was written, in words.
    Raises:
      InputError: as `Checkpoint.read`; numbers that are not finite.
    """
    arrays, hashes = {}, {}
    with ThreadPoolExecutor(1) as pool:
        for name in checkpoint.names():
            array = arrays[name] = read_finite(checkpoint, name)
            if digests is not None:
                hashes[name] = pool.submit(hash_arrays, [(name, array)])
    changed = [name for name in hashes if hashes[name].result() != digests.get(name)]
    return arrays, name_changed(changed)


def read_finite(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Reads one tensor.

    Raises:
      InputError: as `Checkpoint.read`; numbers that are not finite.
    """
    array = checkpoint.read(name)
    if array.dtype.name in WEIGHT_DTYPES:
        check_finite(array, checkpoint.entries[name].file, name)
    return array


def name_changed(names: list[str]) -> list[str]:
    """Says which tensors have another digest: nothing where there are none."""
    verb = "is" if len(names) == 1 else "are"
    return [f"{count(names)} {verb} not as written: {few(names)} (sha256)"] if names else []


def _find_changed_files(folder: Path, known: Mapping[str, str]) -> list[str]:
    faults = []
    for name, digest in known.items():
        if Path(name).name != name or not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif _hash_small(folder / name) != digest:
            faults.append(f"{name} is not as written (sha256)")
    if set(known) & set(FILES) - {GENERATION}:  # else a tokenizer may have been put beside it
        faults += [f"{name} was not there when it was written" for name in FILES
                   if name not in known and (folder / name).is_file()]  # fmt: skip
    return faults


def _hash_record(meta: Mapping[str, Any]) -> str:
    return hash_parts([json.dumps(meta, sort_keys=True)])


def _hash_small(path: Path) -> str:
    return hash_parts([path.read_bytes()])
