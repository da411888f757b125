"""The best rank-r correction of the weight error, blind to the inputs.

min over a, b of ||w - ŵ - a b||_F², solved by the truncated SVD (Eckart & Young 1936); the
compensation that LoftQ (arXiv:2310.08659) iterates and that LQEC papers call plain SVD.
"""

import dataclasses

import jax.numpy as jnp

from lqec_jax.core.arguments import check_choice, check_rank, resolve_rank
from lqec_jax.core.closed_form import truncate
from lqec_jax.core.types import LinearProblem, Step, weight_error
from lqec_kernels.formats import CompressedLinear, LowRank

REFERENCE = "closed form"


def svd(*, rank: int | float = 64, dtype: str = "float16") -> Step:
    """Makes the step that adds the rank-r approximation of what is still missing.

    Args:
      rank: an integer, or a fraction of min(d_in, d_out).
      dtype: in which the factors are stored, 'float16' or 'float32'.
    """
    check_rank("svd", rank)
    check_choice("svd", "dtype", dtype, ("float16", "float32"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        r = resolve_rank("svd", rank, *problem.w.shape)
        a, b = truncate(problem.w - leaf.dense(), r)
        correction = LowRank(a.astype(jnp.dtype(dtype)), b.astype(jnp.dtype(dtype)))
        return dataclasses.replace(leaf, corrections=(*leaf.corrections, correction))

    return Step(
        name="svd",
        scope="linear",
        run=run,
        arguments={"rank": rank, "dtype": dtype},
        objective=weight_error,
        objective_name="relative weight error",
    )
