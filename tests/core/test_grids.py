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


# ---- straight through


def surrogate(w, scales, zeros, bits, at):
    """Returns ŵ with every rounding's error and every clip's choice frozen as they are at `at`."""
    w0, s0, z0 = at
    left_over = np.round(w0 / s0) - w0 / s0
    wanted = np.round(w0 / s0) + z0
    codes = np.clip(wanted, 0, 2**bits - 1)
    moving = np.where(wanted == codes, w / scales + left_over + zeros, codes)
    return (moving - zeros) * scales


def test_the_straight_through_gradient_is_that_of_its_surrogate():
    bits, random = 2, np.random.RandomState(2)
    w = random.standard_normal((2, 8, 3))
    scales, zeros = 0.4 + 0.2 * random.rand(2, 1, 3), random.randint(1, 3, (2, 1, 3)).astype(float)
    weight = random.standard_normal(w.shape)
    at = (w, scales, zeros)

    def lower(*numbers):
        w, scales, zeros = (jnp.asarray(n, jnp.float32) for n in numbers)
        return jnp.sum(weight * grids.dequantize_through(w, scales, zeros, bits))

    found = jax.jit(jax.grad(lower, argnums=(0, 1, 2)))(*at)
    codes = np.round(w / scales) + zeros
    clipped, at_an_end = (codes < 0) | (codes > 3), (codes == 0) | (codes == 3)
    assert clipped.any() and at_an_end.any()
    np.testing.assert_allclose(found[0], np.where(clipped, 0, weight), rtol=1e-6)
    for place, came in enumerate(found):
        for index in np.ndindex(came.shape):
            low, high = (list(at), list(at))
            low[place], high[place] = at[place].copy(), at[place].copy()
            low[place][index] -= 1e-5
            high[place][index] += 1e-5
            ends = [np.sum(weight * surrogate(*n, bits, at)) for n in (low, high)]
            assert float(came[index]) == pytest.approx((ends[1] - ends[0]) / 2e-5, abs=2e-4)


def test_through_gives_the_same_numbers():
    w = draw(4, 32, 8)
    lo, hi = grids.find_range(0.8 * w, symmetric=False)
    exact = grids.fit_grid(lo, hi, 2, symmetric=False, dtype=HALF)
    scales, zeros = grids.fit_grid_through(lo, hi, 2, symmetric=False, dtype=HALF)
    np.testing.assert_array_equal(scales, exact[0].astype(jnp.float32))
    np.testing.assert_array_equal(zeros, exact[1])
    came = grids.dequantize_through(w, scales, zeros, 2)
    np.testing.assert_array_equal(came, grids.dequantize(grids.round_to_grid(w, *exact, 2), *exact))


def test_a_range_is_learned_through_its_scale_alone():
    lo, hi = jnp.full((1, 1, 1), -0.7), jnp.full((1, 1, 1), 1.3)

    def read(ends):
        scales, zeros = grids.fit_grid_through(*ends, 2, symmetric=False, dtype=HALF)
        return jnp.sum(scales + 5 * zeros)

    for came, wanted in zip(jax.grad(read)((lo, hi)), (-1 / 3, 1 / 3), strict=True):
        np.testing.assert_allclose(came, wanted, rtol=1e-6)
