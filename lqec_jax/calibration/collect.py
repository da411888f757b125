"""What a linear's inputs look like, gathered over windows, only as far as a step asks.

Sums are float32 and products `Precision.HIGHEST`: a gram accumulated in bfloat16 or TF32 is the
commonest reason for a Cholesky factorization to fail. A gram that is too large to be held beside
a block lies in a mapped file while it grows.

Tokens are summed in an order of ours. On a CPU, XLA would cut a long sum for the threads there are,
and the last bit of a gram is enough for GPTQ to choose other codes: the same text would give
another model on another number of cores.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lqec_jax.core.disk import make_array
from lqec_jax.core.types import LinearStats
from lqec_jax.errors import InputError

# A gram above this size is summed on disk, so many of its rows at a time.
SPILL_BYTES, SPILL_ROWS = 2 * 2**30, 2048
# Tokens that one product sums over on a CPU. Eigen cuts a longer sum into panels that fit the first
# cache (136 to 384 numbers), and into parts for threads where outputs are few.
RUN = 128


# Tokens an input below which a report says that statistics are of few. Of n tokens the eigenvalues
# of a gram of d independent inputs spread over (1 ± √(d/n))², at this ratio from 0.1 to 2.9.
LEAST_TOKENS = 2


class Statistic(NamedTuple):
    """A sum over tokens and what is made of it.

    Attributes:
      add: x float32 [tokens, d_in] -> this batch's sum.
      finish: (sum, tokens) -> the statistic.
    """

    add: Callable[[jax.Array], jax.Array]
    finish: Callable[[jax.Array, int], jax.Array]


def sum_rows(x: jax.Array) -> jax.Array:
    """Returns Σ_t x[t] in pairs, the pairs in pairs: the same bits on any number of threads."""
    while x.shape[0] > 1:
        half = -(-x.shape[0] // 2)
        rest = x[half:]
        x = x[:half] + jnp.pad(rest, ((0, half - rest.shape[0]), (0, 0)))
    return x[0]


def sum_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns Σ_t x[t]ᵀ y[t], [d, n]; on a CPU the same bits on any number of threads."""
    return lax.platform_dependent(x, y, cpu=_sum_by_runs, default=_multiply)


def _multiply(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, y, precision="highest")


def _sum_by_runs(x: jax.Array, y: jax.Array) -> jax.Array:
    count = -(-x.shape[0] // RUN)
    padding = ((0, count * RUN - x.shape[0]), (0, 0))
    runs = [jnp.pad(a, padding).reshape(count, RUN, -1) for a in (x, y)]  # [count, RUN, d]

    def add(total: jax.Array, run: list) -> tuple:
        return total + _multiply(*run), None

    return lax.scan(add, jnp.zeros((x.shape[1], y.shape[1]), x.dtype), runs)[0]


STATISTICS = {
    "rms": Statistic(lambda x: sum_rows(jnp.square(x)), lambda s, n: jnp.sqrt(s / n)),
    "absmean": Statistic(lambda x: sum_rows(jnp.abs(x)), lambda s, n: s / n),
    "gram": Statistic(lambda x: sum_products(x, x), lambda s, n: s / n),
}


def describe_tokens(tokens: int, d_in: int) -> list[str]:
    """Returns what a report should say of statistics of so many tokens."""
    if tokens >= LEAST_TOKENS * d_in:
        return []
    return [
        f"statistics: of {tokens} tokens for {d_in} inputs, fewer than {LEAST_TOKENS} an input; "
        "give more calibration text"
    ]


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
    return sum_products(rows, x)
