"""LQ-LoRA: factors whose error counts by the loss's curvature on both sides, in turns with a base.

Guo et al. 2024, arXiv:2311.12023: min ||√F ∘ (w - Q - a b)||_F², F the diagonal Fisher information.
For a sum over F itself this is hard; for F of rank one,

    Σ r_i² (w - Q - a b)_io² c_o²,   r_i² = mean_o F_io,   c_o² = mean_i F_io,

the best a b is SVD_r(r (w - Q) c) with both sides undone, and Q = q(w - a b) takes turns with it.

Differs from HanGuo97/lq-lora: the error is measured after the factors are fitted to Q, and the best
pair is kept, where that code measures between the two and returns the first pair that is worse; the
SVD is exact; any quantizer takes turns, and bits are not chosen by matrix; r and c are at least a
little, so that no input or output is left to chance.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core.closed_form import balance, reduce_rank
from lqec_jax.core.corrections import make_correction, store
from lqec_jax.core.types import LinearProblem, LinearStats, LinearStep
from lqec_kernels.formats import CompressedLinear

REFERENCE = "closed form"
# Smallest weight of an error, in units of the root of the mean Fisher information.
LEAST = 1e-4


def weigh_sides(stats: LinearStats) -> tuple[jax.Array, jax.Array]:
    """Returns the weights of errors: (r [d_in], c [d_out]), each at least a little.

    Both are roots of means over the other side, in units of the root of their mean; ones where the
    Fisher information is zero.
    """
    sides = (jnp.mean(stats.fisher, axis=1), jnp.mean(stats.fisher, axis=0))
    mean = jnp.mean(sides[0])
    unit = jnp.where(mean > 0, mean, 1.0)
    rows, columns = (jnp.where(mean > 0, jnp.sqrt(side / unit), 1.0) for side in sides)
    return jnp.maximum(rows, LEAST), jnp.maximum(columns, LEAST)


def sides_error(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns Σ (r_i Δ_io c_o)² / Σ (r_i w_io c_o)², what `lq_lora` lowers."""
    rows, columns = weigh_sides(problem.stats)
    error, whole = (
        jnp.sum(jnp.square(rows[:, None] * w * columns))
        for w in (problem.w - leaf.dense(), problem.w)
    )
    return error / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)


def lq_lora(
    *,
    rank: int | float = 64,
    quantizer: LinearStep | None = None,
    iters: int = 5,
    first: str = "factors",
    keep: str = "best",
    dtype: str = "float16",
) -> LinearStep:
    """Makes the step whose correction weighs inputs and outputs by the loss's curvature.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 64.
      quantizer: any method that makes a base of one weight, to take turns with, the authors' is
        nf(double=True); the base that there is gives way. None leaves it: one correction of it.
      iters: turns, where there is a quantizer; the authors' go on until the error rises, at most
        100.
      first: 'factors' of the whole weight begin, as the authors', or the 'base'. A model of 1M
        parameters at 2 bits on rounding has perplexity 3.87 by the one and 5.92 by the other.
      keep: 'best' of the pairs, or the 'last'.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        rows, columns = weigh_sides(problem.stats)
        a, b = reduce_rank(error * columns, jnp.square(rows), r)
        return store(*balance(a, b / columns), dtype), ()

    return make_correction(
        "lq_lora",
        {"rank": rank, "quantizer": quantizer, "iters": iters, "first": first, "keep": keep,
         "dtype": dtype},
        solve,
        sides_error,
        "relative error by rank-one Fisher",
        frozenset({"fisher"}),
    )  # fmt: skip
