"""The layout that kernels read: codes in bit planes whose unpacking moves no number past another.

A column is cut into *units* of 2^k inputs. In a plane of codes of p bits, word r of a unit holds at
bits p·s the code of input r + s·rows, with rows = unit·p/32 words in a unit and s = 0 .. 32/p - 1:

    unit of 256, p = 2         word 0      word 1    ...   word 15
    bits  0, 1                 input 0     input 1         input 15
    bits  2, 3                 input 16    input 17        input 31
    ...
    bits 30, 31                input 240   input 241       input 255

So one shift and one mask give 16 inputs in a row of every column, all sizes are powers of two, and
nothing is interleaved. 3 bits are a plane of 2 and a plane of 1, since no power of two holds them.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_kernels.fields import static, stored_bits
from lqec_kernels.formats import place_on_grid
from lqec_kernels.packing import RUN

# Bits of a code -> widths of its planes, the lowest bits first.
WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
LARGEST_UNIT = 256  # inputs; the least at which a plane of one bit has the 8 rows of a TPU's tile


def choose_unit(d_in: int) -> int:
    """Returns the inputs in a unit: 256, or the power of two >= 32 that a small d_in fills."""
    return min(LARGEST_UNIT, max(RUN, 1 << (d_in - 1).bit_length()))


def split_codes(codes: jax.Array, bits: int, unit: int) -> tuple[jax.Array, ...]:
    """Packs codes into planes.

    Args:
      codes: unsigned integers below 2**bits, [..., d_in, n].
      bits: a width of `WIDTHS`.
      unit: inputs in a unit, a power of two >= 32.
    Returns:
      For each plane of p bits, uint32 [..., units·unit·p/32, n]; past d_in the codes are 0.
    """
    *lead, d_in, n = codes.shape
    units = -(-d_in // unit)
    codes = jnp.pad(codes, [(0, 0)] * len(lead) + [(0, units * unit - d_in), (0, 0)])
    planes, below = [], 0
    for width in WIDTHS[bits]:
        part = (codes.astype(jnp.uint32) >> below) & (2**width - 1)
        part = part.reshape(*lead, units, RUN // width, -1, n)  # [..., units, 32/p, rows, n]
        words = jnp.sum(part << _shifts(width), axis=-3, dtype=jnp.uint32)
        planes.append(words.reshape(*lead, -1, n))  # [..., units·rows, n]
        below += width
    return tuple(planes)


def join_planes(planes: tuple[jax.Array, ...], bits: int, unit: int, d_in: int) -> jax.Array:
    """Reads codes back: the inverse of `split_codes`, uint8 [..., d_in, n]."""
    codes, below = jnp.uint32(0), 0
    for width, words in zip(WIDTHS[bits], planes, strict=True):
        *lead, _, n = words.shape
        words = words.reshape(*lead, -1, 1, unit * width // RUN, n)  # [..., units, 1, rows, n]
        part = (words >> _shifts(width)) & (2**width - 1)
        codes = codes | part.reshape(*lead, -1, n) << below  # [..., units·unit, n]
        below += width
    return codes[..., :d_in, :].astype(jnp.uint8)


def _shifts(width: int) -> np.ndarray:
    """Returns where the codes of a word begin, uint32 [32/p, 1, 1]."""
    return np.arange(0, RUN, width, dtype=np.uint32)[:, None, None]


@dataclass(frozen=True)
class PlanesLayout:
    """How the columns of Planes become a dense weight."""

    bits: int
    group_size: int
    d_in: int
    unit_size: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        *planes, scales, offsets = columns
        codes = join_planes(tuple(planes), self.bits, self.unit_size, self.d_in)
        return place_on_grid(codes, scales, offsets, self).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Planes:
    """Affine's grid in the order in which kernels read it; made by `repack`, not stored on disk.

    w[i, o] = (code[i, o] - offsets[i // group_size, o]) · scales[i // group_size, o],
    code = planes[0] + planes[1] · 2^(bits of planes[0])

    Invariants: group_size divides d_in; unit is a power of two >= 32; codes past d_in are 0.

    Attributes:
      planes: for each width p of `WIDTHS[bits]` uint32 [..., units·unit·p/32, d_out], see above.
      scales: floating [..., d_in/group_size, d_out], in units of the weight.
      offsets: None, the grid is symmetric about code 2**(bits-1); or of scales' shape, floating or
        uint8. In units of codes.
    """

    planes: tuple[jax.Array, ...]
    scales: jax.Array
    offsets: jax.Array | None
    bits: int = static()
    group_size: int = static()
    d_in: int = static()
    unit_size: int = static()

    @classmethod
    def from_codes(cls, codes, scales, offsets, *, bits: int, group_size: int) -> "Planes":
        """Packs unsigned codes [..., d_in, d_out]."""
        d_in = codes.shape[-2]
        size = choose_unit(d_in)
        return cls(split_codes(codes, bits, size), scales, offsets, bits, group_size, d_in, size)

    @property
    def d_out(self) -> int:
        return self.planes[0].shape[-1]

    @property
    def layout(self) -> PlanesLayout:
        return PlanesLayout(self.bits, self.group_size, self.d_in, self.unit_size)

    def columns(self) -> tuple:
        return (*self.planes, self.scales, self.offsets)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return stored_bits(*self.planes, self.scales, self.offsets)

    def unit(self, axis: int) -> int:
        if axis == -1:
            return 1
        # A group of all inputs keeps none of them together.
        whole = self.scales.shape[-2] == 1
        return self.unit_size if whole else math.lcm(self.unit_size, self.group_size)
