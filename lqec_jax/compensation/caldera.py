"""CALDERA: a base and low-rank factors in few bits, in turns, by what the inputs see.

Saha et al. 2024, arXiv:2405.18886: min over Q, a, b, all quantized, of tr(Δᵀ G Δ), Δ = w - Q - a b,
G = E[x xᵀ], by turns of a quantizer (theirs sweeps a lattice with feedback, `e8p` here) on w - a b
and of the factors on E = w - Q. The best factors are `core.closed_form.reduce_rank`; in few bits
they are rounded and then improved, each in view of the other as rounded (LPLR, Saha et al. 2023,
arXiv:2310.11028):

    b = round((âᵀ G â)⁺ âᵀ G E),   a = round(E b̂ᵀ (b̂ b̂ᵀ)⁺),

the second blind to G, as a is on the inputs' side: with G of full rank the best a is the same for
any. The best of these rounds is kept, and the best of the turns.

Written from the paper's equations; its code was not used. Differs: the factors are rounded to a
group's largest magnitude, not to a lattice; no damping, as nothing is inverted; G is the same for
all turns, where their script takes out of it what the factors account for.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lqec_jax.core.arguments import check_int
from lqec_jax.core.closed_form import complete, reduce_rank
from lqec_jax.core.corrections import keep_best, make_correction, store
from lqec_jax.core.types import LinearProblem, LinearStep, output_error
from lqec_kernels.adapters import QuantizedLowRank, round_columns

REFERENCE = "closed form"


def factor_coarsely(
    error: jax.Array, gram: jax.Array, rank: int, bits: int, group_size: int | None, rounds: int
) -> QuantizedLowRank:
    """Returns factors in few bits that leave little output error.

    Args:
      error: E, float32 [d_in, d_out].
      gram: G, float32 [d_in, d_in].
      rank: how many components.
      bits, group_size: as in `QuantizedLowRank.round`.
      rounds: how often both factors are fitted anew; 0 rounds the best ones.
    Cost: of `reduce_rank`, and (d_in + 4 d_out) · d_in · rank multiply-adds a round.  jit: yes.
    """
    alike = jnp.ones(error.shape[1], error.dtype)
    round_factor = partial(round_columns, bits=bits, group_size=group_size)

    def iterate(factors: QuantizedLowRank) -> tuple:
        stored = factors.factors()
        b = round_factor(complete(error, gram, stored.a).T)
        a = round_factor(complete(error.T, alike, b.dense()).T)
        return QuantizedLowRank(a, b), factors, _count_left(error, gram, stored.a, stored.b)

    start = QuantizedLowRank.round(
        *reduce_rank(error, gram, rank), bits=bits, group_size=group_size
    )
    return keep_best(iterate, start, rounds + 1)[0]


def _count_left(error, gram, a, b) -> jax.Array:
    """Returns tr((E - a b)ᵀ G (E - a b)) - tr(Eᵀ G E), without a product of whole matrices."""
    multiply = partial(jnp.matmul, precision="highest")
    seen = multiply(gram, a)  # [d_in, r]
    return jnp.sum(b * (multiply(multiply(a.T, seen), b) - 2 * multiply(seen.T, error)))


def caldera(
    *,
    quantizer: LinearStep | None = None,
    rank: int | float = 64,
    factor_bits: int | None = None,
    factor_group_size: int | None = 128,
    iters: int = 20,
    inner: int = 10,
    first: str = "factors",
    keep: str = "best",
    dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base and adds factors, each for the least output error.

    Args:
      quantizer: any method that makes a base of one weight; the authors' is e8p(bits=2). The base
        that there is gives way. None leaves it and fits the factors alone.
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 64 to 256.
      factor_bits: 2-8 for factors in few bits, the authors' is 4; None keeps them in `dtype`.
      factor_group_size: numbers of a component that share a scale, or a side's largest divisor
        below that; None is all of them.
      iters: turns; the authors' are 20.
      inner: rounds that improve factors in few bits; the authors' are 50 in their script.
      first: 'factors' of the whole weight begin, as in the authors' script, or the 'base'. A model
        of 1M parameters at 2 bits with `gptq` has perplexity 2.72 by the one and 2.83 by the other.
      keep: 'best' of the pairs, or the 'last'.
      dtype: in which factors that have no `factor_bits` are stored, 'float16' or 'float32'.
    """
    if factor_bits is not None:
        check_int("caldera", "factor_bits", factor_bits, 2, 8)
    if factor_group_size is not None:
        check_int("caldera", "factor_group_size", factor_group_size, 1)
    check_int("caldera", "inner", inner, 0)

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        gram = problem.stats.gram
        if factor_bits is None:
            return store(*reduce_rank(error, gram, r), dtype), ()
        return factor_coarsely(error, gram, r, factor_bits, factor_group_size, inner), ()

    return make_correction(
        "caldera",
        {"quantizer": quantizer, "rank": rank, "factor_bits": factor_bits,
         "factor_group_size": factor_group_size, "iters": iters, "inner": inner, "first": first,
         "keep": keep, "dtype": dtype},
        solve,
        output_error,
        "relative output error",
        frozenset({"gram"}),
    )  # fmt: skip
