"""What a linear's inputs look like, gathered over windows, only as far as a step asks."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lqec_jax.core.types import LinearStats


class Statistic(NamedTuple):
    """A sum over tokens and what is made of it.

    Attributes:
      add: x float32 [tokens, d_in] -> this batch's sum.
      finish: (sum, tokens) -> the statistic.
    """

    add: Callable[[jax.Array], jax.Array]
    finish: Callable[[jax.Array, int], jax.Array]


STATISTICS = {
    "rms": Statistic(lambda x: jnp.sum(jnp.square(x), axis=0), lambda s, n: jnp.sqrt(s / n)),
}


def collect(batches: Iterable[jax.Array], needs: frozenset[str]) -> LinearStats:
    """Gathers statistics of one linear's input.

    Args:
      batches: floating [..., d_in] arrays; sums are float32.
      needs: fields of `LinearStats`; the others stay None.
    Cost: one pass over the inputs.
    """
    sums: dict[str, jax.Array] = {}
    tokens = 0
    for x in batches:
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # [tokens, d_in]
        tokens += x.shape[0]
        for name in needs:
            part = STATISTICS[name].add(x)
            sums[name] = sums[name] + part if name in sums else part
    return LinearStats(**{name: STATISTICS[name].finish(sums[name], tokens) for name in needs})
