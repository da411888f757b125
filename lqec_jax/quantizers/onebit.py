"""One-bit weights: a sign each, magnitudes of rank one.

W ≈ sign(W) ⊙ (b aᵀ), the sign-value-independent decomposition of OneBit, Xu et al. 2024,
arXiv:2402.11295. Since B² = 1,

    ||W - S ⊙ b aᵀ||_F = || |W| - b aᵀ ||_F,

so the best factors are the leading singular pair of |W|, non-negative by Perron and Frobenius.

Reference: xuyuzhuang11/OneBit, a non-negative factorization of |W|, which at rank one has the same
optimum. Differs: groups of inputs may have output factors of their own (their release has one for
all); a is the least squares given b as stored. Only the start is here: their layer norm and their
training are not.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, resolve_group
from lqec_jax.core.bases import base_target, replace_base, scale_inputs
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import CompressedLinear

REFERENCE = "xuyuzhuang11/OneBit@380a6ae scripts/build_start_ckpt.py"

# The leading pair of a non-negative matrix stands far above the rest: each round is worth a digit.
ROUNDS = 30


def quantize(w, group_size: int, *, dtype=jnp.float16) -> tuple[BitPlanes, jax.Array]:
    """Takes a weight to its signs and the best rank-one magnitudes.

    min over a, b >= 0 of Σ (|w[i, o]| - b[i] a[g, o])²,  g = i // group_size

    Args:
      w: float32 [d_in, d_out].
      group_size: inputs that share their output factors; divides d_in, all of them in the paper.
      dtype: of a and b.
    Returns:
      The signs with factors a, and b [d_in], the largest of a group being 1: ŵ = diag(b) base.
    Cost: 2 · 30 passes over w, one copy of it held.  jit: yes; vmap: yes.
    """
    size = jnp.abs(grids.group_rows(w, group_size))
    # The unit of the weight is in a; b would else lose its small entries to float16.
    b = fit_inputs(size).astype(dtype)
    a = project(size, b.astype(jnp.float32), axis=1)
    a = store_number(a, dtype)
    base = BitPlanes.from_signs((w >= 0)[None], a[None, :, 0], None, group_size=group_size)
    return base, b.reshape(-1)  # [d_in]


def fit_inputs(size: jax.Array) -> jax.Array:
    """Returns b of the leading singular pair of each group, [G, group, 1], at most 1.

    Alternating least squares, which for one pair is the power iteration; no round raises the error.
    """

    def improve(_, b):
        b = project(size, project(size, b, axis=1), axis=2)
        largest = jnp.max(b, axis=1, keepdims=True)
        return b / jnp.where(largest > 0, largest, 1.0)

    return jax.lax.fori_loop(0, ROUNDS, improve, jnp.ones_like(size[..., :1]))


def project(size: jax.Array, factor: jax.Array, axis: int) -> jax.Array:
    """Returns the least squares factor of the other side: Σ factor · size / Σ factor²."""
    square = jnp.sum(jnp.square(factor), axis=axis, keepdims=True)
    return jnp.sum(factor * size, axis=axis, keepdims=True) / jnp.where(square > 0, square, 1.0)


def onebit(*, group_size: int | None = None, scale_dtype: str = "float16") -> LinearStep:
    """Makes the step that replaces the base by signs; needs no data.

    The input factors become an input transform, the output factors the base's scales.

    Args:
      group_size: None is the paper's rank-one matrix; a size gives every group of inputs output
        factors of its own, which costs 16 bits a group and is never farther from the weight.
      scale_dtype: 'float16' or 'float32'.
    """
    if group_size is not None:
        check_int("onebit", "group_size", group_size, 1)
    check_choice("onebit", "scale_dtype", scale_dtype, ("float16", "float32"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        w = base_target(leaf)
        group = resolve_group("onebit", group_size, w.shape[0])
        base, b = quantize(w, group, dtype=jnp.dtype(scale_dtype))
        return scale_inputs("onebit", replace_base(leaf, base), b)

    return LinearStep(
        name="onebit",
        run=run,
        arguments={"group_size": group_size, "scale_dtype": scale_dtype},
        objective=weight_error,
        objective_name="relative weight error",
    )
