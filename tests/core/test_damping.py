"""A factor exists for every gram, and the report says what it took."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.damping import describe, factor_lower, factor_reverse, ladder

N = 24
RNG = np.random.default_rng(0)
TALL = RNG.standard_normal((200, N)) @ RNG.standard_normal((N, N))


def gram_of(x) -> np.ndarray:
    return (x.T @ x / len(x)).astype(np.float32)


GOOD = gram_of(TALL)
MEAN = np.diagonal(GOOD).mean()
lower = jax.jit(factor_lower, static_argnums=1)
reverse = jax.jit(factor_reverse, static_argnums=1)


def damped(gram: np.ndarray, damp: float) -> np.ndarray:
    return gram / np.diagonal(gram).mean() + damp * np.eye(len(gram))


def test_the_lower_factor_is_of_the_damped_gram():
    factor, damping = lower(GOOD, 0.01)
    np.testing.assert_allclose(factor @ factor.T, damped(GOOD, 0.01), atol=2e-6)
    np.testing.assert_array_equal(factor, np.tril(factor))
    assert (damping.rung, damping.dead) == (0, 0)
    assert damping.mean == pytest.approx(MEAN, rel=1e-6)
    assert damping.damp == np.float32(0.01)
    assert describe(jax.device_get(damping)) == ()


def test_the_reverse_factor_is_of_the_same():
    factor, _ = reverse(GOOD, 0.01)
    np.testing.assert_allclose(factor.T @ factor, damped(GOOD, 0.01), atol=2e-6)
    np.testing.assert_array_equal(factor, np.tril(factor))
    assert (np.diagonal(factor) > 0).all()


def test_the_ladder_ends_at_one():
    assert ladder(0.01) == pytest.approx((0.01, 0.1, 1.0))
    assert ladder(0.05) == pytest.approx((0.05, 0.5))
    assert ladder(1.0) == (1.0,)


def indefinite(least: float) -> np.ndarray:
    """Returns a matrix whose mean diagonal is 1 and whose least eigenvalue is that."""
    q, _ = np.linalg.qr(RNG.standard_normal((N, N)))
    values = np.linspace(least, 2 - least, N)
    return (q * values @ q.T).astype(np.float32)


@pytest.mark.parametrize(
    ("least", "rung", "said"),
    [
        (-0.005, 0, ()),
        (-0.05, 1, ("gram: damped by 0.1, rung 1",)),
        (-0.5, 2, ("gram: damped by 1, rung 2",)),
        (-1.5, 3, ("gram: forgotten at rung 3, no damping made it positive",)),
    ],
)
def test_an_indefinite_gram_climbs_as_far_as_it_must(least, rung, said):
    gram = indefinite(least)
    factor, damping = reverse(gram, 0.01)
    assert np.isfinite(factor).all() and damping.rung == rung
    wanted = damped(gram, ladder(0.01)[rung]) if rung < 3 else np.eye(N)
    np.testing.assert_allclose(factor.T @ factor, wanted, atol=5e-6)
    assert describe(jax.device_get(damping)) == said


def test_too_few_tokens_are_enough_with_damping():
    gram = gram_of(TALL[:3])
    factor, damping = reverse(gram, 0.01)
    assert damping.rung == 0
    np.testing.assert_allclose(factor.T @ factor, damped(gram, 0.01), atol=5e-6)


def test_dead_channels_are_cut_out():
    x = TALL * (np.arange(N) % 4 != 1)
    factor, damping = reverse(gram_of(x), 0.01)
    live = np.arange(N) % 4 != 1
    product = np.asarray(factor.T @ factor)
    np.testing.assert_allclose(product[np.ix_(live, live)], damped(gram_of(TALL[:, live]), 0.01),
                               atol=2e-6)  # fmt: skip
    np.testing.assert_array_equal(product[~live], np.eye(N)[~live])
    assert damping.dead == 6
    assert describe(jax.device_get(damping)) == ("gram: 6 of the channels are dead",)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -1.0])
def test_a_gram_that_says_nothing_is_the_identity(value):
    factor, damping = reverse(np.full((N, N), value, np.float32), 0.01)
    np.testing.assert_array_equal(factor, np.eye(N))
    assert damping.dead == N


@pytest.mark.parametrize("factor", [1e-30, 1e30, 3e37 / MEAN])
def test_units_do_not_matter(factor):
    wanted = reverse(GOOD, 0.01)[0]
    came, damping = reverse(GOOD * np.float32(factor), 0.01)
    np.testing.assert_allclose(came, wanted, atol=1e-5)
    assert damping.rung == 0


def test_a_lopsided_gram_is_made_symmetric():
    lopsided = GOOD + 0.1 * MEAN * np.triu(np.ones((N, N), np.float32), 1)
    symmetric = 0.5 * (lopsided + lopsided.T)
    np.testing.assert_allclose(reverse(lopsided, 0.1)[0], reverse(symmetric, 0.1)[0], atol=1e-5)


def test_it_is_as_precise_as_its_gram():
    with jax.enable_x64(True):
        gram = jnp.asarray(TALL.T @ TALL / len(TALL))
        factor = factor_reverse(gram, 0.01)[0]
        assert factor.dtype == jnp.float64
        np.testing.assert_allclose(factor.T @ factor, damped(np.asarray(gram), 0.01), atol=1e-14)
