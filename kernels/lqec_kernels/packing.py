"""Codes of 1 to 16 bits in uint32 words, LSB first, in runs of 32 codes.

Rows 32r .. 32r+31 of a column form run r; its codes are one stream of 32·bits bits, least
significant bit first, held in `bits` words. That is GPTQ's qweight as it stands, and
compressed-tensors' after a transpose. Rows are padded with zero codes to a whole run; the true
number of rows is the caller's.
"""

import jax
import jax.numpy as jnp
import numpy as np

RUN = 32


def words_for(rows: int, bits: int) -> int:
    """Returns how many words hold `rows` codes: bits for every started run of 32."""
    return -(-rows // RUN) * bits


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes along the second-to-last axis.

    Args:
      codes: unsigned integers below 2**bits, [..., rows, columns].
      bits: width of a code, 1 to 16.
    Returns:
      uint32 [..., ceil(rows / 32) * bits, columns].
    Example:
      >>> unpack(pack(jnp.array([[3], [1]], jnp.uint8), 2), 2, rows=2)[:, 0]
      Array([3, 1], dtype=uint8)
    """
    *lead, rows, columns = codes.shape
    runs = -(-rows // RUN)
    padding = [(0, 0)] * len(lead) + [(0, runs * RUN - rows), (0, 0)]
    runs_of_codes = jnp.pad(codes.astype(jnp.uint32), padding).reshape(*lead, runs, RUN, columns)
    words = [_gather_word(runs_of_codes, bits, word) for word in range(bits)]
    return jnp.stack(words, axis=-2).reshape(*lead, runs * bits, columns)


def _gather_word(runs_of_codes: jax.Array, bits: int, word: int) -> jax.Array:
    """Returns one word of every run: the sum of the codes that reach into it, each in its place."""
    first, last = RUN * word // bits, -(-RUN * (word + 1) // bits)
    offset = (np.arange(first, last) * bits - RUN * word)[:, None]
    left, right = np.maximum(offset, 0).astype(np.uint32), np.maximum(-offset, 0).astype(np.uint32)
    placed = runs_of_codes[..., first:last, :] << left >> right
    return jnp.sum(placed, axis=-2, dtype=jnp.uint32)


def unpack(words: jax.Array, bits: int, rows: int) -> jax.Array:
    """Reads codes back: the inverse of `pack`.

    Args:
      words: uint32 [..., ceil(rows / 32) * bits, columns].
      bits: width of a code, 1 to 16.
      rows: how many codes a column holds; the rest is padding.
    Returns:
      uint8 [..., rows, columns]; uint16 for more than 8 bits.
    """
    *lead, count, columns = words.shape
    mask = jnp.uint32(2**bits - 1)
    if RUN % bits == 0:
        offset = jnp.arange(0, RUN, bits, dtype=jnp.uint32)
        codes = (words[..., None, :] >> offset[:, None]) & mask  # [..., words, 32/bits, columns]
        codes = codes.reshape(*lead, -1, columns)
    else:
        word, offset = _positions(bits)
        runs = words.reshape(*lead, count // bits, bits, columns)
        low = runs[..., word, :] >> offset[:, None]
        following = runs[..., np.minimum(word + 1, bits - 1), :]
        high = (following << (31 - offset[:, None])) << 1
        spills = (offset + bits > RUN)[:, None]
        codes = jnp.where(spills, low | high, low) & mask  # [..., runs, 32, columns]
        codes = codes.reshape(*lead, -1, columns)
    return codes[..., :rows, :].astype(jnp.uint8 if bits <= 8 else jnp.uint16)


def _positions(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the word and the bit offset at which each code of a run begins."""
    first_bit = np.arange(RUN) * bits
    return first_bit // RUN, (first_bit % RUN).astype(np.uint32)
