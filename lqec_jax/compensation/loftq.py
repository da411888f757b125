"""LoftQ: round what the factors leave, factor what the rounding leaves, and again.

Li et al. 2023, arXiv:2310.08659: min over Q on a grid, a, b of ||w - Q - a b||_F² by turns,

    Q_t = q(w - a_{t-1} b_{t-1}),   a_t b_t = SVD_r(w - Q_t),   a_0 b_0 = 0,

so that one turn is the quantizer and then `svd`. On a grid that stays no turn can raise the error;
where scales follow the weight some do.

Differs from yxli2123/LoftQ utils.py (which PEFT has too): any quantizer that is here takes the
place of its two; the pair of the least weight error is returned, where that code returns the last;
Q is made against the factors as they are stored.
"""

import jax

from lqec_jax.core.closed_form import truncate
from lqec_jax.core.corrections import make_correction, store
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error

REFERENCE = "closed form"
ALONE = "quantizer: none was given, so the base stayed and this was one plain SVD"


def loftq(
    *,
    quantizer: LinearStep | None = None,
    rank: int | float = 64,
    iters: int = 5,
    first: str = "base",
    keep: str = "best",
    dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base and adds factors, each fitted to the other.

    Args:
      quantizer: any method that makes a base of one weight, e.g. nf(bits=2), the authors' with
        blocks of 64; the base that there is gives way. None leaves it, and this is `svd`.
      rank: an integer, or a fraction of min(d_in, d_out). The authors' is 64, on small models 8-32.
      iters: turns; the authors' paper has 5, their code 1 unless told.
      first: 'base' is the authors'; 'factors' begins with the factors of the whole weight.
      keep: 'best' in weight error, or the 'last', as the authors' code. At 2 bits neither is a
        guide to a small model: its perplexity was 6.7, 6.1, 6.5, 6.5 after 1, 3, 5 and 6 turns.
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """

    def solve(error: jax.Array, problem: LinearProblem, r: int) -> tuple:
        return store(*truncate(error, r), dtype), ()

    return make_correction(
        "loftq",
        {"quantizer": quantizer, "rank": rank, "iters": iters, "first": first, "keep": keep,
         "dtype": dtype},
        solve,
        weight_error,
        "relative weight error",
        notes=(lambda facts: (ALONE,)) if quantizer is None else None,
    )  # fmt: skip
