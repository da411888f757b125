"""Trained scales and zeros against OpenGVLab/EfficientQAT@78fd3fb, on one weight in groups of 32.

What `block_ap` trains are that quantizer's numbers in other units: a scale as a fraction of its
first value, a weight in steps of its first grid. So gradients are compared where they are one, of
`core.grids`, and its start where it is one, of the grid.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import grids
from tests.golden.authors.problems import GROUP, read_mask, spread

CASES = [(bits, start) for bits in (2, 3, 4) for start in ("minmax", "moved")]


@pytest.fixture(scope="module")
def stored(golden):
    return golden("efficientqat_quantizer")


def read(w: jax.Array, scales: jax.Array, zeros: jax.Array, bits: int) -> jax.Array:
    """Returns ŵ [d_in, d_out] of zeros that are whole numbers of the grid when they are read."""
    whole = grids.store_through(zeros, jnp.clip(jnp.round(zeros), 0, 2**bits - 1))
    grouped = grids.group_rows(w, w.shape[0] // scales.shape[0])
    return grids.dequantize_through(grouped, scales[:, None], whole[:, None], bits).reshape(w.shape)


def gradients(w, scales, zeros, upstream, bits: int) -> tuple:
    """Returns (ŵ, ∂/∂w, ∂/∂scales, ∂/∂zeros)."""
    return jax.device_get(compiled(w, scales, zeros, upstream, bits))


@partial(jax.jit, static_argnames="bits")
def compiled(w, scales, zeros, upstream, bits: int) -> tuple:
    w_hat, pull = jax.vjp(lambda *numbers: read(*numbers, bits), w, scales, zeros)
    return w_hat, *pull(upstream)


@pytest.mark.parametrize(("bits", "start"), CASES)
def test_codes_and_gradients_are_theirs(linear, stored, bits, start):
    key, upstream = f"w{bits}_{start}", stored["upstream"].astype(np.float32)
    scales, zeros = stored[f"{key}.scale"], stored[f"{key}.zero"]
    whole = np.clip(np.round(zeros), 0, 2**bits - 1)
    w_hat, of_w, of_scales, of_zeros = gradients(linear.w, scales, zeros, upstream, bits)
    theirs = spread(scales) * (stored[f"{key}.codes"] - spread(whole))
    # Two codes at 4 bits are half way between two, within round-off.
    ties = np.abs(w_hat - theirs) > 1e-5
    assert ties.sum() <= 2
    clear = ~ties.reshape(-1, GROUP, ties.shape[1]).any(axis=1)
    for came, name in ((of_scales, "grad_scale"), (of_zeros, "grad_zero")):
        wanted = stored[f"{key}.{name}.f64"]
        np.testing.assert_allclose(
            came[clear], wanted[clear], atol=2e-6 * max(np.abs(wanted).max(), 1e-3)
        )
    through = np.where(read_mask(stored[f"{key}.grad_w_mask"]), upstream, 0)
    np.testing.assert_allclose(of_w, through, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_begins_where_theirs_does(linear, stored, bits):
    lo, hi = grids.find_range(grids.group_rows(jnp.asarray(linear.w), GROUP), symmetric=False)
    scales, zeros = grids.fit_grid(lo, hi, bits, symmetric=False, dtype=jnp.float32)
    np.testing.assert_allclose(scales[:, 0], stored[f"w{bits}_minmax.scale"], rtol=1e-6)
    np.testing.assert_array_equal(zeros[:, 0], stored[f"w{bits}_minmax.zero"])
