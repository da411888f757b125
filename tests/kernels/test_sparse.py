"""Zeros that are stored as a mask, or not at all."""

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


def affine(zeros="integer zeros") -> Affine:
    zeros = None if ZEROS[zeros] is None else jnp.asarray(ZEROS[zeros])
    return Affine.from_codes(jnp.asarray(CODES), jnp.asarray(SCALES), zeros, bits=BITS,
                             group_size=GROUP)  # fmt: skip


def affine_by_hand(zeros: str) -> np.ndarray:
    zero = np.full(SCALES.shape, 2 ** (BITS - 1)) if ZEROS[zeros] is None else ZEROS[zeros]
    zero, scale = (a.astype(np.float32).repeat(GROUP, axis=0) for a in (zero, SCALES))
    return (CODES - zero) * scale


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("kind", ["masked", "sparse24"])
def test_what_is_kept_is_the_base_and_the_rest_is_zero(kind, zeros):
    keep = ANY if kind == "masked" else PATTERN
    make = Masked.from_mask if kind == "masked" else Sparse24.from_mask
    base = make(affine(zeros), jnp.asarray(keep))
    dense = np.asarray(base.dense())
    np.testing.assert_array_equal(dense[~keep], 0.0)
    np.testing.assert_array_equal(dense[keep], np.asarray(affine(zeros).dense())[keep])
    np.testing.assert_allclose(dense, np.where(keep, affine_by_hand(zeros), 0), rtol=1e-6)
    np.testing.assert_array_equal(base.kept(), keep)
    assert (base.d_in, base.d_out) == (D_IN, D_OUT)
    assert base.dense(jnp.bfloat16).dtype == jnp.bfloat16


def test_a_dense_weight_keeps_its_numbers():
    for base, keep in ((Masked.from_mask, ANY), (Sparse24.from_mask, PATTERN)):
        came = base(Dense(jnp.asarray(W)), jnp.asarray(keep))
        np.testing.assert_array_equal(came.dense(), np.where(keep, W, 0))


def test_zero_hides_what_is_not_finite():
    base = Masked.from_mask(Dense(jnp.asarray(np.where(ANY, W, np.nan))), jnp.asarray(ANY))
    np.testing.assert_array_equal(base.dense(), np.where(ANY, W, 0))


def test_bits_are_counted():
    quads, runs = D_IN // 4, -(-D_IN // 32)
    zeros = SCALES.shape[0] * BITS * 32  # one started run of outputs
    masked = Masked.from_mask(affine(), jnp.asarray(ANY))
    assert masked.stored_bits() == 32 * D_OUT * runs * (BITS + 1) + SCALES.size * 16 + zeros
    sparse = Sparse24.from_mask(affine(), jnp.asarray(PATTERN))
    words = -(-2 * quads // 32)
    assert sparse.stored_bits() == 32 * D_OUT * words * (BITS + 2) + SCALES.size * 16 + zeros
    dense = Sparse24.from_mask(Dense(jnp.asarray(W, jnp.float16)), jnp.asarray(PATTERN))
    assert dense.stored_bits() == 16 * W.size // 2 + 32 * D_OUT * words * 2


def test_four_bits_two_of_four_are_three_bits_a_weight():
    codes = jnp.zeros((128, 32), jnp.uint8)
    base = Affine.from_codes(codes, jnp.ones((1, 32), jnp.float16), None, bits=4, group_size=128)
    keep = jnp.asarray(np.arange(128) % 4 < 2)[:, None] & jnp.ones((128, 32), bool)
    leaf = CompressedLinear(Sparse24.from_mask(base, keep))
    assert leaf.bits_per_weight == 3 + 16 / 128
    assert CompressedLinear(Masked.from_mask(base, keep)).bits_per_weight == 5 + 16 / 128


def test_rows_that_cannot_be_parted():
    masked = Masked.from_mask(affine(), jnp.asarray(ANY))
    sparse = Sparse24.from_mask(affine(), jnp.asarray(PATTERN))
    assert (masked.unit(-2), masked.unit(-1)) == (96, 32)  # lcm(32, 24)
    assert (sparse.unit(-2), sparse.unit(-1)) == (192, 32)  # 2 lcm(32, 12)
    plain = Masked.from_mask(Dense(jnp.asarray(W)), jnp.asarray(ANY), "5:10")
    assert (plain.unit(-2), plain.unit(-1)) == (160, 1)


def every_kind() -> dict:
    masked = Masked.from_mask(affine("float zeros"), jnp.asarray(ANY))
    sparse = Sparse24.from_mask(affine("float zeros"), jnp.asarray(PATTERN))
    return {
        "masked": masked,
        "sparse24": sparse,
        "masked sparse24": Masked.from_mask(sparse, jnp.asarray(ANY), "2:4"),
        "sparse24 of dense": Sparse24.from_mask(Dense(jnp.asarray(W)), jnp.asarray(PATTERN)),
    }


KINDS = every_kind()


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_the_dense_one_with_gradients(kind):
    base = KINDS[kind]
    x = jnp.asarray(RNG.standard_normal((5, D_IN)), jnp.float32)
    dense = base.dense()
    np.testing.assert_allclose(packed_matmul(x, base), x @ dense, atol=1e-5)

    def floats(base):
        return [leaf for leaf in jax.tree.leaves(base) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def loss(product, x, arrays):
        leaves, structure = jax.tree.flatten(base)
        arrays = iter(arrays)
        filled = [next(arrays) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in leaves]
        y = product(x, jax.tree.unflatten(structure, filled))
        return jnp.sum(jnp.sin(y))

    arrays = [array.astype(jnp.float32) for array in floats(base)]
    came = jax.grad(lambda *a: loss(packed_matmul, *a), (0, 1))(x, arrays)
    wanted = jax.grad(lambda *a: loss(lambda x, b: x @ b.dense(), *a), (0, 1))(x, arrays)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert np.abs(w).max() > 0
        np.testing.assert_allclose(c, w, atol=1e-4 * np.abs(w).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_its_layers(kind):
    base = KINDS[kind]
    stack = jax.tree.map(lambda array: jnp.stack([array, array[:, ::-1]]), base)
    dense = stack.dense()
    assert dense.shape == (2, D_IN, D_OUT) and (stack.d_in, stack.d_out) == (D_IN, D_OUT)
    np.testing.assert_array_equal(dense[0], base.dense())
    np.testing.assert_array_equal(dense[1], base.dense()[:, ::-1])
    np.testing.assert_array_equal(stack.kept()[1], base.kept()[:, ::-1])
    assert CompressedLinear(stack).bits_per_weight == CompressedLinear(base).bits_per_weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_it_back(kind):
    leaf = CompressedLinear(KINDS[kind])
    arrays, weights = flatten({"q": {"kernel": leaf}})
    again = unflatten(arrays, weights)["q"]["kernel"]
    assert jax.tree.structure(again) == jax.tree.structure(leaf)
    for came, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
        np.testing.assert_array_equal(came, wanted)
