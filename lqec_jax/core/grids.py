"""Uniform grids: the range of a group, rounding, and the search for a better clip.

    s = (hi - lo) / (2^b - 1),   z = round(-lo / s),   u = clip(round(w / s) + z, 0, 2^b - 1),
    ŵ = s (u - z)

Arrays here are grouped: w [groups, group_size, d_out], everything per group [groups, 1, d_out].
Rounding is half to even, as in the field's reference code. The functions named `..._through` give
the same numbers to the bit and differ in their gradient, which passes a rounding unchanged
(Bengio et al. 2013, arXiv:1308.3432) and is that of a plain clip at the ends of a grid.
"""

import jax
import jax.numpy as jnp

from lqec_jax.core.scales import store_scale

# Clips tried by the search: the whole range down to a fifth of it in steps of one percent.
SHRINKS = 80
SHRINK_STEP = 0.01


def group_rows(w: jax.Array, group_size: int) -> jax.Array:
    """Cuts the input axis into groups."""
    d_in, d_out = w.shape
    return w.reshape(d_in // group_size, group_size, d_out)  # [groups, group_size, d_out]


def find_range(w: jax.Array, *, symmetric: bool) -> tuple[jax.Array, jax.Array]:
    """Returns (lo, hi) per group, with zero inside; ±1 for a group of zeros."""
    lo = jnp.minimum(w.min(axis=1, keepdims=True), 0.0)
    hi = jnp.maximum(w.max(axis=1, keepdims=True), 0.0)
    if symmetric:
        hi = jnp.maximum(-lo, hi)
        lo = -hi
    empty = (lo == 0) & (hi == 0)
    return jnp.where(empty, -1.0, lo), jnp.where(empty, 1.0, hi)


def fit_grid(lo: jax.Array, hi: jax.Array, bits: int, *, symmetric: bool, dtype) -> tuple:
    """Returns (scales, zeros) for a range, the scales as they will be stored.

    Scales are rounded to `dtype` here, before any code is computed, so that the model in memory is
    the model on disk; see `scales.store_scale`.
    """
    scales = store_scale((hi - lo) / (2**bits - 1), dtype)
    middle = jnp.full(scales.shape, 2.0 ** (bits - 1), jnp.float32)
    zeros = middle if symmetric else jnp.round(-lo / scales.astype(jnp.float32))
    return scales, jnp.clip(zeros, 0, 2**bits - 1)


def round_to_grid(w: jax.Array, scales: jax.Array, zeros: jax.Array, bits: int) -> jax.Array:
    """Returns the nearest codes as float32 integers."""
    return jnp.clip(jnp.round(w / scales.astype(jnp.float32)) + zeros, 0, 2**bits - 1)


def dequantize(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> jax.Array:
    return (codes - zeros) * scales.astype(jnp.float32)


def search_clip(
    w: jax.Array, bits: int, weight: jax.Array, *, symmetric: bool, dtype, power: float
) -> tuple[jax.Array, jax.Array]:
    """Shrinks each group's range to the one with the least error.

    argmin over p of Σ_i weight_i |ŵ_i(p) - w_i|^power, with both ends of the range times p.

    Args:
      w: float32 [groups, group_size, d_out].
      weight: how much an input channel counts, [groups, group_size, 1].
      power: 2.4 is GPTQ's choice for the plain weight error, 2 gives the layer's output error when
        inputs are uncorrelated and `weight` is their mean square.
    Returns:
      (scales, zeros), each [groups, 1, d_out].
    Cost: 80 roundings of w, one copy of w held.
    """
    lo, hi = find_range(w, symmetric=symmetric)

    def attempt(i, best):
        shrink = 1.0 - SHRINK_STEP * i
        scales, zeros = fit_grid(shrink * lo, shrink * hi, bits, symmetric=symmetric, dtype=dtype)
        error = dequantize(round_to_grid(w, scales, zeros, bits), scales, zeros) - w
        error = jnp.sum(weight * jnp.abs(error) ** power, axis=1, keepdims=True)
        better = error < best[0]
        new = (error, scales, zeros)
        return tuple(jnp.where(better, n, b) for n, b in zip(new, best, strict=True))

    scales, zeros = fit_grid(lo, hi, bits, symmetric=symmetric, dtype=dtype)
    start = (jnp.full(scales.shape, jnp.inf, jnp.float32), scales, zeros)
    return jax.lax.fori_loop(0, SHRINKS, attempt, start)[1:]


@jax.custom_jvp
def store_through(exact: jax.Array, stored: jax.Array) -> jax.Array:
    """Returns `stored` in float32, with the gradient of `exact`, which it stands for."""
    return stored.astype(jnp.float32)


@store_through.defjvp
def _(primals: tuple, tangents: tuple) -> tuple:
    return store_through(*primals), tangents[0]


def fit_grid_through(lo: jax.Array, hi: jax.Array, bits: int, *, symmetric: bool, dtype) -> tuple:
    """Returns `fit_grid`'s scales in float32, differentiable in the range, and its zeros.

    Zeros carry no gradient: a range is learned through the scale and through what it clips.
    """
    scales, zeros = fit_grid(lo, hi, bits, symmetric=symmetric, dtype=dtype)
    return store_through((hi - lo) / (2**bits - 1), scales), jax.lax.stop_gradient(zeros)


def dequantize_through(w: jax.Array, scales: jax.Array, zeros: jax.Array, bits: int) -> jax.Array:
    """Returns ŵ = s (clip(round(w / s) + z) - z), differentiable in w, the scales and the zeros.

    Inside the grid ∂ŵ/∂w = 1, ∂ŵ/∂s = round(w / s) - w / s and ∂ŵ/∂z = 0; where a code is clipped
    to u, ∂ŵ/∂w = 0, ∂ŵ/∂s = u - z and ∂ŵ/∂z = -s. Codes at the very ends that nothing clipped are
    inside: `jnp.clip` would halve their gradient.
    """
    exact = w / scales + zeros
    wanted = jax.lax.stop_gradient(jnp.round(w / scales) + zeros)
    codes = jnp.clip(wanted, 0, 2**bits - 1)
    inside = jnp.where(codes == wanted, exact, codes)
    return (store_through(inside, codes) - zeros) * scales
