"""The sweep against the loss that it lowers and against GPTQ as it is usually written."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.damping import factor_reverse
from lqec_jax.core.ldlq import block_of, ldlq

D_IN, D_OUT, STEP = 160, 24, 0.7
RNG = np.random.default_rng(0)
W = RNG.standard_normal((D_IN, D_OUT))
X = RNG.standard_normal((600, D_IN)) @ (np.eye(D_IN) + 0.2 * RNG.standard_normal((D_IN, D_IN)))
GRAM = X.T @ X / len(X)


def round_rows(target, number):
    """One step size for all: targets, roundings and the error that is left to each."""
    w_hat = STEP * jnp.round(target / STEP)
    return w_hat, (w_hat, target)


@partial(jax.jit, static_argnums=2)
def sweep(w, gram, block=1):
    """Returns (ŵ, targets), rows along the first axis, with the factor."""
    lower, _ = factor_reverse(gram, 0.01)
    outputs = ldlq(w, lower, round_rows, block)
    return jax.tree.map(lambda out: out.reshape(w.shape), outputs), lower


def damp(gram: np.ndarray) -> np.ndarray:
    return gram / np.diagonal(gram).mean() + 0.01 * np.eye(len(gram))


def sweep_right_looking(w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """GPTQ as published: every rounding's error is pushed into all rows after it."""
    inverse = np.linalg.inv(damp(gram))
    r = np.linalg.cholesky(inverse).T  # H^-1 = Rᵀ R
    w, w_hat = w.copy(), np.empty_like(w)
    for i in range(len(w)):
        w_hat[i] = STEP * np.round(w[i] / STEP)
        w[i:] -= np.outer(r[i, i:], (w[i] - w_hat[i]) / r[i, i])
    return w_hat


def loss(w_hat, gram=GRAM) -> float:
    error = W - np.asarray(w_hat, np.float64)
    return np.sum(error * (damp(gram) @ error))


@pytest.fixture(scope="module")
def wide():
    with jax.enable_x64(True):
        (w_hat, target), lower = sweep(jnp.asarray(W), jnp.asarray(GRAM))
        return tuple(np.asarray(a) for a in (w_hat, target, lower))


def test_what_is_left_to_the_rows_is_the_loss(wide):
    w_hat, target, lower = wide
    assert w_hat.dtype == np.float64
    left = np.diagonal(lower)[:, None] * (target - w_hat)
    assert 0.5 * np.sum(left**2) == pytest.approx(0.5 * loss(w_hat), rel=1e-10)


def test_codes_are_those_of_the_right_looking_form(wide):
    np.testing.assert_array_equal(wide[0], sweep_right_looking(W, GRAM))


def test_it_is_worth_the_trouble(wide):
    assert loss(wide[0]) < 0.6 * loss(STEP * np.round(W / STEP))


def test_float32_gives_the_same_codes(wide):
    w_hat, _ = sweep(jnp.asarray(W, jnp.float32), jnp.asarray(GRAM, jnp.float32))[0]
    assert w_hat.dtype == jnp.float32
    same = np.abs(np.asarray(w_hat) - wide[0]) < 0.1 * STEP
    assert same.mean() >= 0.999
    assert loss(w_hat) == pytest.approx(loss(wide[0]), rel=1e-3)


@pytest.mark.parametrize("block", [8, 32])
def test_targets_are_the_best_that_later_rows_can_be(block):
    """A block's target is where the loss of all rows from it on is least, given those before."""
    with jax.enable_x64(True):
        (w_hat, target), lower = sweep(jnp.asarray(W), jnp.asarray(GRAM), block)
        own = block_of(lower, jnp.int32(1), 160 // 2)
    target, w_hat, h = np.asarray(target), np.asarray(w_hat), damp(GRAM)
    np.testing.assert_array_equal(own, lower[80:, 80:])
    for first in range(0, D_IN, block):
        done, rest = slice(0, first), slice(first, D_IN)
        wanted = W[rest] + np.linalg.solve(h[rest, rest], h[rest, done] @ (W - w_hat)[done])
        np.testing.assert_allclose(target[first : first + block], wanted[:block], atol=1e-11)


def test_independent_inputs_leave_the_targets_alone():
    w = jnp.asarray(W, jnp.float32)
    energies = jnp.asarray(np.exp(RNG.standard_normal(D_IN)), jnp.float32)
    w_hat, target = sweep(w, jnp.diag(energies))[0]
    np.testing.assert_array_equal(target, w)
    np.testing.assert_array_equal(w_hat, np.float32(STEP) * np.round(w / np.float32(STEP)))


@pytest.mark.parametrize(("d_in", "block"), [(1, 1), (131, 1), (144, 48), (320, 2)])
def test_any_size_is_swept_alike(d_in, block, monkeypatch):
    monkeypatch.setattr("lqec_jax.core.ldlq.LEAST_BACK", 16)
    monkeypatch.setattr("lqec_jax.core.ldlq.LOOK_BACK", 64)
    rng = np.random.default_rng(d_in)
    w = rng.standard_normal((d_in, 3)).astype(np.float32)
    x = rng.standard_normal((3 * d_in, d_in)).astype(np.float32)
    gram = x.T @ x + 0.05 * len(x)
    lower, _ = jax.jit(factor_reverse, static_argnums=1)(gram, 0.01)

    def quantize(target, number):
        # Something that depends on the place and cannot be mistaken for rounding.
        w_hat = 0.5 * target + 0.01 * number
        return w_hat, w_hat

    w_hat = jax.jit(lambda w, lower: ldlq(w, lower, quantize, block))(w, lower)
    w_hat, lower = np.asarray(w_hat, np.float64).reshape(w.shape), np.asarray(lower, np.float64)
    wanted = np.empty_like(w_hat)
    for first in range(0, d_in, block):
        rows, done = slice(first, first + block), slice(0, first)
        looked = lower[rows, done] @ (w[done] - wanted[done])
        target = w[rows] + np.linalg.solve(lower[rows, rows], looked)
        wanted[rows] = 0.5 * target + 0.01 * (first // block)
    np.testing.assert_allclose(w_hat, wanted, atol=2e-3)
