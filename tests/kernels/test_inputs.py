"""Rounded inputs: their levels, what shares a scale, and what a gradient sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.linear import linear
from lqec_jax.io.artifact.leaves import flatten, name_format, unflatten
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from lqec_kernels.inputs import FLOATS, InputGrid

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 5, 16)).astype(np.float32) * np.array([1, 30, 600])[:, None, None]
X = X.astype(np.float32)


def apply(grid: InputGrid, x=X) -> np.ndarray:
    return np.asarray(jax.jit(grid.apply)(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integers_are_the_nearest_levels_up_to_the_largest(bits):
    most = 2 ** (bits - 1) - 1
    scale = np.abs(X).max(axis=-1, keepdims=True) / most
    wanted = np.round(X / scale) * scale
    np.testing.assert_allclose(apply(InputGrid("int", bits, "token")), wanted, rtol=1e-6)


@pytest.mark.parametrize(("format", "mantissa", "least"), [("fp8", 3, -6), ("fp8_e5m2", 2, -14)])
def test_floats_are_the_nearest_of_their_mantissa(format, mantissa, least):
    largest = {"fp8": 448.0, "fp8_e5m2": 57344.0}[format]
    scale = np.abs(X).max(axis=(-2, -1), keepdims=True) / largest
    levels = X / scale
    exponent = np.maximum(np.floor(np.log2(np.abs(levels))), least)
    step = 2.0 ** (exponent - mantissa)
    wanted = np.round(levels / step) * step * scale
    np.testing.assert_allclose(apply(InputGrid(format, 8, "tensor")), wanted, rtol=1e-5)
    assert jnp.finfo(FLOATS[format]).max == largest


def test_a_window_is_rounded_by_itself_and_a_token_by_itself():
    for per, rows in (("tensor", (2,)), ("token", (2, 3))):
        grid = InputGrid("int", 4, per)
        changed = X.copy()
        changed[0] *= 100
        changed[:, 0] *= 1 if per == "tensor" else 100
        np.testing.assert_array_equal(apply(grid, changed)[rows], apply(grid)[rows])
    alone = apply(InputGrid("int", 4, "tensor"), X[1])
    np.testing.assert_array_equal(alone, apply(InputGrid("int", 4, "tensor"))[1])
    assert apply(InputGrid(), X[0, 0]).shape == (16,)


@pytest.mark.parametrize("format", ["fp8", "int"])
def test_zeros_halves_and_large_numbers_stay_finite(format):
    grid = InputGrid(format, 8, "token")
    np.testing.assert_array_equal(apply(grid, 0 * X), 0)
    assert np.isfinite(apply(grid, 1e30 * X)).all() and np.isfinite(apply(grid, 1e-30 * X)).all()
    half = jax.jit(grid.apply)(jnp.asarray(X, jnp.bfloat16))
    wanted = apply(grid, np.asarray(jnp.asarray(X, jnp.bfloat16), np.float32))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half, jnp.asarray(wanted, jnp.bfloat16))


def test_a_linear_reads_rounded_inputs_with_straight_through_gradients():
    grid = InputGrid("int", 4, "token")
    base, a, b = (RNG.standard_normal(s).astype(np.float32) for s in ((16, 6), (16, 2), (2, 6)))
    leaf = CompressedLinear(Dense(jnp.asarray(base)), (LowRank(a, b),), input_grid=grid)
    w = np.asarray(leaf.dense())
    np.testing.assert_allclose(w, base + a @ b, atol=1e-5)

    @jax.jit
    def run(x, leaf, dy):
        y, pull = jax.vjp(linear, x, leaf)
        dx, d_leaf = pull(dy)
        return y, dx, d_leaf.corrections[0].a

    dy = RNG.standard_normal((3, 5, 6)).astype(np.float32)
    y, dx, d_a = run(X, leaf, dy)
    np.testing.assert_allclose(y, apply(grid) @ w, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-4, atol=1e-4)
    # Factors see what they multiplied: the rounded inputs.
    wanted = np.einsum("nti,nto->io", apply(grid), dy) @ b.T
    np.testing.assert_allclose(d_a, wanted, rtol=1e-4, atol=1e-2 * np.abs(wanted).max())


def test_it_is_saved_named_and_free():
    grid = InputGrid("int", 6, "tensor")
    leaf = CompressedLinear(Dense(np.ones((16, 6), np.float32)), input_grid=grid)
    arrays, said = flatten({"q": {"kernel": leaf}})
    assert said["q"]["input_grid"] == {"kind": "int", "bits": 6, "per": "tensor"}
    came = unflatten(arrays, said)["q"]["kernel"]
    assert came.input_grid == grid and jax.tree.structure(came) == jax.tree.structure(leaf)
    assert name_format(came) == "dense + inputs int(bits=6, per=tensor)"
    plain = CompressedLinear(leaf.base)
    assert leaf.stored_bits() == plain.stored_bits()
    assert "input_grid" not in flatten({"q": {"kernel": plain}})[1]["q"]
