"""The sweep that GPTQ, SparseGPT and lattice quantizers share: round, and let the rest make up.

For y = x w and the gram H = E[x xᵀ] = Lᵀ L, L lower triangular, the output error of Δ = w - ŵ is

    tr(Δᵀ H Δ) = ||L Δ||²   with   (L Δ)_k = L_kk (t_k - ŵ_k),
    t_k = w_k + L_kk^{-1} Σ_{j<k} L_kj (w_j - ŵ_j),

k running over blocks of input channels. So a sweep that rounds the targets t_k in order lets every
block make up for the errors of those before it, and what is left to block k is an error of its own
under the gram L_kkᵀ L_kk, to which the same holds: blocks are swept by sweeps.

This is LDLQ (Chee et al. 2023, arXiv:2307.13304, which shows it to be GPTQ). Looking back at errors
already made it needs no inverse of the gram and no second factor, and does one product a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Rows that are swept as one, outermost first: few enough to lie in a cache while they are, and
# enough for the product that looks back to be a matrix product.
PANELS = (128, 16)
# Rows that a product looks back at in one go, so that it need not look at all of them; where no
# divisor of d_in lies between these, it does.
LEAST_BACK, LOOK_BACK = 128, 1024


def ldlq(w: jax.Array, lower: jax.Array, quantize_block: Callable, block: int) -> Any:
    """Sweeps a weight's blocks of rows from the first to the last.

    Args:
      w: floating [d_in, d_out].
      lower: the factor L of the gram, [d_in, d_in]; see `core.damping.factor_reverse`.
      quantize_block: (target [block, d_out], number of the block) -> (ŵ_k [block, d_out], outputs);
        traced once.
      block: rows that are rounded together, a divisor of d_in.
    Returns:
      The outputs of all blocks, stacked: [d_in / block, ...] each.
    Cost: d_in² · d_out multiply-adds; holds w and the errors so far.  jit: yes; vmap: yes.
    Example:
      >>> rounded = ldlq(w, lower, lambda target, k: (jnp.round(target),) * 2, block=8)
    """
    panel = _choose_panel(w.shape[0], block)
    if panel == block:
        return _sweep(w, lower, quantize_block, block)

    def quantize_panel(target: jax.Array, number: jax.Array):
        def quantize(inner_target, inner_number):
            w_hat, outputs = quantize_block(inner_target, first + inner_number)
            return w_hat, (w_hat, outputs)

        first = number * (panel // block)
        w_hat, outputs = ldlq(target, block_of(lower, number, panel), quantize, block)
        return w_hat.reshape(target.shape), outputs  # [panel, d_out]

    outputs = _sweep(w, lower, quantize_panel, panel)
    return jax.tree.map(lambda out: out.reshape(-1, *out.shape[2:]), outputs)  # [blocks, ...]


def block_of(lower: jax.Array, number: jax.Array, block: int) -> jax.Array:
    """Returns a block on the factor's diagonal, the factor of what is left to that block."""
    first = number * block
    return lax.dynamic_slice(lower, (first, first), (block, block))


def _choose_panel(d_in: int, block: int) -> int:
    """Returns how many rows are swept as one: a multiple of block that divides d_in."""
    for largest in PANELS:
        fitting = [n for n in range(block, largest + 1, block) if d_in % n == 0 and n < d_in]
        if d_in > largest and fitting and fitting[-1] > block:
            return fitting[-1]
    return block


def _sweep(w: jax.Array, lower: jax.Array, quantize_block: Callable, block: int) -> Any:
    def step(errors: jax.Array, number: jax.Array):
        first = number * block
        rows = lax.dynamic_slice_in_dim(w, first, block)  # [block, d_out]
        target = rows + _make_up(lower, errors, number, block)
        w_hat, outputs = quantize_block(target, number)
        return lax.dynamic_update_slice_in_dim(errors, rows - w_hat, first, 0), outputs

    # Zeros that wait for the factor: others XLA would make, and hold, while there is none.
    none = jnp.broadcast_to(0 * lower[0, 0].astype(w.dtype), w.shape)
    return lax.scan(step, none, jnp.arange(w.shape[0] // block))[1]


def _make_up(lower: jax.Array, errors: jax.Array, number: jax.Array, block: int) -> jax.Array:
    """Returns L_kk^{-1} Σ_{j<k} L_kj errors_j, [block, d_out]."""
    first = number * block
    rows = lax.dynamic_slice_in_dim(lower, first, block)  # [block, d_in]
    looked = _look_back(rows, errors, first)
    own = lax.dynamic_slice_in_dim(rows, first, block, axis=1)  # [block, block]
    if block == 1:
        return looked / own
    # From the right and transposed: LAPACK's columns are our rows, and nothing is copied.
    return lax.linalg.triangular_solve(own.T, looked.T, left_side=False, lower=False).T


def _look_back(rows: jax.Array, errors: jax.Array, first: jax.Array) -> jax.Array:
    """Returns Σ_j rows_j errors_j, [block, d_out]; errors are zero from row `first` on."""
    block, d_in = rows.shape
    product = partial(jnp.matmul, precision="highest")
    chunk = max(n for n in range(1, min(d_in, LOOK_BACK) + 1) if d_in % n == 0)
    if chunk == d_in or chunk < LEAST_BACK:
        return product(rows, errors)

    def add(number, total):
        start = number * chunk
        part = lax.dynamic_slice_in_dim(rows, start, chunk, axis=1)
        return total + product(part, lax.dynamic_slice_in_dim(errors, start, chunk))

    nothing = jnp.zeros((block, errors.shape[1]), errors.dtype)
    return lax.fori_loop(0, -(-first // chunk), add, nothing)
