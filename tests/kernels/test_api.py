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


def test_refuses_an_unknown_implementation(base):
    with pytest.raises(ValueError, match=r"implementation='cuda' is not one of auto, xla"):
        packed_matmul(draw(1, 48), base, implementation="cuda")


def test_refuses_another_width_and_says_both_shapes(base):
    with pytest.raises(ValueError, match=r"x has width 47, the weight \[48, 7\]"):
        packed_matmul(draw(1, 47), base)


def test_the_package_offers_the_operators_and_the_product():
    for name in lqec_kernels.__all__:
        assert getattr(lqec_kernels, name).__module__.startswith("lqec_kernels.")
