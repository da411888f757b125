"""Names by content: sha256 of arrays and texts, the digests that records and fingerprints hold."""

import hashlib
from collections.abc import Iterable

import numpy as np


def hash_parts(parts: Iterable[str | bytes | np.ndarray]) -> str:
    """Hashes texts, as UTF-8, and the bytes of arrays, one after the other; sha256 hex.

    Nothing is put between the parts, so a record that could be cut in two ways needs a header.

    Example:
      >>> hash_parts(["ab", b"c"]) == hash_parts(["abc"])
      True
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else _bytes_of(part))
    return digest.hexdigest()


def hash_arrays(arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """Hashes named arrays in the order given: each one's name, dtype and shape, then its bytes.

    A scalar, as a block's own window in 'attn.window', counts as an array of one.
    """

    def parts() -> Iterable[str | np.ndarray]:
        for name, array in arrays:
            yield f"{name} {array.dtype.name} {array.shape or (1,)}\n"
            yield array

    return hash_parts(parts())


def _bytes_of(part: bytes | np.ndarray) -> bytes | np.ndarray:
    """Returns what can be hashed where it lies; only an array that is not contiguous is copied."""
    if isinstance(part, bytes):
        return part
    return np.ascontiguousarray(part).reshape(-1).view(np.uint8)
