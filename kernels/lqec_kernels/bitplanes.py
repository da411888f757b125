"""Weights as sums of scaled planes of signs: binary-coded, ternary and one-bit ones."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.fields import static, stored_bits
from lqec_kernels.packing import RUN, pack, unpack


@dataclass(frozen=True)
class BitPlanesLayout:
    """How BitPlanes' columns become a dense weight."""

    bits: int
    group_size: int
    d_in: int

    def signs(self, planes: jax.Array, plane: int) -> jax.Array:
        """Returns one plane, 1 for +1 and 0 for -1, uint8 [..., d_in, n]."""
        *lead, _, n = planes.shape
        runs = planes.reshape(*lead, -1, self.bits, n)  # [..., runs, bits, n]
        return unpack(runs[..., plane, :], 1, self.d_in)

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        planes, alphas, shifts = columns
        *lead, _, n = planes.shape
        alphas = alphas.astype(jnp.float32)[..., None, :]  # [..., bits or 1, groups, 1, n]
        w = jnp.float32(0.0) if shifts is None else shifts.astype(jnp.float32)[..., None, :]
        for plane in range(self.bits):
            alpha = alphas[..., plane if alphas.shape[-4] > 1 else 0, :, :, :]
            signs = self.signs(planes, plane)
            signs = signs.reshape(*lead, -1, self.group_size, n)  # [..., groups, group_size, n]
            w = w + jnp.where(signs == 1, alpha, -alpha)
        return w.reshape(*lead, self.d_in, n).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BitPlanes:
    """A sum of planes of signs, each scaled per group of inputs, and a shift.

    w[i, o] = shifts[g, o] + Σ_p alphas[p, g, o] B_p[i, o],   B_p ∈ {-1, +1},  g = i // group_size

    Two planes of one alpha are a ternary weight: B_0 + B_1 ∈ {-2, 0, 2}. A uniform grid of b bits
    is b planes whose alphas double from one to the next. One plane with an input ChannelScale is a
    one-bit weight whose magnitudes are of rank 1.

    Invariants: group_size divides d_in; the planes of one run of 32 inputs lie beside each other.

    Attributes:
      planes: uint32 [..., ceil(d_in/32)·bits, d_out], a bit set where B = +1, least significant bit
        first; row r·bits + p is run r of plane p.
      alphas: floating [..., bits, d_in/group_size, d_out], or [..., 1, ...] where all planes have
        one; in units of the weight.
      shifts: None; or floating [..., d_in/group_size, d_out].
      bits: how many planes.
    """

    planes: jax.Array
    alphas: jax.Array
    shifts: jax.Array | None
    bits: int = static()
    group_size: int = static()
    d_in: int = static()

    @classmethod
    def from_signs(cls, signs, alphas, shifts, *, group_size: int) -> "BitPlanes":
        """Packs planes [..., bits, d_in, d_out], true or 1 where B = +1."""
        *lead, bits, d_in, d_out = signs.shape
        words = jnp.moveaxis(pack(signs, 1), -3, -2)  # [..., runs, bits, d_out]
        planes = words.reshape(*lead, -1, d_out)  # [..., runs · bits, d_out]
        return cls(planes, alphas, shifts, bits, group_size, d_in)

    @property
    def d_out(self) -> int:
        return self.planes.shape[-1]

    @property
    def layout(self) -> BitPlanesLayout:
        return BitPlanesLayout(self.bits, self.group_size, self.d_in)

    def columns(self) -> tuple:
        return (self.planes, self.alphas, self.shifts)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return stored_bits(self.planes, self.alphas, self.shifts)

    def unit(self, axis: int) -> int:
        if axis == -1:
            return 1
        # With one group, every part of the inputs has all its alphas.
        return RUN if self.group_size == self.d_in else math.lcm(RUN, self.group_size)
