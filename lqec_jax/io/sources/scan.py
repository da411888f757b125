"""One pass over a checkpoint's bytes: they are hashed, and what is no finite number is found."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lqec_jax.core.hashing import hash_parts
from lqec_jax.errors import InputError
from lqec_jax.io.tensor_file import TensorEntry, read_chunks

WEIGHT_DTYPES = {"float64", "float32", "float16", "bfloat16"}
_SCAN = 1 << 22  # elements looked at in one go for NaN and Inf


def scan_checkpoint(config: Path, entries: Mapping[str, TensorEntry]) -> str:
    """Hashes config.json and the weight files, whole and in order of name; sha256 hex.

    NaN and Inf anywhere are refused, so that hours of work do not end at the last block.

    Args:
      entries: the tensors that are looked at; what else lies in their files is hashed alone.
    Raises:
      InputError: names the first tensor, in order of name, that holds some; a file became shorter
        since its header was read.
    Cost: reads every byte once, 8 MiB at a time.
    """
    bad: dict[str, int] = {}

    def parts() -> Iterator[bytes]:
        yield config.read_bytes()
        for path in sorted({entry.file for entry in entries.values()}):
            inside = {name: entry for name, entry in entries.items() if entry.file == path}
            yield from _scan_file(path, inside, bad)

    digest = hash_parts(parts())
    for name in sorted(bad):
        _refuse_non_finite(entries[name].file, name, bad[name], entries[name].size)
    return digest


def check_finite(array: np.ndarray, file: Path, name: str) -> None:
    """Refuses NaN and Inf in one tensor."""
    _refuse_non_finite(file, name, count_non_finite(array), array.size)


def count_non_finite(array: np.ndarray) -> int:
    flat = array.reshape(-1)
    starts = range(0, flat.size, _SCAN)
    return sum(int(np.count_nonzero(~np.isfinite(flat[i : i + _SCAN]))) for i in starts)


def _scan_file(path: Path, entries: Mapping[str, TensorEntry], bad: dict) -> Iterator[bytes]:
    """Yields a file's bytes in order, and counts in `bad` what is not finite in its tensors."""
    size, end = path.stat().st_size, 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        yield from read_chunks(path, end, entry.offset - end)  # the header, and what has no name
        is_weight = entry.dtype.name in WEIGHT_DTYPES  # integers are always finite
        for chunk in _read_whole(entry):
            yield chunk
            found = count_non_finite(np.frombuffer(chunk, entry.dtype)) if is_weight else 0
            if found:
                bad[name] = bad.get(name, 0) + found
        end = entry.offset + entry.bytes
    yield from read_chunks(path, end, size - end)


def _read_whole(entry: TensorEntry) -> Iterator[bytes]:
    came = 0
    for chunk in read_chunks(entry.file, entry.offset, entry.bytes):
        came += len(chunk)
        if len(chunk) % entry.dtype.itemsize:
            break
        yield chunk
    if came != entry.bytes:
        raise InputError(
            f"{entry.file}: holds {came} of the {entry.bytes} bytes its header promised at byte "
            f"{entry.offset}; the file changed while it was read, restore it"
        )


def _refuse_non_finite(file: Path, name: str, bad: int, size: int) -> None:
    if bad:
        raise InputError(
            f"{file}: {name!r} holds {bad} non-finite of {size} values (NaN or Inf), wanted "
            "numbers; the checkpoint is damaged, download or train it again"
        )
