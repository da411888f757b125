"""Low-rank corrections of rounded factors: levels, sizes, products, and what they lose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.io.artifact.leaves import flatten, name_format, unflatten
from lqec_kernels import packed_matmul
from lqec_kernels.adapters import QuantizedLowRank, divide, round_columns
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.packing import unpack

D_IN, D_OUT, RANK, BITS, GROUP = 48, 20, 5, 4, 16
RNG = np.random.default_rng(0)
A = RNG.standard_normal((D_IN, RANK)).astype(np.float32)
B = RNG.standard_normal((RANK, D_OUT)).astype(np.float32)
X = RNG.standard_normal((2, 3, D_IN)).astype(np.float32)
ROUNDED = QuantizedLowRank.round(A, B, bits=BITS, group_size=GROUP)
dense = jax.jit(lambda operator: operator.dense())


def round_by_numpy(w: np.ndarray, bits: int, size: int) -> np.ndarray:
    most, groups = 2 ** (bits - 1) - 1, w.reshape(-1, size, w.shape[1])
    scales = np.abs(groups).max(axis=1, keepdims=True) / most
    scales = scales.astype(np.float16).astype(np.float32)
    return (np.round(groups / scales).clip(-most, most) * scales).reshape(w.shape)


def test_dense_is_the_product_of_rounded_factors():
    a, b = round_by_numpy(A, BITS, GROUP), round_by_numpy(B.T, BITS, 10).T
    np.testing.assert_array_equal(ROUNDED.factors().a, a)
    np.testing.assert_array_equal(ROUNDED.factors().b, b)
    np.testing.assert_allclose(dense(ROUNDED), a @ b, atol=1e-5)
    assert (ROUNDED.d_in, ROUNDED.d_out, ROUNDED.rank) == (D_IN, D_OUT, RANK)
    # Two runs of 32 inputs, one of 32 outputs, 4 words each; 3 and 2 scales a component.
    assert ROUNDED.stored_bits() == RANK * (2 * 4 * 32 + 1 * 4 * 32 + (3 + 2) * 16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_symmetric_and_the_largest_of_a_group_is_one(bits):
    base = round_columns(A, bits, GROUP)
    codes = np.asarray(unpack(base.codes, bits, D_IN)).astype(int) - 2 ** (bits - 1)
    most = 2 ** (bits - 1) - 1
    assert (np.abs(codes).reshape(3, GROUP, RANK).max(axis=1) == most).all()
    again = round_columns(base.dense(), bits, GROUP)
    np.testing.assert_array_equal(again.codes, base.codes)
    np.testing.assert_array_equal(again.scales, base.scales)


def test_groups_that_do_not_divide_are_the_largest_divisor():
    assert [divide(48, n) for n in (16, 20, 48, 128, None, 1)] == [16, 16, 48, 48, 48, 1]
    assert divide(13, 8) == 1 and divide(100, 64) == 50
    assert (ROUNDED.a.group_size, ROUNDED.b.group_size) == (16, 10)


def test_any_factor_is_stored_finitely():
    for scale in (0.0, 1e-12, 1e12):
        came = QuantizedLowRank.round(scale * A, B, bits=4, group_size=16)
        assert np.isfinite(came.dense()).all()
    assert (QuantizedLowRank.round(0 * A, B, bits=4, group_size=16).dense() == 0).all()


def test_gaussian_factors_lose_what_their_largest_says():
    # A uniform grid of step s loses s²/12 of 1; s is the mean of the largest of 128 over 7.
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((512, 64), (64, 512)))
    rounded = QuantizedLowRank.round(a, b, bits=4, group_size=128)
    largest = np.abs(random.standard_normal((4096, 128))).max(axis=1)
    expected = np.mean(np.square(largest / 7)) / 12
    for came, exact in ((rounded.factors().a, a), (rounded.factors().b, b)):
        lost = np.mean(np.square(came - exact))
        assert lost == pytest.approx(expected, rel=0.05)
    whole = a @ b
    lost = np.sum(np.square(dense(rounded) - whole)) / np.sum(np.square(whole))
    assert lost == pytest.approx(2 * expected, rel=0.05) and lost < 0.07


def test_it_is_a_correction_with_gradients():
    w = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)
    leaf = CompressedLinear(Dense(jnp.asarray(w)), (ROUNDED,))
    direction = RNG.standard_normal((2, 3, D_OUT)).astype(np.float32)

    @jax.jit
    def run(x, dy):
        y, pull = jax.vjp(lambda x: packed_matmul(x, leaf.base, corrections=leaf.corrections), x)
        return y, pull(dy)[0], leaf.dense()

    y, dx, whole = run(X, direction)
    np.testing.assert_allclose(whole, w + np.asarray(dense(ROUNDED)), atol=1e-5)
    np.testing.assert_allclose(y, X @ np.asarray(whole), atol=1e-4)
    np.testing.assert_allclose(dx, direction @ np.asarray(whole).T, atol=1e-4)
    assert leaf.stored_bits() == 32 * D_IN * D_OUT + ROUNDED.stored_bits()
    half = packed_matmul(jnp.asarray(X, jnp.bfloat16), leaf.base, corrections=leaf.corrections)
    assert half.dtype == jnp.bfloat16


def test_a_stack_is_its_layers():
    stack = QuantizedLowRank.round(
        jnp.stack([A, -2 * A]), jnp.stack([B, B]), bits=BITS, group_size=GROUP
    )
    np.testing.assert_array_equal(dense(stack)[0], dense(ROUNDED))
    one = jax.tree.map(lambda array: array[1], stack)
    np.testing.assert_allclose(dense(one), -2 * dense(ROUNDED), rtol=1e-6)
    assert one.d_in == D_IN and stack.rank == RANK


def test_it_comes_back_from_its_arrays():
    leaf = jax.device_get(CompressedLinear(Dense(np.zeros((D_IN, D_OUT))), (ROUNDED,)))
    came = unflatten(*flatten({"q": {"kernel": leaf}}))["q"]["kernel"]
    assert jax.tree.structure(came) == jax.tree.structure(leaf)
    for one, other in zip(jax.tree.leaves(came), jax.tree.leaves(leaf), strict=True):
        np.testing.assert_array_equal(one, other)
    inner = "affine(bits=4, group_size={})"
    wanted = f"quantized_low_rank({inner.format(16)}, {inner.format(10)}, rank=5)"
    assert name_format(came) == f"dense + {wanted}"
