"""Low-rank factors in closed form: as good as the theorem says."""

import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.closed_form import balance, truncate


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(48, 20), (20, 48)])
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_error_is_the_energy_of_the_tail(shape, rank):
    error = draw(*shape)
    a, b = (np.asarray(factor, np.float64) for factor in truncate(jnp.asarray(error), rank))
    assert a.shape == (shape[0], rank) and b.shape == (rank, shape[1])
    spectrum = np.linalg.svd(error.astype(np.float64), compute_uv=False)
    left = np.sum((error - a @ b) ** 2)
    tail = np.sum(spectrum[rank:] ** 2)
    assert abs(left - tail) <= 1e-5 * np.sum(spectrum**2)
    np.testing.assert_allclose(np.linalg.svd(a @ b)[1][:rank], spectrum[:rank], rtol=1e-5)


def test_both_factors_carry_half_of_every_component():
    a, b = truncate(jnp.asarray(draw(30, 40)), 6)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-3)
    spectrum = np.linalg.svd(draw(30, 40), compute_uv=False)[:6]
    np.testing.assert_allclose(np.linalg.norm(a, axis=0) ** 2, spectrum, rtol=1e-5)


def test_half_precision_is_factored_in_float32():
    a, b = truncate(jnp.asarray(draw(8, 6), jnp.bfloat16), 6)
    assert a.dtype == b.dtype == jnp.float32
    wanted = np.asarray(jnp.asarray(draw(8, 6), jnp.bfloat16), np.float32)
    np.testing.assert_allclose(a @ b, wanted, atol=1e-5)


def test_nothing_is_factored_into_zeros():
    a, b = truncate(jnp.zeros((8, 6)), 3)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    np.testing.assert_array_equal(a @ b, np.zeros((8, 6)))


def test_balance_keeps_the_product_and_evens_the_halves():
    a, b = 1e3 * draw(2, 10, 4), 1e-4 * draw(2, 4, 7, seed=1)
    even_a, even_b = balance(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(even_a @ even_b, a @ b, atol=1e-5)
    norms = np.linalg.norm(even_a, axis=-2), np.linalg.norm(even_b, axis=-1)
    np.testing.assert_allclose(*norms, rtol=1e-5)
    np.testing.assert_allclose(
        norms[0] ** 2, np.linalg.norm(a, axis=-2) * np.linalg.norm(b, axis=-1), rtol=1e-4
    )


def test_balance_leaves_a_component_with_a_zero_half_alone():
    a, b = draw(5, 3), draw(3, 4)
    a[:, 0], b[1] = 0, 0
    even_a, even_b = balance(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(even_a[:, :2], a[:, :2])
    np.testing.assert_array_equal(even_b[:2], b[:2])
    assert np.isfinite(even_a).all() and np.isfinite(even_b).all()
