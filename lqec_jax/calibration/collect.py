"""What a linear's inputs look like, gathered over windows, only as far as a step asks.

Sums are float32 and products `Precision.HIGHEST`: a gram accumulated in bfloat16 or TF32 is the
commonest reason for a Cholesky factorization to fail. A gram that is too large to be held beside
a block lies in a mapped file while it grows.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.disk import make_array
from lqec_jax.core.types import LinearStats
from lqec_jax.errors import InputError

# A gram above this size is summed on disk, so many of its rows at a time.
SPILL_BYTES, SPILL_ROWS = 2 * 2**30, 2048


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
    "absmean": Statistic(lambda x: jnp.sum(jnp.abs(x), axis=0), lambda s, n: s / n),
    "gram": Statistic(lambda x: jnp.matmul(x.T, x, precision="highest"), lambda s, n: s / n),
}


def collect(
    batches: Iterable[jax.Array], needs: frozenset[str], spill: Path | None = None
) -> LinearStats:
    """Gathers statistics of one linear's input.

    Args:
      batches: floating [..., d_in] arrays; sums are float32.
      needs: fields of `LinearStats`; the others stay None.
      spill: the file in which a gram of more than `SPILL_BYTES` grows; None keeps it in memory.
    Raises:
      InputError: a statistic that inputs do not tell.
    Cost: one pass over the inputs; a gram takes tokens · d_in² multiplications.
    """
    unknown = sorted(needs - STATISTICS.keys())
    if unknown:
        raise InputError(
            f"{unknown[0]} is told by a whole model's gradients, not by a linear's inputs; "
            "use compress"
        )
    sums: dict[str, jax.Array] = {}
    on_disk: _GramOnDisk | None = None
    tokens = 0
    for x in batches:
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # [tokens, d_in]
        tokens += x.shape[0]
        held = needs
        if "gram" in needs and spill is not None and 4 * x.shape[1] ** 2 > SPILL_BYTES:
            held = needs - {"gram"}
            on_disk = on_disk or _GramOnDisk(spill, x.shape[1])
            on_disk.add(x)
        sums = _add(tuple(sorted(held)), sums, x)
    stats = {name: STATISTICS[name].finish(total, tokens) for name, total in sums.items()}
    if on_disk is not None:
        stats["gram"] = on_disk.finish(tokens)
    return LinearStats(**stats)


@partial(jax.jit, static_argnums=0)
def _add(names: tuple[str, ...], sums: dict, x: jax.Array) -> dict:
    parts = {name: STATISTICS[name].add(x) for name in names}
    return {name: sums[name] + part if name in sums else part for name, part in parts.items()}


class _GramOnDisk:
    """A sum of x xᵀ in a mapped file, of which a few rows at a time are in memory."""

    def __init__(self, path: Path, d_in: int):
        self.sum = make_array(path, np.float32, (d_in, d_in))

    def add(self, x: jax.Array) -> None:
        for first in range(0, len(self.sum), SPILL_ROWS):
            self.sum[first : first + SPILL_ROWS] += np.asarray(
                _rows_of_gram(x, x[:, first : first + SPILL_ROWS])
            )

    def finish(self, tokens: int) -> np.ndarray:
        for first in range(0, len(self.sum), SPILL_ROWS):
            self.sum[first : first + SPILL_ROWS] /= tokens
        return self.sum


@jax.jit
def _rows_of_gram(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.matmul(rows.T, x, precision="highest")
