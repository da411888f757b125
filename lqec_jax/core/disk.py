"""Arrays in files, whose space is reserved before they are mapped.

A page of a mapped file that finds no place on the disk kills the process with SIGBUS, which no
handler turns into a message; so a file gets all of its blocks first, or an error.
"""

import errno
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

# What a file system says that knows no reservation.
_UNKNOWN = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}


def make_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """Makes a file of zeros and maps it.

    Raises:
      OSError: as `map_array`.
    """
    Path(path).write_bytes(b"")
    return map_array(Path(path), dtype, shape)


def map_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """Maps a file for writing, made or made longer if need be; what it held it still holds.

    Raises:
      OSError: ENOSPC, with the bytes that are wanted and those that are free, before anything is
        mapped; whatever else the disk refuses.
    """
    dtype = np.dtype(dtype)
    reserve(path, math.prod(shape) * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


def reserve(path: Path, size: int) -> None:
    """Gives a file so many bytes, with a place on the disk for each of them.

    Where the file system knows no reservation, free space is looked at instead.

    Raises:
      OSError: as `map_array`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        stored = os.fstat(descriptor).st_size
        try:
            _allocate(descriptor, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                os.ftruncate(descriptor, stored)
                raise _full(path, size, error.errno) from error
            if error.errno not in _UNKNOWN:
                raise
            if size - stored > shutil.disk_usage(path.parent).free:
                raise _full(path, size, errno.ENOSPC) from error
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.posix_fallocate(descriptor, 0, size)


def _full(path: Path, size: int, number: int) -> OSError:
    free = shutil.disk_usage(path.parent).free
    reason = f"{os.strerror(number)}: {size} bytes are wanted for this file, {free} are free"
    return OSError(number, reason, str(path))
