"""Sparse24 over a uniform grid in the order in which kernels read it."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.fields import static, stored_bits
from lqec_kernels.formats import place_on_grid
from lqec_kernels.planes import WIDTHS, choose_unit, join_planes, split_codes
from lqec_kernels.sparse import KEPT, PLACE_BITS, QUAD, place_values


@dataclass(frozen=True)
class SparsePlanesLayout:
    """How the columns of SparsePlanes become a dense weight."""

    bits: int
    group_size: int
    d_in: int
    unit_size: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        *words, scales, offsets = columns
        count = len(WIDTHS[self.bits])
        codes = self._join(words[: 2 * count], self.bits)
        places = self._join(words[2 * count :], PLACE_BITS)
        return place_values(place_on_grid(codes, scales, offsets, self), places).astype(dtype)

    def _join(self, words: list[jax.Array], bits: int) -> jax.Array:
        """Unites the planes of firsts and of seconds, [..., d_in / 2, n] in the order of inputs."""
        half, fours = len(words) // 2, self.d_in // QUAD
        parts = (words[:half], words[half:])
        codes = [join_planes(tuple(part), bits, self.unit_size, fours) for part in parts]
        *lead, _, n = codes[0].shape
        return jnp.stack(codes, axis=-2).reshape(*lead, fours * KEPT, n)  # [..., d_in / 2, n]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparsePlanes:
    """Sparse24 over Affine, its codes and places in planes; made by `repack`, not stored on disk.

    Of every four inputs the two kept weights lie in planes of their own, the firsts and the
    seconds, at one place: a kernel then has input k of all fours as one matrix, for k = 0 .. 3, and
    moves no number past another.

    Attributes:
      first, second: planes of the kept weights' codes, see `planes`, over d_in / 4 fours.
      first_places, second_places: planes of where in its four each lies, 2 bits.
      scales, offsets: as in Planes, group_size counting kept weights.
    """

    first: tuple[jax.Array, ...]
    second: tuple[jax.Array, ...]
    first_places: tuple[jax.Array, ...]
    second_places: tuple[jax.Array, ...]
    scales: jax.Array
    offsets: jax.Array | None
    bits: int = static()
    group_size: int = static()
    d_in: int = static()
    unit_size: int = static()

    @classmethod
    def from_codes(cls, codes, places, scales, offsets, *, bits: int, group_size: int):
        """Packs what is kept, codes and places [..., d_in / 2, d_out]."""
        fours = codes.shape[-2] // KEPT
        size = choose_unit(fours)

        def split(codes: jax.Array, bits: int) -> list[tuple]:
            return [split_codes(codes[..., k::KEPT, :], bits, size) for k in range(KEPT)]

        planes = (*split(codes, bits), *split(places, PLACE_BITS))
        return cls(*planes, scales, offsets, bits, group_size, fours * QUAD, size)

    @property
    def d_out(self) -> int:
        return self.first[0].shape[-1]

    @property
    def layout(self) -> SparsePlanesLayout:
        return SparsePlanesLayout(self.bits, self.group_size, self.d_in, self.unit_size)

    def columns(self) -> tuple:
        words = (*self.first, *self.second, *self.first_places, *self.second_places)
        return (*words, self.scales, self.offsets)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return stored_bits(*self.columns())

    def unit(self, axis: int) -> int:
        if axis == -1:
            return 1
        fours = self.unit_size
        if self.scales.shape[-2] > 1:
            fours = math.lcm(fours, self.group_size // KEPT)
        return fours * QUAD
