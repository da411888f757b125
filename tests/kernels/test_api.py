"""One product for every format: what it adds, and what it refuses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_kernels
from lqec_kernels.api import IMPLEMENTATIONS, packed_matmul
from lqec_kernels.formats import Affine, LowRank


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def base() -> Affine:
    words = np.random.RandomState(0).randint(0, 2**32, (6, 7), dtype=np.uint32)
    return Affine(words, 1 + np.abs(draw(3, 7)), None, 3, 16, d_in=48)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_adds_every_correction(base, implementation):
    x = draw(2, 5, 48)
    corrections = [LowRank(draw(48, r, seed=r), draw(r, 7, seed=9)) for r in (1, 4)]
    multiply = jax.jit(partial(packed_matmul, implementation=implementation))
    y = multiply(x, base, corrections=corrections)
    dense = np.asarray(base.dense()) + sum(c.a @ c.b for c in corrections)
    assert y.shape == (2, 5, 7)
    np.testing.assert_allclose(y, x @ dense, atol=1e-3)
    narrow = jax.eval_shape(multiply, x.astype(jnp.bfloat16), base, corrections=corrections)
    assert narrow.dtype == jnp.bfloat16


@pytest.mark.parametrize("tokens", [1, 200])
def test_a_pooled_correction_is_added_beside_one_that_is_not(base, tokens):
    x, g = draw(tokens, 48), draw(tokens, 7, seed=3)
    pooled, plain = LowRank(draw(3, 2), draw(2, 7, seed=9), 16), LowRank(draw(48, 1), draw(1, 7))

    @jax.jit
    def run(x, corrections):
        def answer(x, corrections):
            return jnp.sum(g * packed_matmul(x, base, corrections=corrections))

        y = packed_matmul(x, base, corrections=corrections)
        return y, jax.grad(answer, argnums=(0, 1))(x, corrections)

    y, (dx, (d_pooled, d_plain)) = run(x, (pooled, plain))
    expanded = np.repeat(pooled.a, 16, axis=0) / 16
    dense = np.asarray(base.dense()) + expanded @ pooled.b + plain.a @ plain.b
    np.testing.assert_allclose(y, x @ dense, atol=1e-3)
    np.testing.assert_allclose(dx, g @ dense.T, atol=1e-3)
    d_expanded = x.T @ g @ pooled.b.T
    np.testing.assert_allclose(d_pooled.a, d_expanded.reshape(3, 16, 2).mean(1), atol=1e-3)
    np.testing.assert_allclose(d_pooled.b, expanded.T @ x.T @ g, atol=1e-3)
    np.testing.assert_allclose(d_plain.a, x.T @ g @ plain.b.T, atol=1e-3)
    np.testing.assert_allclose(d_plain.b, plain.a.T @ x.T @ g, atol=1e-3)


def test_refuses_an_unknown_implementation(base):
    with pytest.raises(ValueError, match=r"implementation='cuda' is not one of auto, xla"):
        packed_matmul(draw(1, 48), base, implementation="cuda")


def test_refuses_another_width_and_says_both_shapes(base):
    with pytest.raises(ValueError, match=r"x has width 47, the weight \[48, 7\]"):
        packed_matmul(draw(1, 47), base)


def test_the_package_offers_the_operators_and_the_product():
    for name in lqec_kernels.__all__:
        assert getattr(lqec_kernels, name).__module__.startswith("lqec_kernels.")
