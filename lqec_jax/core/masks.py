"""Which weights stay: the largest by a score, of all, of a column, or of every few inputs.

Of equal scores the lowest index goes first, so that a mask has exactly as many zeros as it is to
have, whatever the weight.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lqec_jax.errors import InputError


@dataclass(frozen=True)
class Sparsity:
    """How many weights become zero.

    Attributes:
      fraction: of all weights, where no pattern is asked for.
      pattern: 'n:m', keep n of every m consecutive inputs of a column; '' for none.
    """

    fraction: float
    pattern: str = ""

    @property
    def kept_of(self) -> tuple[int, int]:
        """Returns (n, m) of the pattern."""
        n, _, m = self.pattern.partition(":")
        return int(n), int(m)

    def check(self, method: str, d_in: int) -> None:
        """Raises InputError where d_in is not a whole number of m."""
        if self.pattern and d_in % self.kept_of[1]:
            raise InputError(
                f"{method}: d_in={d_in} is not divisible by {self.kept_of[1]}, the length of "
                f"sparsity={self.pattern!r}; give a fraction such as {self.fraction:g}"
            )


def parse_sparsity(method: str, sparsity: float | str) -> Sparsity:
    """Reads what a recipe says: a fraction of zeros, or 'n:m'.

    Raises:
      InputError: it is neither.
    """
    if isinstance(sparsity, str):
        pattern = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", sparsity)
        if pattern and int(pattern[1]) < int(pattern[2]):
            return Sparsity(1 - int(pattern[1]) / int(pattern[2]), sparsity)
    elif isinstance(sparsity, float) and 0 < sparsity < 1:
        return Sparsity(sparsity)
    raise InputError(
        f"{method}: sparsity={sparsity!r}; a fraction between 0 and 1, or n of m such as '2:4' "
        "was wanted"
    )


def keep_pattern(score: jax.Array, n: int, m: int) -> jax.Array:
    """Keeps the n largest of every m rows: [d_in, d_out] -> bool [d_in, d_out]."""
    runs = score.reshape(-1, m, score.shape[1])  # [runs, m, d_out]
    mine, other = runs[:, :, None], runs[:, None]  # [runs, m, 1, d_out], [runs, 1, m, d_out]
    earlier = jnp.arange(m)[:, None, None] > jnp.arange(m)[None, :, None]
    below = jnp.sum((other < mine) | ((other == mine) & earlier), axis=2)
    return (below >= m - n).reshape(score.shape)  # [d_in, d_out]


def keep_largest(score: jax.Array, zeros: int) -> jax.Array:
    """Keeps all but `zeros` of the entries along the first axis.

    Args:
      score: float32, not negative, [n, ...].
      zeros: how many go; static.
    Returns:
      bool [n, ...] with exactly `zeros` False along the first axis.
    Cost: 32 counts of the scores, which as bits are in their own order; nothing is sorted.
    """
    bits = jax.lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)

    def halve(place, threshold):
        # The largest number that no more than `zeros` scores are below.
        higher = threshold | (jnp.uint32(1) << (jnp.uint32(31) - place.astype(jnp.uint32)))
        return jnp.where(jnp.sum(bits < higher, axis=0) <= zeros, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, halve, jnp.zeros(score.shape[1:], jnp.uint32))
    below, equal = bits < threshold, bits == threshold
    left = zeros - jnp.sum(below, axis=0)
    return ~(below | (equal & (jnp.cumsum(equal, axis=0) <= left)))
