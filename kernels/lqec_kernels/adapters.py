"""Low-rank corrections whose factors are stored in a few bits."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.formats import Affine, LowRank


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedLowRank:
    """A correction of rank r with rounded factors: x ↦ (x â) b̂.

    Each component is a column of â and a row of b̂, cut into groups that share one scale:

        â[i, k] = s[g, k] · u[i, k],   u in {-M, .., M},  M = 2^(bits-1) - 1,  g = i // group_size

    and b̂ᵀ alike, with groups along d_out. The scale is the group's largest magnitude over M (group
    AbsMax; arXiv:2410.09615 §3.3), as stored.

    Invariants: both bases are symmetric, their zeros None; their group sizes may differ.

    Attributes:
      a: Affine [..., d_in, r].
      b: Affine [..., d_out, r], the transpose of the factor.
    """

    a: Affine
    b: Affine

    @classmethod
    def round(
        cls, a: jax.Array, b: jax.Array, *, bits: int, group_size: int | None
    ) -> "QuantizedLowRank":
        """Rounds factors to the nearest levels.

        Args:
          a, b: floating [..., d_in, r] and [..., r, d_out]. Balance them first: components whose
            halves are of equal size lose equally.
          bits: 2-8.
          group_size: weights that share a scale; where it does not divide a side, that side's
            largest divisor below it. None is the whole side.
        """
        return cls(round_columns(a, bits, group_size), round_columns(b.mT, bits, group_size))

    @property
    def d_in(self) -> int:
        return self.a.d_in

    @property
    def d_out(self) -> int:
        return self.b.d_in

    @property
    def rank(self) -> int:
        return self.a.d_out

    def axes(self, axis: int) -> dict[str, int]:
        return {"a": -2} if axis == -2 else {"b": -2}

    def factors(self) -> LowRank:
        """Returns what the codes stand for, float32."""
        return LowRank(self.a.dense(), self.b.dense().mT)

    def apply(self, x: jax.Array) -> jax.Array:
        return self.factors().apply(x)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.factors().dense(dtype)

    def stored_bits(self) -> int:
        return self.a.stored_bits() + self.b.stored_bits()


def round_columns(w: jax.Array, bits: int, group_size: int | None) -> Affine:
    """Rounds every column in groups to 2M + 1 levels up to the group's largest magnitude.

    A scale too small or too large for float16 becomes its smallest or its largest number, and what
    lies beyond it is clipped.

    Args:
      w: floating [..., d_in, d_out].
      bits: 2-8.
      group_size: as for `QuantizedLowRank.round`.
    """
    *lead, d_in, d_out = w.shape
    size = divide(d_in, group_size)
    groups = w.astype(jnp.float32).reshape(*lead, d_in // size, size, d_out)  # [..., g, size, n]
    most = 2 ** (bits - 1) - 1
    least, largest = float(jnp.finfo(jnp.float16).smallest_subnormal), jnp.finfo(jnp.float16).max
    absmax = jnp.max(jnp.abs(groups), axis=-2, keepdims=True)
    scales = jnp.clip(absmax / most, least, largest).astype(jnp.float16)
    codes = jnp.clip(jnp.round(groups / scales.astype(jnp.float32)), -most, most) + 2 ** (bits - 1)
    codes = codes.astype(jnp.uint8).reshape(*lead, d_in, d_out)  # [..., d_in, d_out]
    return Affine.from_codes(codes, scales[..., 0, :], None, bits=bits, group_size=size)


def divide(size: int, group_size: int | None) -> int:
    """Returns the largest divisor of a size that is not above `group_size`."""
    if group_size is None:
        return size
    return next(n for n in range(min(group_size, size), 0, -1) if size % n == 0)
