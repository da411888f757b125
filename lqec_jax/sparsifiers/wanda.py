"""Wanda: the weights whose products with their inputs are smallest become zero.

Sun et al. 2023, arXiv:2306.11695: score |w_ij| · rms_i, compared within an output or within every m
inputs of one, and no update of what stays. Differs from locuslab/wanda@8e8fc87 lib/prune.py: the
mean square of an input is over tokens, where that code divides by sequences (the same order within
an output); of equal scores the lowest index goes first, so that every output has exactly as many
zeros as asked for.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core.bases import base_target, inner_rms, mask_base
from lqec_jax.core.masks import Sparsity, keep_largest, keep_pattern, parse_sparsity
from lqec_jax.core.types import LinearProblem, LinearStep, channel_error
from lqec_kernels.formats import CompressedLinear

REFERENCE = "locuslab/wanda@8e8fc87 lib/prune.py"


def choose(w: jax.Array, rms: jax.Array, sparsity: Sparsity) -> jax.Array:
    """Returns which weights stay, bool [d_in, d_out]; of each output where there is no pattern.

    Raises:
      InputError: the pattern does not divide d_in.
    """
    sparsity.check("wanda", w.shape[0])
    score = jnp.abs(w) * rms[:, None]
    if sparsity.pattern:
        return keep_pattern(score, *sparsity.kept_of)
    return keep_largest(score, int(sparsity.fraction * w.shape[0]))


def wanda(*, sparsity: float | str = "2:4") -> LinearStep:
    """Makes the step that sets the weights that matter least to zero and leaves the others.

    Args:
      sparsity: a fraction of every output's weights, or 'n:m' to keep n of every m consecutive
        inputs.
    """
    wanted = parse_sparsity("wanda", sparsity)

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        rms = inner_rms("wanda", problem, leaf)
        return mask_base(leaf, choose(base_target(leaf), rms, wanted), wanted.pattern)

    return LinearStep(
        name="wanda",
        run=run,
        arguments={"sparsity": sparsity},
        needs=frozenset({"rms"}),
        objective=channel_error,
        objective_name="relative channel error",
    )
