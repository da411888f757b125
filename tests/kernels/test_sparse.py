"""Zeros that are stored as a mask, or not at all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_kernels import packed_matmul
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from lqec_kernels.sparse import Masked, Sparse24

D_IN, D_OUT, GROUP, BITS = 72, 6, 24, 3
RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 2**BITS, (D_IN, D_OUT), np.uint8)
SCALES = RNG.random((D_IN // GROUP, D_OUT)).astype(np.float16)
ZEROS = {
    "symmetric": None,
    "integer zeros": RNG.integers(0, 2**BITS, SCALES.shape, np.uint8),
    "float zeros": (7 * RNG.random(SCALES.shape)).astype(np.float16),
}
W = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)


def draw_pattern() -> np.ndarray:
    """Returns a mask with exactly two of every four inputs kept, any two."""
    order = np.argsort(RNG.random((D_IN // 4, 4, D_OUT)), axis=1)
    return (order < 2).reshape(D_IN, D_OUT)


PATTERN, ANY = draw_pattern(), RNG.random((D_IN, D_OUT)) < 0.4

# Op by op, each of these compiles a dozen programs.
make_affine = jax.jit(partial(Affine.from_codes, bits=BITS, group_size=GROUP))
mask = jax.jit(Masked.from_mask, static_argnums=2)
halve = jax.jit(Sparse24.from_mask)
dense_of = jax.jit(lambda base: base.dense())
kept_by = jax.jit(lambda base: base.kept())


def affine(zeros="integer zeros") -> Affine:
    return make_affine(CODES, SCALES, ZEROS[zeros])


def affine_by_hand(zeros: str) -> np.ndarray:
    zero = np.full(SCALES.shape, 2 ** (BITS - 1)) if ZEROS[zeros] is None else ZEROS[zeros]
    zero, scale = (a.astype(np.float32).repeat(GROUP, axis=0) for a in (zero, SCALES))
    return (CODES - zero) * scale


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("kind", ["masked", "sparse24"])
def test_what_is_kept_is_the_base_and_the_rest_is_zero(kind, zeros):
    keep = ANY if kind == "masked" else PATTERN
    base = (mask if kind == "masked" else halve)(affine(zeros), keep)
    dense = np.asarray(dense_of(base))
    np.testing.assert_array_equal(dense[~keep], 0.0)
    np.testing.assert_array_equal(dense[keep], np.asarray(dense_of(affine(zeros)))[keep])
    np.testing.assert_allclose(dense, np.where(keep, affine_by_hand(zeros), 0), rtol=1e-6)
    np.testing.assert_array_equal(kept_by(base), keep)
    assert (base.d_in, base.d_out) == (D_IN, D_OUT)
    assert base.dense(jnp.bfloat16).dtype == jnp.bfloat16


def test_a_dense_weight_keeps_its_numbers():
    for make, keep in ((mask, ANY), (halve, PATTERN)):
        np.testing.assert_array_equal(dense_of(make(Dense(W), keep)), np.where(keep, W, 0))


def test_zero_hides_what_is_not_finite():
    base = mask(Dense(np.where(ANY, W, np.nan)), ANY)
    np.testing.assert_array_equal(dense_of(base), np.where(ANY, W, 0))


def test_bits_are_counted():
    quads, runs = D_IN // 4, -(-D_IN // 32)
    zeros = SCALES.shape[0] * BITS * 32  # one started run of outputs
    masked = mask(affine(), ANY)
    assert masked.stored_bits() == 32 * D_OUT * runs * (BITS + 1) + SCALES.size * 16 + zeros
    sparse = halve(affine(), PATTERN)
    words = -(-2 * quads // 32)
    assert sparse.stored_bits() == 32 * D_OUT * words * (BITS + 2) + SCALES.size * 16 + zeros
    dense = halve(Dense(W.astype(np.float16)), PATTERN)
    assert dense.stored_bits() == 16 * W.size // 2 + 32 * D_OUT * words * 2


def test_four_bits_two_of_four_are_three_bits_a_weight():
    make = jax.jit(partial(Affine.from_codes, bits=4, group_size=128))
    base = make(np.zeros((128, 32), np.uint8), np.ones((1, 32), np.float16), None)
    keep = np.broadcast_to((np.arange(128) % 4 < 2)[:, None], (128, 32))
    assert CompressedLinear(halve(base, keep)).bits_per_weight == 3 + 16 / 128
    assert CompressedLinear(mask(base, keep)).bits_per_weight == 5 + 16 / 128


def test_rows_that_cannot_be_parted():
    masked = mask(affine(), ANY)
    sparse = halve(affine(), PATTERN)
    assert (masked.unit(-2), masked.unit(-1)) == (96, 32)  # lcm(32, 24)
    assert (sparse.unit(-2), sparse.unit(-1)) == (192, 32)  # 2 lcm(32, 12)
    plain = mask(Dense(W), ANY, "5:10")
    assert (plain.unit(-2), plain.unit(-1)) == (160, 1)


def every_kind() -> dict:
    sparse = halve(affine("float zeros"), PATTERN)
    return {
        "masked": mask(affine("float zeros"), ANY),
        "sparse24": sparse,
        "masked sparse24": mask(sparse, ANY, "2:4"),
        "sparse24 of dense": halve(Dense(W), PATTERN),
    }


KINDS = every_kind()


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_the_dense_one_with_gradients(kind):
    base = KINDS[kind]
    x = RNG.standard_normal((5, D_IN)).astype(np.float32)
    product = jax.jit(packed_matmul)(x, base)
    np.testing.assert_allclose(product, x @ np.asarray(dense_of(base)), atol=1e-5)

    def floats(base):
        return [leaf for leaf in jax.tree.leaves(base) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def loss(product, x, arrays):
        leaves, structure = jax.tree.flatten(base)
        arrays = iter(arrays)
        filled = [next(arrays) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
        y = product(x, jax.tree.unflatten(structure, filled))
        return jnp.sum(jnp.sin(y))

    arrays = [array.astype(jnp.float32) for array in floats(base)]
    products = (packed_matmul, lambda x, base: x @ base.dense())
    came, wanted = (jax.jit(jax.grad(partial(loss, p), (0, 1)))(x, arrays) for p in products)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert np.abs(w).max() > 0
        np.testing.assert_allclose(c, w, atol=1e-4 * np.abs(w).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_its_layers(kind):
    base = KINDS[kind]
    stack = jax.tree.map(lambda array: np.stack([array, np.asarray(array)[:, ::-1]]), base)
    dense, one = dense_of(stack), np.asarray(dense_of(base))
    assert dense.shape == (2, D_IN, D_OUT) and (stack.d_in, stack.d_out) == (D_IN, D_OUT)
    np.testing.assert_array_equal(dense, [one, one[:, ::-1]])
    np.testing.assert_array_equal(kept_by(stack)[1], np.asarray(kept_by(base))[:, ::-1])
    assert CompressedLinear(stack).bits_per_weight == CompressedLinear(base).bits_per_weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_it_back(kind):
    leaf = CompressedLinear(KINDS[kind])
    arrays, weights = flatten({"q": {"kernel": leaf}})
    again = unflatten(arrays, weights)["q"]["kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for came, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
        np.testing.assert_array_equal(came, wanted)
