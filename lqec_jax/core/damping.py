"""A Cholesky factor of any gram whatever: damped as little as makes it positive definite.

A gram of too few tokens is singular, one summed carelessly is not even positive. Before it is
factored a gram is made symmetric, dead channels are cut out of it, it is divided by the mean of its
diagonal (so that nothing overflows and damping has no units) and the damping is added:

    H = ½(G + Gᵀ) / m + p I,   m = mean of diag(G) over live channels.

Where that has no factor, p climbs a ladder by factors of ten up to one; the last rung forgets the
gram, H = I, for which every method that uses the factor does what it does without statistics. JAX's
Cholesky says NaN instead of raising, so a rung is tried, looked at, and left.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

# The damping of the last rung but one; more would only be a slower way to forget the gram.
LARGEST = 1.0
TENFOLD = 10.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Damping:
    """What a gram needed before it had a factor; scalars.

    Attributes:
      rung: place on the ladder, 0 for the damping that was asked for.
      damp: p, in units of the mean diagonal; infinite where the gram was forgotten.
      dead: how many channels have no energy; their rows and columns are the identity's.
      mean: m, what the factored matrix is in units of.
    """

    rung: jax.Array
    damp: jax.Array
    dead: jax.Array
    mean: jax.Array


def ladder(damp: float) -> tuple[float, ...]:
    """Returns the dampings that are tried in turn before the gram is forgotten."""
    rungs = [damp]
    while rungs[-1] * TENFOLD <= LARGEST * (1 + 1e-9):
        rungs.append(rungs[-1] * TENFOLD)
    return tuple(rungs)


def factor_lower(gram: jax.Array, damp: float) -> tuple[jax.Array, Damping]:
    """Factors the damped gram: H = L Lᵀ, L lower triangular.

    Args:
      gram: floating [n, n], finite or not; float32 or wider is what it is factored in.
      damp: p of the first rung, positive.
    Returns:
      (L [n, n], always finite, and what it took).
    Cost: n³/3 a rung; holds the gram and two more of its size.  jit: yes.
    """
    return _climb(gram, damp, flip=False)


def factor_reverse(gram: jax.Array, damp: float) -> tuple[jax.Array, Damping]:
    """Factors the damped gram the other way round: H = Lᵀ L, L lower triangular.

    As `factor_lower` with the channels in reverse order, and the factor reversed back.
    """
    lower, damping = _climb(gram, damp, flip=True)
    return lower.T[::-1, ::-1], damping


def describe(damping: Damping) -> tuple[str, ...]:
    """Returns what a report should say of a gram; nothing where the first rung held it."""
    lines = []
    if math.isinf(damping.damp):
        lines.append(f"gram: forgotten at rung {int(damping.rung)}, no damping made it positive")
    elif damping.rung > 0:
        lines.append(f"gram: damped by {float(damping.damp):g}, rung {int(damping.rung)}")
    if damping.dead > 0:
        lines.append(f"gram: {int(damping.dead)} of the channels are dead")
    return tuple(lines)


def _climb(gram: jax.Array, damp: float, flip: bool) -> tuple[jax.Array, Damping]:
    gram = gram.astype(jnp.promote_types(gram.dtype, jnp.float32))
    rungs = jnp.asarray([*ladder(damp), jnp.inf], gram.dtype)
    diagonal = jnp.diagonal(gram)
    live = (diagonal > 0) & (diagonal < jnp.inf)
    count = jnp.sum(live)
    # A sum of what is first divided: the diagonal may be as large as its dtype allows.
    mean = jnp.sum(jnp.where(live, diagonal / jnp.maximum(count, 1), 0.0))
    scale = jnp.where(count > 0, mean, 1.0)
    channel = jnp.arange(gram.shape[0])

    def attempt(state):
        rung, _, _ = state
        # Tied to the rung, or XLA would make matrices of what no rung changes, and hold them all.
        tied = jax.lax.optimization_barrier((rung, gram, live, channel))
        matrix = _damp(*tied[1:], rungs[tied[0]], scale)
        matrix = matrix[::-1, ::-1] if flip else matrix
        # LAPACK reads and writes columns: transposed on both sides, nothing is copied.
        upper = jax.lax.linalg.cholesky(matrix.T, symmetrize_input=False).T
        # Where there is no factor its diagonal is NaN, as all of it.
        return rung + 1, upper, jnp.isfinite(jnp.diagonal(upper)).all()

    start = (jnp.int32(0), jnp.zeros_like(gram), jnp.bool(False))
    tried, upper, _ = jax.lax.while_loop(lambda state: ~state[2], attempt, start)
    rung = tried - 1
    dead = jnp.int32(gram.shape[0]) - count.astype(jnp.int32)
    return upper.T, Damping(rung, rungs[rung], dead, mean)


def _damp(gram, live, channel, damp, scale) -> jax.Array:
    """Returns ½(G + Gᵀ) / m + p I without dead channels; the identity for an infinite p."""
    diagonal = channel[:, None] == channel
    kept = live[:, None] & live & (damp < jnp.inf)
    matrix = 0.5 * (gram / scale) + 0.5 * (gram.T / scale) + jnp.where(diagonal, damp, 0.0)
    return jnp.where(kept, matrix, diagonal.astype(gram.dtype))
