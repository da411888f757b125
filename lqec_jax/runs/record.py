"""What a run has on record of its files, so that a resumed one believes no byte unseen.

A file is written once and hashed after it, out of the page cache. A stream is too long for that: it
is summed piece by piece as its rows are made, on a thread beside the computation, and checked piece
by piece on several.

A piece's sum is no cryptographic one, which would take several times as long as reading it: of
every MiB, as words x_i of 64 bits, Σ x_i and Σ (2i + 1) x_i modulo 2^64, and the sha256 of all of
these. A change of a single word always shows; random damage, but for one chance in 2^64 at most.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
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
        self._sums: list[Future[str]] = []

    def put(self, rows: slice, values: Any) -> None:
        """Fills in the next rows; every call but the last brings as many."""
        values = np.ascontiguousarray(np.asarray(values), self._stream.dtype)
        self._stream[rows] = values
        if self._pool is not None:
            self._cut = self._cut or values.nbytes
            self._sums.append(self._pool.submit(sum_piece, [_bytes_of(values)]))

    def finish(self) -> dict[str, Any]:
        """Waits for the disk; returns the stream's `bytes`, those of a piece, a sum for each."""
        self._stream.flush()
        sums = [found.result() for found in self._sums]
        if self._pool is not None:
            self._pool.shutdown()
        return {"bytes": self._stream.nbytes, "cut": self._cut, "sums": sums}


def check_file(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Compares a file with its record.

    Args:
      record: of a file or of a stream; a stream's has a sum for each piece of `cut` bytes.
    Raises:
      InputError: it is missing, shorter or longer, or holds other bytes (a stream: where).
    """
    path = folder / name
    if not path.is_file():
        raise refuse(folder, f"{name} is missing")
    check_size(folder, name, record["bytes"])
    if "sums" not in record:
        if describe_file(path)["sha256"] != record["sha256"]:
            raise refuse(folder, f"{name} is not as the run wrote it (sha256 differs)")
        return
    spans = range(0, record["bytes"], record["cut"])
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda at: sum_piece(read_parts(path, at, record["cut"])), spans)
        for start, came, known in zip(spans, found, record["sums"], strict=True):
            if came != known:
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


def sum_piece(parts: Iterable[memoryview]) -> str:
    """Returns what is on record of a piece, 64 hex digits, given its bytes."""
    digest = hashlib.sha256()
    for part in parts:
        for start in range(0, len(part), _BUFFER):
            digest.update(_sum_words(part[start : start + _BUFFER]))
    return digest.hexdigest()


def _sum_words(part: memoryview) -> bytes:
    """Returns the length and both sums of at most a MiB, whose last word zeros fill up."""
    whole = len(part) // 8 * 8
    words = np.frombuffer(part[:whole], np.uint64)
    tail = int.from_bytes(part[whole:], "little")
    weights = _find_weights()[: len(words)]
    sums = (int(np.add.reduce(words)), int(np.dot(words, weights)), tail, len(part))
    return b"".join(value.to_bytes(8, "little") for value in sums)


@lru_cache(maxsize=1)
def _find_weights() -> np.ndarray:
    return 2 * np.arange(_BUFFER // 8, dtype=np.uint64) + np.uint64(1)


def _bytes_of(values: np.ndarray) -> memoryview:
    return memoryview(values.reshape(-1).view(np.uint8))


def read_parts(path: Path, start: int, length: int) -> Iterator[memoryview]:
    """Yields bytes of a file in one buffer, small enough to stay in a core's cache."""
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb") as file:
        file.seek(start)
        while length > 0 and (count := file.readinto(buffer[: min(length, _BUFFER)])):
            yield buffer[:count]
            length -= count
