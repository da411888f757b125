"""The one product of every model: everything a leaf says, packed or dense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from lqec_jax.core.linear import linear, model_shards
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank

D_IN, D_OUT = 32, 24


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def affine() -> Affine:
    words = np.random.RandomState(0).randint(0, 2**32, (3, D_OUT), dtype=np.uint32)
    return Affine(words, 0.1 + np.abs(draw(2, D_OUT)), None, 3, 16, D_IN)


class Shear:
    """A transform that is not its own transpose: x ↦ x M."""

    def __init__(self, matrix):
        self.matrix = matrix

    def apply(self, x):
        return x @ self.matrix

    def apply_transpose(self, x):
        return x @ self.matrix.T


CORRECTIONS = tuple(LowRank(draw(D_IN, r, seed=r), draw(r, D_OUT, seed=r)) for r in (1, 3))
LEAVES = {
    "bare": CompressedLinear(affine()),
    "dense base": CompressedLinear(Dense(draw(D_IN, D_OUT))),
    "two corrections": CompressedLinear(affine(), CORRECTIONS),
    "scales on both sides": CompressedLinear(
        affine(), CORRECTIONS, ChannelScale(1 + draw(D_IN) ** 2), ChannelScale(1 + draw(D_OUT) ** 2)
    ),
    "transforms that are not symmetric": CompressedLinear(
        affine(), CORRECTIONS, Shear(draw(D_IN, D_IN)), Shear(draw(D_OUT, D_OUT, seed=2))
    ),
}


@pytest.mark.parametrize("name", LEAVES)
def test_dense_is_the_image_of_the_identity(name):
    leaf, x = LEAVES[name], draw(2, 3, D_IN, seed=7)
    image, y, dense = jax.jit(
        lambda x: (linear(jnp.eye(D_IN), leaf), linear(x, leaf), leaf.dense())
    )(x)
    scale = np.abs(dense).max()
    np.testing.assert_allclose(image, dense, atol=1e-5 * scale)
    assert y.shape == (2, 3, D_OUT)
    np.testing.assert_allclose(y, x @ np.asarray(dense), atol=1e-4 * scale)


def test_corrections_see_the_untransformed_input():
    transform = ChannelScale(2 * np.ones(D_IN, np.float32))
    leaf = CompressedLinear(Dense(np.zeros((D_IN, D_OUT), np.float32)), CORRECTIONS[:1], transform)
    x = draw(4, D_IN)
    np.testing.assert_allclose(linear(x, leaf), x @ CORRECTIONS[0].a @ CORRECTIONS[0].b, atol=1e-4)


def test_a_plain_array_is_a_weight():
    w, x = draw(D_IN, D_OUT), draw(5, D_IN)
    np.testing.assert_allclose(linear(jnp.asarray(x), jnp.asarray(w)), x @ w, atol=1e-4)
    narrow = linear(jnp.asarray(x, jnp.bfloat16), jnp.asarray(w))
    assert narrow.dtype == jnp.bfloat16


def test_shards_are_the_model_axis_of_the_mesh_in_use():
    assert model_shards() == 1
    types = (AxisType.Auto, AxisType.Auto)
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4), ("data", "model"), axis_types=types)):
        assert model_shards() == 4
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), axis_types=types[:1])):
        assert model_shards() == 1
