"""Uniform grids: ranges, rounding, and the search for a better clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import grids

HALF = jnp.float16


def grouped(*columns: list[float]) -> jnp.ndarray:
    """Returns one group a column, [1, group_size, columns]."""
    return jnp.asarray(np.array(columns, np.float32).T[None])


def draw(groups: int, size: int, d_out: int, seed: int = 0) -> jnp.ndarray:
    shape = (groups, size, d_out)
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def test_groups_are_runs_of_inputs():
    w = np.arange(24.0).reshape(6, 4)
    groups = grids.group_rows(jnp.asarray(w), 3)
    assert groups.shape == (2, 3, 4)
    np.testing.assert_array_equal(groups[1], w[3:])


def test_ranges_hold_zero_and_are_never_empty():
    w = grouped([1, 2, 3], [-3, -2, -1], [-1, 0, 2], [0, 0, 0])
    lo, hi = grids.find_range(w, symmetric=False)
    np.testing.assert_array_equal(lo.ravel(), [0, -3, -1, -1])
    np.testing.assert_array_equal(hi.ravel(), [3, 0, 2, 1])
    lo, hi = grids.find_range(w, symmetric=True)
    np.testing.assert_array_equal(hi.ravel(), [3, 3, 2, 1])
    np.testing.assert_array_equal(lo, -hi)


def test_an_asymmetric_grid_covers_its_range_with_an_integer_zero():
    w = draw(4, 32, 8)
    lo, hi = grids.find_range(w, symmetric=False)
    scales, zeros = grids.fit_grid(lo, hi, 3, symmetric=False, dtype=jnp.float32)
    np.testing.assert_allclose(scales, (hi - lo) / 7, rtol=1e-6)
    np.testing.assert_array_equal(zeros, np.round(-lo / scales))
    assert zeros.min() >= 0 and zeros.max() <= 7
    codes = grids.round_to_grid(w, scales, zeros, 3)
    assert codes.min() >= 0 and codes.max() <= 7
    error = jnp.abs(grids.dequantize(codes, scales, zeros) - w)
    # An integer zero shifts the grid by at most half a step, so the ends lose at most a half more.
    assert (error <= scales * (1 + 1e-5)).all()
    inside = (codes > 0) & (codes < 7)
    assert (jnp.where(inside, error, 0) <= scales * (0.5 + 1e-5)).all()


def test_a_symmetric_grid_is_two_absmax_wide():
    w = grouped([-1.0, 0.25, 3.0], [0.5, 1.5, 2.0])
    scales, zeros = grids.fit_grid(
        *grids.find_range(w, symmetric=True), 2, symmetric=True, dtype=jnp.float32
    )
    np.testing.assert_allclose(scales.ravel(), [2.0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(zeros, 2.0)


def test_rounding_is_half_to_even():
    w = grouped([-1.5, -0.5, 0.5, 1.5, 2.5])
    codes = grids.round_to_grid(w, jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), 4.0), 3)
    np.testing.assert_array_equal(codes.ravel(), [2, 4, 4, 6, 6])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 65504.0, 1e30])
def test_scales_that_float16_cannot_hold_stay_finite(size, symmetric):
    w = grouped([-size, 0.5 * size, size], [0, 0, size])
    lo, hi = grids.find_range(w, symmetric=symmetric)
    scales, zeros = grids.fit_grid(lo, hi, 1, symmetric=symmetric, dtype=HALF)
    codes = grids.round_to_grid(w, scales, zeros, 1)
    assert scales.dtype == HALF
    assert np.isfinite(scales).all() and (scales > 0).all()
    assert np.isfinite(grids.dequantize(codes, scales, zeros)).all()


def error_of(w, scales, zeros, bits, weight, power):
    codes = grids.round_to_grid(w, scales, zeros, bits)
    error = jnp.abs(grids.dequantize(codes, scales, zeros) - w)
    return jnp.sum(weight * error**power, axis=1, keepdims=True)


def search_by_numpy(w, bits, weight, symmetric, power):
    """Tries every shrink on its own and returns the least error of each group."""
    lo, hi = grids.find_range(w, symmetric=symmetric)
    errors = []
    for i in range(80):
        p = 1 - i / 100
        scales, zeros = grids.fit_grid(p * lo, p * hi, bits, symmetric=symmetric, dtype=HALF)
        errors.append(np.asarray(error_of(w, scales, zeros, bits, weight, power)))
    return np.stack(errors)


@pytest.mark.parametrize(("symmetric", "power"), [(False, 2.4), (True, 2.0)])
def test_the_search_finds_the_best_of_eighty_shrinks(symmetric, power):
    w = draw(2, 16, 3)
    weight = jnp.asarray(np.random.RandomState(1).rand(2, 16, 1), jnp.float32)
    scales, zeros = grids.search_clip(w, 2, weight, symmetric=symmetric, dtype=HALF, power=power)
    assert scales.dtype == HALF
    came = error_of(w, scales, zeros, 2, weight, power)
    tried = search_by_numpy(w, 2, weight, symmetric, power)
    np.testing.assert_allclose(came, tried.min(axis=0), rtol=1e-4)
    assert (tried.argmin(axis=0) > 0).any()  # somewhere a smaller range was better


def test_a_group_that_counts_for_nothing_keeps_its_range():
    w = draw(1, 16, 3)
    search = jax.jit(
        lambda w: grids.search_clip(
            w, 2, jnp.zeros((1, 16, 1)), symmetric=False, dtype=HALF, power=2.0
        )
    )
    plain = grids.fit_grid(*grids.find_range(w, symmetric=False), 2, symmetric=False, dtype=HALF)
    for came, wanted in zip(search(w), plain, strict=True):
        np.testing.assert_array_equal(came, wanted)
