"""Linear maps of a weight's inputs or outputs: x ↦ x M."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lqec_kernels import hadamard
from lqec_kernels.fields import static, stored_bits
from lqec_kernels.packing import pack, unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChannelScale:
    """A transform that multiplies channel i by scale[i]: x ↦ x diag(scale).

    Attributes:
      scale: floating [..., size].
    """

    scale: jax.Array

    def apply(self, x: jax.Array) -> jax.Array:
        return x * _per_stack(self.scale.astype(x.dtype))

    def apply_transpose(self, x: jax.Array) -> jax.Array:
        return self.apply(x)

    def stored_bits(self) -> int:
        return stored_bits(self.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hadamard:
    """A randomized rotation: x ↦ x S (I ⊗ H), S = diag(±1), H an orthonormal Hadamard matrix.

    With `inverse` x ↦ x (I ⊗ Hᵀ) S, the inverse of the same signs' rotation. Around a weight, the
    base is Mᵀ w behind an input transform M, so the signs meet w first there; before an output
    transform it is w Mᵀ, for which the inverse does the same.

    Invariants: block divides size and is an order that `hadamard.factor` knows; M Mᵀ = I.

    Attributes:
      signs: uint32 [..., ceil(size / 32)], bit i % 32 of word i // 32 is set where S_ii = +1.
      size: width of x.
      block: order of H; `size` mixes all channels, less mixes blocks of so many.
    """

    signs: jax.Array
    size: int = static()
    block: int = static()
    inverse: bool = static(default=False)

    @classmethod
    def draw(cls, key: jax.Array, size: int, block: int, *, inverse: bool = False) -> "Hadamard":
        """Draws signs."""
        bits = jax.random.bernoulli(key, shape=(size, 1)).astype(jnp.uint8)
        return cls(pack(bits, 1)[:, 0], size, block, inverse)

    def apply(self, x: jax.Array) -> jax.Array:
        return self._rotate(x, self.inverse)

    def apply_transpose(self, x: jax.Array) -> jax.Array:
        return self._rotate(x, not self.inverse)

    def stored_bits(self) -> int:
        return stored_bits(self.signs)

    def _rotate(self, x: jax.Array, inverse: bool) -> jax.Array:
        bits = unpack(self.signs[..., None], 1, self.size)[..., 0]
        signs = _per_stack(2 * bits.astype(x.dtype) - 1)  # [..., size]
        if inverse:
            return hadamard.multiply(x, self.block, transpose=True) * signs
        return hadamard.multiply(x * signs, self.block)


def _per_stack(vector: jax.Array) -> jax.Array:
    """Lets a stack's vectors [..., size] meet matrices [..., rows, size]; one meets any x."""
    return vector if vector.ndim == 1 else vector[..., None, :]
