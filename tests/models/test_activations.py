"""The written-out gradients equal autodiff's of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.models.activations import gated_silu, rms_normalize


def plain_rms(x, eps):
    wide = x.astype(jnp.float32)
    return (wide / jnp.sqrt(jnp.mean(wide**2, -1, keepdims=True) + eps)).astype(x.dtype)


def plain_gate(gate, up):
    return gate / (1 + jnp.exp(-gate)) * up


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [3 * jax.random.normal(key, (2, 5, 16)) for key in keys]


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_normalize(arrays, eps):
    x, dy, _ = arrays
    y, pull = jax.vjp(lambda x: rms_normalize(x, eps), x)
    wanted, wanted_pull = jax.vjp(lambda x: plain_rms(x, eps), x)
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    np.testing.assert_allclose(pull(dy)[0], wanted_pull(dy)[0], atol=2e-6)
    np.testing.assert_allclose(jnp.mean(rms_normalize(x, 0.0) ** 2, -1), 1.0, rtol=1e-5)


def test_rms_normalize_of_zeros_is_finite():
    zeros = jnp.zeros((1, 8))
    y, pull = jax.vjp(lambda x: rms_normalize(x, 1e-6), zeros)
    assert np.isfinite(y).all() and np.isfinite(pull(jnp.ones((1, 8)))[0]).all()


def test_gated_silu(arrays):
    gate, up, dy = arrays
    y, pull = jax.vjp(gated_silu, gate, up)
    wanted, wanted_pull = jax.vjp(plain_gate, gate, up)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    for got, want in zip(pull(dy), wanted_pull(dy), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_dtypes_are_kept(arrays):
    half = [x.astype(jnp.bfloat16) for x in arrays]
    y, pull = jax.vjp(lambda x: rms_normalize(x, 1e-6), half[0])
    assert y.dtype == pull(half[1])[0].dtype == jnp.bfloat16
    y, pull = jax.vjp(gated_silu, *half[:2])
    assert {y.dtype, *(d.dtype for d in pull(half[2]))} == {jnp.dtype(jnp.bfloat16)}
