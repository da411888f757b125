"""Outliers: a sparse product, its gradients, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.io.artifact.leaves import flatten, name_format, unflatten
from lqec_kernels import outliers as module
from lqec_kernels import packed_matmul
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.outliers import Outliers

D_IN, D_OUT, COUNT = 24, 10, 17
RNG = np.random.default_rng(0)
PLACES = np.sort(RNG.permutation(D_IN * D_OUT)[:COUNT]).astype(np.uint32)
VALUES = RNG.standard_normal(COUNT).astype(np.float16)
SPARSE = Outliers(jnp.asarray(PLACES), jnp.asarray(VALUES), D_IN, D_OUT)
X = RNG.standard_normal((2, 3, D_IN)).astype(np.float32)


def dense_by_numpy(places=PLACES, values=VALUES) -> np.ndarray:
    w = np.zeros((D_IN, D_OUT), np.float32)
    for place, value in zip(places, values, strict=True):
        w[place // D_OUT, place % D_OUT] += value
    return w


def test_dense_has_each_value_at_its_place():
    np.testing.assert_array_equal(SPARSE.dense(), dense_by_numpy())
    assert (SPARSE.d_in, SPARSE.d_out, SPARSE.count) == (D_IN, D_OUT, COUNT)
    assert SPARSE.stored_bits() == COUNT * 48


def test_values_at_one_place_add_up():
    places, values = jnp.asarray([5, 7, 5], jnp.uint32), jnp.asarray([1.0, 2.0, 4.0])
    twice = Outliers(places, values, D_IN, D_OUT)
    assert twice.dense()[0, 5] == 5
    np.testing.assert_allclose(twice.apply(X), X @ np.asarray(twice.dense()), atol=1e-6)


@pytest.mark.parametrize("products", [6 * 5, module.PRODUCTS])
def test_apply_is_the_dense_product_with_gradients_in_any_chunks(products, monkeypatch):
    monkeypatch.setattr(module, "PRODUCTS", products)
    direction = RNG.standard_normal((2, 3, D_OUT)).astype(np.float32)

    @jax.jit
    def run(x, values, dy):
        def apply(x, values):
            return Outliers(SPARSE.places, values, D_IN, D_OUT).apply(x)

        y, pull = jax.vjp(apply, x, values)
        return y, *pull(dy)

    y, dx, d_values = run(X, VALUES.astype(np.float32), direction)
    w = dense_by_numpy()
    np.testing.assert_allclose(y, X @ w, atol=1e-5)
    np.testing.assert_allclose(dx, direction @ w.T, atol=1e-5)
    wanted = np.einsum("abi,abo->io", X, direction).reshape(-1)[PLACES]
    np.testing.assert_allclose(d_values, wanted, atol=1e-5)


def test_neither_direction_holds_all_products(monkeypatch):
    monkeypatch.setattr(module, "PRODUCTS", 2**12)
    count, tokens, d_in, d_out = 2**14, 64, 256, 256
    big = Outliers(jnp.arange(count, dtype=jnp.uint32), jnp.ones(count), d_in, d_out)

    def loss(x, big):
        return jnp.sum(jnp.square(big.apply(x)))

    program = jax.jit(jax.grad(loss)).lower(jnp.ones((tokens, d_in)), big).compile()
    held = program.memory_analysis().temp_size_in_bytes
    assert held < count * tokens * 4 / 4


def test_it_is_a_correction():
    w = RNG.standard_normal((D_IN, D_OUT)).astype(np.float32)
    leaf = CompressedLinear(Dense(jnp.asarray(w)), (SPARSE,))
    np.testing.assert_allclose(leaf.dense(), w + dense_by_numpy(), rtol=1e-6)
    y = packed_matmul(jnp.asarray(X), leaf.base, corrections=leaf.corrections)
    np.testing.assert_allclose(y, X @ np.asarray(leaf.dense()), atol=1e-5)
    half = packed_matmul(jnp.asarray(X, jnp.bfloat16), leaf.base, corrections=leaf.corrections)
    assert half.dtype == jnp.bfloat16
    assert leaf.bits_per_weight == 32 + 48 * COUNT / (D_IN * D_OUT)
    assert name_format(leaf) == "dense + outliers"


def test_a_stack_is_its_layers():
    stack = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), SPARSE)
    wanted = np.stack([dense_by_numpy(), dense_by_numpy(PLACES[::-1], VALUES[::-1])])
    np.testing.assert_array_equal(stack.dense(), wanted)
    once, again = (jax.tree.map(lambda a, i=i: a[i], stack).apply(X) for i in (0, 1))
    np.testing.assert_allclose(once, again, atol=1e-6)


def test_it_comes_back_from_its_arrays():
    leaf = jax.device_get(CompressedLinear(Dense(np.zeros((D_IN, D_OUT))), (SPARSE,)))
    came = unflatten(*flatten({"q": {"kernel": leaf}}))["q"]["kernel"].corrections[0]
    assert (came.d_in, came.d_out) == (D_IN, D_OUT)
    np.testing.assert_array_equal(came.places, PLACES)
    np.testing.assert_array_equal(came.values, VALUES)
    assert came.values.dtype == np.float16
