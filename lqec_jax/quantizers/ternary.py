"""Ternary weights: three levels a group, from a threshold and least squares.

T = sign(w) where |w| > Δ, Δ = 0.7 mean|w|, of Li et al. 2016, arXiv:1605.04711; α and the shift γ
of ŵ = α T + γ are TernaryLLM's, Chen et al. 2024, arXiv:2406.07177, here not learned but the least
squares of w on (T, 1): a start that needs no data.

Differs: TernaryLLM starts at α = mean |w| over T ≠ 0 and γ = mean(w - α T), which is never nearer.
"""

import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, check_number, resolve_group
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.scales import store_number
from lqec_jax.core.types import LinearProblem, LinearStep, weight_error
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import CompressedLinear

REFERENCE = "closed form"


def quantize(w, group_size: int, *, threshold=0.7, shift=True, dtype=jnp.float16) -> BitPlanes:
    """Takes every weight to one of γ - α, γ, γ + α of its group.

    min over α, γ of Σ (w - α T - γ)²

    Args:
      w: float32 [d_in, d_out].
      group_size: inputs that share α and γ; divides d_in.
      threshold: Δ in units of the group's mean |w|.
      shift: fits γ; without it γ is zero and α the mean |w| over T ≠ 0.
      dtype: of α and γ.
    Returns:
      BitPlanes of two planes with one alpha, α/2.
    Cost: O(d_in · d_out).  jit: yes; vmap: yes.
    """
    grouped = grids.group_rows(w, group_size)
    delta = threshold * jnp.mean(jnp.abs(grouped), axis=1, keepdims=True)
    signs = jnp.stack([grouped >= -delta, grouped > delta])  # T = (B_0 + B_1) / 2
    alphas, shifts = fit(grouped, signs, shift=shift)
    alphas, shifts = (store_number(a[:, 0], dtype) for a in (alphas / 2, shifts))
    return BitPlanes.from_signs(
        signs.reshape(2, *w.shape),  # [2, d_in, d_out]
        alphas[None],
        shifts if shift else None,
        group_size=group_size,
    )


def fit(w, signs, *, shift: bool):
    """Returns the least squares (α, γ) of w [G, group, n] on T = (B_0 + B_1)/2, each [G, 1, n].

    Where T is the same everywhere, α and γ cannot be told apart: γ is zero then.
    """
    trits = jnp.where(signs[0], 0.5, -0.5) + jnp.where(signs[1], 0.5, -0.5)

    def mean(array):
        return jnp.mean(array, axis=1, keepdims=True)

    plain = mean(w * trits) / jnp.maximum(mean(trits**2), jnp.finfo(jnp.float32).tiny)
    if not shift:
        return plain, jnp.zeros_like(plain)
    spread = mean(trits**2) - mean(trits) ** 2
    told_apart = spread > 1e-6
    alphas = (mean(w * trits) - mean(w) * mean(trits)) / jnp.where(told_apart, spread, 1.0)
    alphas = jnp.where(told_apart, alphas, plain)
    flat = mean(trits**2) == 0
    return alphas, jnp.where(told_apart | flat, mean(w) - alphas * mean(trits), 0.0)


def ternary(
    *,
    group_size: int | None = 64,
    threshold: float = 0.7,
    shift: bool = True,
    scale_dtype: str = "float16",
) -> LinearStep:
    """Makes the step that replaces the base by a ternary one; needs no data.

    Two bits a weight are stored, where log2(3) = 1.585 would do.

    Args:
      group_size: must divide every d_in it meets; None is one group a column.
      threshold: 0-2, Δ in units of mean |w|; 0.7 is nearly the best for Gaussian weights.
      shift: a shift a group, TernaryLLM's; False is the plain ternary weight.
      scale_dtype: 'float16' or 'float32'.
    """
    if group_size is not None:
        check_int("ternary", "group_size", group_size, 1)
    check_number("ternary", "threshold", threshold, 0, 2)
    check_choice("ternary", "shift", shift, (True, False))
    check_choice("ternary", "scale_dtype", scale_dtype, ("float16", "float32"))

    def run(problem: LinearProblem, leaf: CompressedLinear) -> CompressedLinear:
        w = base_target(leaf)
        group = resolve_group("ternary", group_size, w.shape[0])
        dtype = jnp.dtype(scale_dtype)
        return replace_base(leaf, quantize(w, group, threshold=threshold, shift=shift, dtype=dtype))

    return LinearStep(
        name="ternary",
        run=run,
        arguments={"group_size": group_size, "threshold": threshold, "shift": shift,
                   "scale_dtype": scale_dtype},
        objective=weight_error,
        objective_name="relative weight error",
    )  # fmt: skip
