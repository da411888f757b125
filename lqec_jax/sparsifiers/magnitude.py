"""Magnitude pruning: the smallest weights become zero.

Han et al. 2015, arXiv:1506.02626, in one shot: of the whole matrix, or of every m inputs. Differs
from locuslab/wanda@8e8fc87 lib/prune.py: of equal weights the one with the lowest index goes first,
so that exactly the share asked for is zero.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core.bases import base_target, mask_base
from lqec_jax.core.masks import Sparsity, keep_largest, keep_pattern, parse_sparsity
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_kernels.formats import CompressedLinear

REFERENCE = "locuslab/wanda@8e8fc87 lib/prune.py"


def choose(w: jax.Array, sparsity: Sparsity) -> jax.Array:
    """Returns which weights stay, bool [d_in, d_out]; of all where there is no pattern.

    Raises:
      InputError: the pattern does not divide d_in.
    """
    sparsity.check("magnitude", w.shape[0])
    score = jnp.abs(w)
    if sparsity.pattern:
        return keep_pattern(score, *sparsity.kept_of)
    return keep_largest(score.reshape(-1), int(sparsity.fraction * w.size)).reshape(w.shape)


def magnitude(*, sparsity: float | str = "2:4") -> LinearStep:
    """Makes the step that sets the smallest weights to zero and leaves the others.

    Args:
      sparsity: a fraction of the matrix, or 'n:m' to keep n of every m consecutive inputs.
    """
    wanted = parse_sparsity("magnitude", sparsity)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        return mask_base(leaf, choose(base_target(leaf), wanted), wanted.pattern)

    return LinearStep(
        name="magnitude",
        run=run,
        arguments={"sparsity": sparsity},
        objective=weight_error,
        objective_name="relative weight error",
    )
