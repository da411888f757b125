"""Safetensors: a file read one tensor at a time, and a folder's weights written in shards.

The file is `u64 n | n bytes of JSON | data`; the JSON gives each tensor's dtype, shape and byte
range (format of huggingface/safetensors). Our own reader, because a user must be told which file is
cut short and by how much, and because mapped pages count as resident memory of the process.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path

import ml_dtypes
import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.files import write_json, write_tensors

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
_CHUNK = 8 << 20  # bytes
_MAX_HEADER = 100_000_000  # bytes; the limit of the format itself


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `offset` counts bytes from the start of `file`."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Reads which tensors one safetensors file holds, and where; reads no data.

    Raises:
      InputError: not a safetensors file, a Git LFS pointer, a damaged header, or ranges that do not
        tile the file exactly (a file cut short is named with its size and the size it should have).
    """
    try:
        size, start, raw = _read_raw_header(path)
    except OSError as err:
        raise InputError(f"{path} cannot be read: {err.strerror}; restore it") from err
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {n: _parse_entry(path, n, entry, start) for n, entry in header.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as err:
        if isinstance(err, InputError):
            raise
        raise InputError(
            f"{path}: its safetensors header is damaged ({err}); download it again"
        ) from err
    _check_ranges(path, size, start, entries)
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """Returns what a header says beside its tensors, of a file that `read_header` takes.

    Raises:
      InputError: as `read_header`.
    """
    read_header(path)
    return json.loads(_read_raw_header(path)[2]).get("__metadata__", {})


def read_entry(entry: TensorEntry) -> np.ndarray:
    """Reads one tensor as stored, and no other byte of the file.

    Raises:
      InputError: the file went away or became shorter since its header was read.
    """
    try:
        array = np.fromfile(entry.file, entry.dtype, entry.size, offset=entry.offset)
    except OSError as err:
        raise InputError(f"{entry.file} cannot be read: {err.strerror}; restore it") from err
    if array.size != entry.size:
        raise InputError(
            f"{entry.file}: holds {array.size} of the {entry.size} values its header promised at "
            f"byte {entry.offset}; the file changed while it was read, restore it"
        )
    return array.reshape(entry.shape)


def read_part(entry: TensorEntry, axis: int, start: int, stop: int) -> np.ndarray:
    """Reads start to stop - 1 of a tensor along one axis, and no other byte of the file.

    Raises:
      InputError: as `read_entry`.
    """
    outer, inner = entry.shape[:axis], entry.shape[axis + 1 :]
    stride = math.prod(inner) * entry.dtype.itemsize
    first, shape = entry.offset + start * stride, (stop - start, *inner)
    offsets = range(first, first + entry.bytes, max(1, entry.shape[axis] * stride))
    parts = [read_entry(replace(entry, shape=shape, offset=offset)) for offset in offsets]
    return parts[0] if not outer else np.stack(parts).reshape(*outer, *shape)


def read_chunks(path: Path, offset: int, length: int) -> Iterator[bytes]:
    """Yields `length` bytes from `offset` on, 8 MiB at a time."""
    with path.open("rb") as file:
        file.seek(offset)
        for begin in range(0, length, _CHUNK):
            yield file.read(min(_CHUNK, length - begin))


def same_bytes(a: TensorEntry, b: TensorEntry) -> bool:
    """Says whether two tensors are stored alike: dtype, shape and every byte."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    pairs = zip(
        read_chunks(a.file, a.offset, a.bytes), read_chunks(b.file, b.offset, b.bytes), strict=True
    )
    return all(x == y for x, y in pairs)


def shard_arrays(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Cuts arrays, in order of name, into the shards that an artifact has."""
    return _fill_shards(sorted(arrays.items()))


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], *, made_by: str = "pt"
) -> None:
    """Writes tensors as they come: one file, or shards of at most `SHARD_BYTES` with an index."""
    shards: list[list[str]] = []
    total = 0
    for shard in _fill_shards(tensors):
        write_tensors(folder / _part(len(shards)), shard, made_by=made_by)
        shards.append(sorted(shard))
        total += sum(array.nbytes for array in shard.values())
    if len(shards) == 1:
        os.rename(folder / _part(0), folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / _part(number), folder / name)
        weight_map |= dict.fromkeys(names, name)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_raw_header(path: Path) -> tuple[int, int, bytes]:
    """Returns the file's size, where its data starts, and the JSON between."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if prefix == b"version ":
            raise InputError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
        if not 2 <= length <= _MAX_HEADER:
            raise InputError(f"{path}, {size} bytes: not a safetensors file; download it again")
        if size < 8 + length:
            raise _wrong_size(path, size, f"at least {8 + length}")
        return size, 8 + length, file.read(length)


def _parse_entry(path: Path, name: str, entry: dict, start: int) -> TensorEntry:
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{path}: {name!r} has dtype {entry['dtype']!r}, which is not read; known: "
            f"{', '.join(DTYPES)}"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(index(n) for n in entry["shape"])
    begin, end = (index(n) for n in entry["data_offsets"])
    if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} {list(shape)} {dtype} does not fill its {end - begin} bytes")
    return TensorEntry(path, dtype, shape, start + begin)


def _check_ranges(path: Path, size: int, start: int, entries: dict[str, TensorEntry]) -> None:
    end = start
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.bytes)):
        if entry.offset != end:
            raise InputError(
                f"{path}: its header leaves a hole or an overlap at byte {end}; download it again"
            )
        end += entry.bytes
    if size != end:
        raise _wrong_size(path, size, str(end))


def _wrong_size(path: Path, size: int, wanted: str) -> InputError:
    return InputError(
        f"{path} is {size} bytes, its header asks for {wanted}; the file is damaged or was not "
        "copied in full, download it again"
    )


def _fill_shards(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Cuts a sequence of arrays into shards of at most `SHARD_BYTES`, or of one array."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _part(number: int) -> str:
    return f"part-{number}"
