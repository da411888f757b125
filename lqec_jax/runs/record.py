"""What a run has on record of its files, so that a resumed one believes no byte unseen.

A file is written once and hashed after it, out of the page cache. A stream is too long for that: it
is hashed piece by piece as its rows are made, on a thread beside the computation, and checked piece
by piece on several.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.core.hashing import hash_parts
from lqec_jax.errors import InputError
from lqec_jax.io.tensor_file import read_chunks

THREADS = min(8, os.cpu_count() or 1)
_BUFFER = 1 << 20  # bytes


def describe_file(path: Path) -> dict[str, Any]:
    """Returns a file's `bytes` and `sha256`."""
    size = path.stat().st_size
    return {"bytes": size, "sha256": hash_parts(read_chunks(path, 0, size))}


class StreamWriter:
    """Fills a stream's rows in order and hashes what it fills in."""

    def __init__(self, stream: np.memmap, *, hashed: bool = True):
        self._stream, self._cut = stream, 0
        self._pool = ThreadPoolExecutor(1) if hashed else None
        self._digests: list[Future[str]] = []

    def put(self, rows: slice, values: Any) -> None:
        """Fills in the next rows; every call but the last brings as many."""
        values = np.ascontiguousarray(np.asarray(values), self._stream.dtype)
        self._stream[rows] = values
        if self._pool is not None:
            self._cut = self._cut or values.nbytes
            self._digests.append(self._pool.submit(_hash, values))

    def finish(self) -> dict[str, Any]:
        """Waits for the disk; returns the stream's `bytes`, those of a piece, a digest for each."""
        self._stream.flush()
        digests = [digest.result() for digest in self._digests]
        if self._pool is not None:
            self._pool.shutdown()
        return {"bytes": self._stream.nbytes, "cut": self._cut, "sha256": digests}


def check_file(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Compares a file with its record.

    Args:
      record: of a file or of a stream; a stream's has a digest for each piece of `cut` bytes.
    Raises:
      InputError: it is missing, shorter or longer, or holds other bytes (a stream: where).
    """
    path = folder / name
    if not path.is_file():
        raise refuse(folder, f"{name} is missing")
    check_size(folder, name, record["bytes"])
    pieces = record["sha256"]
    if isinstance(pieces, str):
        if describe_file(path)["sha256"] != pieces:
            raise refuse(folder, f"{name} is not as the run wrote it (sha256 differs)")
        return
    spans = range(0, record["bytes"], record["cut"])
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda start: _hash_part(path, start, record["cut"]), spans)
        for start, (digest, known) in zip(spans, _pairs(found, pieces), strict=True):
            if digest != known:
                raise refuse(folder, f"{name} is not as the run wrote it, from byte {start} on")


def check_size(folder: Path, name: str, wanted: int) -> None:
    """Refuses a file of another size; a mapped one would be filled up with zeros."""
    size = (folder / name).stat().st_size
    if size != wanted:
        raise refuse(folder, f"{name} has {size} bytes, the run wrote {wanted}")


def refuse(folder: Path, what: str) -> InputError:
    """Returns the refusal of a run that cannot be trusted, with the way out."""
    return InputError(
        f"{folder}: {what}; restore it from a copy, or --overwrite in place of --resume begins "
        "the run again"
    )


def _pairs(found: Iterator[str], known: list[str]) -> Iterator[tuple[str, str]]:
    return zip(found, known, strict=True)


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(values.reshape(-1).view(np.uint8)).hexdigest()


def _hash_part(path: Path, start: int, length: int) -> str:
    digest = hashlib.sha256()
    for part in read_parts(path, start, length):
        digest.update(part)
    return digest.hexdigest()


def read_parts(path: Path, start: int, length: int) -> Iterator[memoryview]:
    """Yields bytes of a file in one buffer, small enough to stay in a core's cache."""
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length > 0 and (count := file.readinto(buffer[: min(length, _BUFFER)])):
            yield buffer[:count]
            length -= count
