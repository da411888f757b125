"""Transforms: orthogonal where they say so, their own transposes' inverses, stacks and bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.transforms import ChannelScale, Hadamard

SIZE = 88


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@jax.jit
def both_ways(transform, x):
    return transform.apply(x), transform.apply_transpose(x)


def matrix_of(transform) -> np.ndarray:
    """Returns M of x ↦ x M."""
    return np.asarray(both_ways(transform, np.eye(SIZE, dtype=np.float32))[0])


@pytest.mark.parametrize("block", [SIZE, 44, 8, 1])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_rotation_is_orthogonal(block, inverse):
    rotation = Hadamard.draw(jax.random.key(0), SIZE, block, inverse=inverse)
    m = matrix_of(rotation)
    np.testing.assert_allclose(m @ m.T, np.eye(SIZE), atol=1e-6)
    # Mixes whole blocks evenly and nothing beyond them.
    blocks = np.kron(np.eye(SIZE // block), np.ones((block, block)))
    np.testing.assert_allclose(np.abs(m), blocks / np.sqrt(block), atol=1e-6)
    x = draw(2, 3, SIZE)
    there, back = both_ways(rotation, x)
    np.testing.assert_allclose(there, x @ m, atol=1e-5)
    np.testing.assert_allclose(back, x @ m.T, atol=1e-5)
    assert rotation.stored_bits() == 3 * 32


def test_signs_meet_the_input_first_or_in_the_inverse_last():
    # A row of one sign pattern becomes a single spike where the signs undo it: S H against H S.
    rotation = Hadamard.draw(jax.random.key(1), SIZE, SIZE)
    inverse = Hadamard(rotation.signs, SIZE, SIZE, True)
    np.testing.assert_allclose(matrix_of(inverse), matrix_of(rotation).T, atol=1e-7)
    signs = np.sign(matrix_of(rotation)[:, 0] * matrix_of(Hadamard(
        jnp.full_like(rotation.signs, 0xFFFFFFFF), SIZE, SIZE))[:, 0])  # fmt: skip
    words = np.packbits(signs > 0, bitorder="little")
    assert words.tobytes() == np.asarray(rotation.signs).tobytes()[: len(words)]
    assert 20 < (signs > 0).sum() < 68


def test_keys_draw_different_signs_and_one_key_the_same():
    first, again, other = (Hadamard.draw(jax.random.key(k), SIZE, 8).signs for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()
    assert first.dtype == jnp.uint32 and first.shape == (3,)


def test_channel_scale_is_its_own_transpose():
    transform = ChannelScale(jnp.arange(1.0, SIZE + 1))
    x = draw(2, SIZE)
    for y in both_ways(transform, x):
        np.testing.assert_allclose(y, x * np.arange(1, SIZE + 1), rtol=1e-6)
    assert transform.stored_bits() == 32 * SIZE


@pytest.mark.parametrize("kind", ["scale", "rotation"])
def test_a_stack_of_weights_has_its_own_transforms(kind):
    def make(seed: int) -> CompressedLinear:
        def transform(size):
            if kind == "scale":
                return ChannelScale(jnp.asarray(draw(size, seed=seed)))
            return Hadamard.draw(jax.random.key(seed), size, 8)

        w = jnp.asarray(draw(SIZE, 16, seed=seed))
        return CompressedLinear(Dense(w), (), transform(SIZE), transform(16))

    leaves = [make(seed) for seed in range(3)]
    stack = jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)
    dense = jax.jit(lambda leaf: leaf.dense())
    np.testing.assert_allclose(dense(stack), [dense(leaf) for leaf in leaves], atol=1e-6)
    assert stack.bits_per_weight == leaves[0].bits_per_weight
