"""Low-rank factors in closed form."""

import jax
import jax.numpy as jnp


def truncate(error: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of the best rank-r approximation in the Frobenius norm.

    error ≈ a b,  a = U_r √S_r,  b = √S_r V_rᵀ  (Eckart & Young 1936), so that both factors have the
    same singular values and lose equally when they are stored in 16 bits.

    Args:
      error: float32 [d_in, d_out].
      rank: how many components to keep.
    Returns:
      (a [d_in, rank], b [rank, d_out]), float32.
    Cost: one thin SVD, O(d_in · d_out · min(d_in, d_out)).
    """
    u, s, vt = jnp.linalg.svd(error.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank])
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def balance(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rescales each component so that its two halves have the same norm; a b is unchanged.

    Training leaves a large and b small; stored in 16 bits, b would lose its smallest entries.
    A component with a zero half is left alone.

    Args:
      a, b: float32 [..., d_in, r] and [..., r, d_out].
    """
    a_norm = jnp.linalg.norm(a, axis=-2)  # [..., r]
    b_norm = jnp.linalg.norm(b, axis=-1)
    alive = (a_norm > 0) & (b_norm > 0)
    ratio = jnp.sqrt(jnp.where(alive, b_norm, 1.0) / jnp.where(alive, a_norm, 1.0))
    return a * ratio[..., None, :], b / ratio[..., :, None]
