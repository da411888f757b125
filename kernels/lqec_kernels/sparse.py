"""Weights with zeros: a mask over any base, and the 2:4 form that stores no zeros at all.

A base here holds another base, whose columns come first and whose layout lies in its own.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_kernels.fields import static, stored_bits
from lqec_kernels.formats import Affine, Base, Dense, Layout
from lqec_kernels.packing import RUN, pack, unpack

QUAD, KEPT = 4, 2  # of every four weights two are stored
PLACE_BITS = 2


@dataclass(frozen=True)
class MaskedLayout:
    """How Masked's columns become a dense weight."""

    inner: Layout
    d_in: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        *inner, mask = columns
        keep = unpack(mask, 1, self.d_in).astype(bool)
        return jnp.where(keep, self.inner.dense(tuple(inner), dtype), 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Masked:
    """A base of which some weights are zero, exactly and whatever the base says of them.

    w[i, o] = inner[i, o] where bit (i, o) of the mask is set, else 0

    Invariants: bits past row d_in of the mask are 0; with pattern 'n:m' exactly n of every m
    consecutive inputs of a column are kept, counted from input 0.

    Attributes:
      inner: any base.
      mask: uint32 [..., ceil(d_in / 32), d_out], one bit a weight, see `packing`.
      pattern: 'n:m', or '' where only the mask tells.
    """

    inner: Base
    mask: jax.Array
    pattern: str = static(default="")

    @classmethod
    def from_mask(cls, inner: Base, keep: jax.Array, pattern: str = "") -> "Masked":
        """Packs a mask, bool [..., d_in, d_out], True where a weight stays."""
        return cls(inner, pack(keep.astype(jnp.uint8), 1), pattern)

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    @property
    def d_out(self) -> int:
        return self.inner.d_out

    @property
    def layout(self) -> MaskedLayout:
        return MaskedLayout(self.inner.layout, self.d_in)

    def columns(self) -> tuple:
        return (*self.inner.columns(), self.mask)

    def kept(self) -> jax.Array:
        """Returns which weights may be other than zero, bool [..., d_in, d_out]."""
        return unpack(self.mask, 1, self.d_in).astype(bool)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return self.inner.stored_bits() + stored_bits(self.mask)

    def unit(self, axis: int) -> int:
        unit = self.inner.unit(axis)
        return unit if axis == -1 else math.lcm(RUN, unit, _period(self.pattern))


@dataclass(frozen=True)
class Sparse24Layout:
    """How Sparse24's columns become a dense weight."""

    inner: Layout
    d_in: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        *inner, words = columns
        values = self.inner.dense(tuple(inner), dtype)
        return place_values(values, unpack(words, PLACE_BITS, values.shape[-2]))


def place_values(values: jax.Array, places: jax.Array) -> jax.Array:
    """Puts what is kept into its fours, [..., d_in / 2, n] -> [..., d_in, n]; the rest is 0."""
    *lead, rows, n = values.shape
    places = places.reshape(*lead, -1, KEPT, n)
    values = values.reshape(*lead, -1, KEPT, n)  # [..., quads, 2, n]
    of_place = [jnp.sum(jnp.where(places == place, values, 0), axis=-2) for place in range(QUAD)]
    return jnp.stack(of_place, axis=-2).reshape(*lead, rows // KEPT * QUAD, n)  # [..., d_in, n]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sparse24:
    """Two of every four consecutive inputs of a column, the other two being zero.

    w[4q + places[2q + k, o], o] = inner[2q + k, o],  k = 0, 1;  all others are 0

    Invariants: d_in is a multiple of 4; places[2q] < places[2q + 1] in every column.

    Attributes:
      inner: any base of d_in / 2 rows, the kept weights in their order. Groups of an Affine one are
        half as long as in the whole weight.
      positions: uint32 [..., ceil(d_in/2 / 32)·2, d_out], a kept weight's place in its four, 2 bits
        each, see `packing`.
    """

    inner: Base
    positions: jax.Array

    @classmethod
    def from_mask(cls, base: Dense | Affine, keep: jax.Array) -> "Sparse24":
        """Takes what is kept out of a base.

        Args:
          base: Dense, or Affine with a group_size of whole fours.
          keep: bool [..., d_in, d_out], True for exactly two of every four.
        """
        places = _find_places(keep)
        positions = pack(places.reshape(*keep.shape[:-2], -1, keep.shape[-1]), PLACE_BITS)
        if isinstance(base, Dense):
            return cls(Dense(_take(base.w, places)), positions)
        codes = _take(unpack(base.codes, base.bits, base.d_in), places)
        size = base.group_size * KEPT // QUAD
        inner = Affine(pack(codes, base.bits), base.scales, base.zeros, base.bits, size,
                       codes.shape[-2])  # fmt: skip
        return cls(inner, positions)

    @property
    def d_in(self) -> int:
        return self.inner.d_in // KEPT * QUAD

    @property
    def d_out(self) -> int:
        return self.inner.d_out

    @property
    def layout(self) -> Sparse24Layout:
        return Sparse24Layout(self.inner.layout, self.d_in)

    def columns(self) -> tuple:
        return (*self.inner.columns(), self.positions)

    def kept(self) -> jax.Array:
        """Returns which weights may be other than zero, bool [..., d_in, d_out]."""
        places = unpack(self.positions, PLACE_BITS, self.inner.d_in)
        *lead, _, n = places.shape
        places = places.reshape(*lead, -1, KEPT, 1, n)
        here = places == jnp.arange(QUAD, dtype=jnp.uint8)[:, None]  # [..., quads, 2, 4, n]
        return here.any(axis=-3).reshape(*lead, self.d_in, n)  # [..., d_in, n]

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return self.inner.stored_bits() + stored_bits(self.positions)

    def unit(self, axis: int) -> int:
        unit = self.inner.unit(axis)
        return unit if axis == -1 else math.lcm(RUN, unit) // KEPT * QUAD


def _period(pattern: str) -> int:
    return int(pattern.partition(":")[2]) if pattern else 1


def _find_places(keep: jax.Array) -> jax.Array:
    """Returns the places of the first and the last kept of every four, [..., quads, 2, n] uint8."""
    quads = keep.reshape(*keep.shape[:-2], -1, QUAD, keep.shape[-1])  # [..., quads, 4, n]
    first = jnp.argmax(quads, axis=-2)
    last = QUAD - 1 - jnp.argmax(quads[..., ::-1, :], axis=-2)
    return jnp.stack([first, last], axis=-2).astype(jnp.uint8)


def _take(rows: jax.Array, places: jax.Array) -> jax.Array:
    """Returns the kept rows of an array, [..., d_in, n] -> [..., d_in / 2, n]."""
    *lead, d_in, n = rows.shape
    quads = rows.reshape(*lead, -1, QUAD, n)  # [..., quads, 4, n]
    taken = jnp.take_along_axis(quads, places.astype(np.int32), axis=-2)
    return taken.reshape(*lead, d_in * KEPT // QUAD, n)
