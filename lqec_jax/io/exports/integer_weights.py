"""What the integer formats share: which of our weights they can hold, and their words as numpy.

Both keep codes as one little-endian stream of bits per output channel, which is how ours lie.
"""

from collections.abc import Iterable

import numpy as np

from lqec_jax.core.tree import is_compressed
from lqec_jax.errors import InputError
from lqec_jax.io.exports.walk import Placed, cast
from lqec_kernels.formats import Affine, Dense


def is_packed(placed: Placed) -> bool:
    """Says whether a parameter is anything but one array of plain numbers."""
    leaf = placed.value
    if not is_compressed(leaf):
        return False
    transformed = leaf.input_transform is not None or leaf.output_transform is not None
    return type(leaf.base) is not Dense or bool(leaf.corrections) or transformed


def read_affine(placed: Placed, format: str, widths: tuple[int, ...]) -> Affine:
    """Returns the integer base of a weight that is nothing else.

    Args:
      format: the format's name, for the error.
      widths: the bits it has.
    Raises:
      InputError: names the weight and the part of it that the format cannot hold.
    """
    leaf = placed.value
    if leaf.corrections:
        raise InputError(
            f"export: {placed.path} has low-rank corrections, which {format} cannot hold; add "
            "--base-only and export --format peft beside it, or export hf"
        )
    for side in ("input_transform", "output_transform"):
        transform = getattr(leaf, side)
        if transform is not None:
            raise _refusal(placed, f"an {side} ({type(transform).__name__})", format)
    base = leaf.base
    if type(base) is not Affine:
        raise _refusal(placed, f"a {type(base).__name__} base", format)
    if base.bits not in widths:
        raise _refusal(placed, f"{base.bits}-bit codes", format)
    if base.zeros is not None and base.zeros.dtype != np.uint32:
        raise _refusal(placed, f"{base.zeros.dtype} zeros, no integers,", format)
    return base


def read_scales(base: Affine) -> np.ndarray:
    """Returns scales [groups, d_out] as stored; one scale of a whole weight is written out."""
    return np.asarray(base.columns()[1])


def cast_scales(scales: np.ndarray, dtype: np.dtype | None, path: str) -> np.ndarray:
    """Rounds scales to `dtype`; None leaves them.

    Raises:
      InputError: one is beyond the dtype's range, or so small that it would be zero there.
    """
    rounded = cast(scales, dtype, path)
    lost = int(np.count_nonzero((rounded == 0) & (scales != 0)))
    if lost:
        raise InputError(
            f"export: {path} has {lost} scales that {rounded.dtype.name} takes for zero; choose "
            "--dtype bfloat16 or float32"
        )
    return rounded


def describe_wide(format: str, bases: Iterable[Affine]) -> list[str]:
    """Returns what a reader should know of scales that float16 does not hold, in one line."""
    wide = sum(not _is_half(read_scales(base)) for base in bases)
    if not wide:
        return []
    return [
        f"{wide} linears have float32 scales that float16 does not hold; a reader that keeps "
        f"{format} scales in float16 rounds or loses them"
    ]


def _is_half(scales: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16).astype(np.float32)
    lost = np.abs(half - scales) > np.finfo(np.float16).eps * np.abs(scales)
    return not lost.any()


def read_zeros(base: Affine) -> np.ndarray:
    """Returns zeros as uint8 [groups, d_out]; 2**(bits-1) where the grid is symmetric."""
    if base.zeros is None:
        return np.full(read_scales(base).shape, 2 ** (base.bits - 1), np.uint8)
    return np.asarray(base.columns()[2])


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 [rows, columns] along rows, LSB first, into as many int32 words as they fill."""
    rows, columns = values.shape
    digits = values.T[..., None] >> np.arange(bits, dtype=np.uint8) & 1  # [columns, rows, bits]
    stream = np.zeros((columns, -(-rows * bits // 32) * 32), np.uint8)
    stream[:, : rows * bits] = digits.reshape(columns, -1)
    return np.packbits(stream, axis=1, bitorder="little").view("<i4").T


def as_words(words: np.ndarray, rows: int, bits: int) -> np.ndarray:
    """Returns packed words as int32, without those that only pad a run of 32 codes."""
    return np.asarray(words)[: -(-rows * bits // 32)].view(np.int32)


def _refusal(placed: Placed, what: str, format: str) -> InputError:
    return InputError(
        f"export: {placed.path} has {what} which {format} cannot hold; export it as hf"
    )
