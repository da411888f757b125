"""Bits of words, the slow and plain way: the readers' own, apart from what packs."""

import numpy as np


def read_codes(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Reads `count` codes of `bits` bits from every column's stream of bits, lowest bit first.

    Code i of a column is Σ_k 2^k · bit(i · bits + k), bit j being bit j % 32 of word j // 32.

    Args:
      words: 32-bit integers, [words, columns]; signed ones are taken as patterns of bits.
    Returns:
      int64 [count, columns].
    """
    columns = words.shape[1]
    octets = np.ascontiguousarray(words.T).astype("<u4").view(np.uint8)  # [columns, 4 words]
    stream = np.unpackbits(octets, axis=1, bitorder="little")[:, : count * bits]
    digits = stream.reshape(columns, count, bits)
    return (digits @ (1 << np.arange(bits))).T  # [count, columns]
