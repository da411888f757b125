"""Planes of signs: what they stand for, what they cost, and the product with them."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_kernels import packed_matmul
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.formats import CompressedLinear

D_IN, D_OUT, GROUP, BITS = 48, 10, 16, 3  # 48 rows are a run and a half
KINDS = {"plain": (BITS, False), "shifted": (BITS, True), "one alpha": (1, True)}


@lru_cache
def draw(kind: str, lead: tuple = ()):
    """Returns BitPlanes and the numpy arrays that they were made of."""
    count, shifted = KINDS[kind]
    random = np.random.RandomState(len(lead))
    signs = random.randint(0, 2, (*lead, BITS, D_IN, D_OUT)).astype(np.uint8)
    alphas = random.rand(*lead, count, D_IN // GROUP, D_OUT).astype(np.float16)
    shifts = random.randn(*lead, D_IN // GROUP, D_OUT).astype(np.float32) if shifted else None
    arrays = [None if a is None else jnp.asarray(a) for a in (signs, alphas, shifts)]
    return BitPlanes.from_signs(*arrays, group_size=GROUP), signs, alphas, shifts


@jax.jit
def dense_of(base):
    return base.dense()


def dense_by_numpy(signs, alphas, shifts):
    spread = np.repeat(alphas.astype(np.float32), GROUP, axis=-2)
    w = (np.where(signs == 1, 1, -1) * spread).sum(axis=-3)
    return w if shifts is None else w + np.repeat(shifts, GROUP, axis=-2)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_the_formula(kind):
    base, *arrays = draw(kind)
    assert (base.d_in, base.d_out, base.bits) == (D_IN, D_OUT, BITS)
    assert dense_of(base).dtype == jnp.float32
    np.testing.assert_allclose(dense_of(base), dense_by_numpy(*arrays), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["shifted", "one alpha"])
def test_a_stack_is_its_layers(kind):
    base, *arrays = draw(kind, (2,))
    wanted = dense_by_numpy(*arrays)
    np.testing.assert_allclose(dense_of(base), wanted, rtol=1e-6, atol=1e-6)
    second = jax.tree.map(lambda leaf: leaf[1], base)
    np.testing.assert_allclose(dense_of(second), wanted[1], rtol=1e-6, atol=1e-6)


def test_planes_of_a_run_lie_beside_each_other():
    base, signs, *_ = draw("plain")
    assert base.planes.shape == (2 * BITS, D_OUT) and base.planes.dtype == jnp.uint32
    words = np.asarray(base.planes)
    for plane in range(BITS):
        column = [words[i // 32 * BITS + plane, 4] >> (i % 32) & 1 for i in range(D_IN)]
        np.testing.assert_array_equal(column, signs[plane, :, 4])
        np.testing.assert_array_equal(base.layout.signs(base.planes, plane), signs[plane])
    assert (words[BITS:] >> 16 == 0).all()  # padding


@pytest.mark.parametrize("kind", KINDS)
def test_stored_bits_are_the_bytes_held(kind):
    base, *_ = draw(kind)
    count, shifted = KINDS[kind]
    groups = D_IN // GROUP * D_OUT
    assert base.stored_bits() == 64 * BITS * D_OUT + 16 * count * groups + 32 * shifted * groups
    assert base.stored_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))


def test_what_cannot_be_parted():
    base, *_ = draw("plain")
    assert (base.unit(-1), base.unit(-2)) == (1, 32)
    whole = BitPlanes(base.planes, base.alphas[:, :1], None, BITS, D_IN, D_IN)
    assert whole.unit(-2) == 32
    wide = BitPlanes(base.planes, base.alphas[:, :1], None, BITS, 24, D_IN)
    assert wide.unit(-2) == 96


@pytest.mark.parametrize("kind", ["shifted", "one alpha"])
def test_the_product_is_that_of_the_dense_weight_with_gradients(kind):
    base, signs, *_ = draw(kind)
    x, dy = (np.random.RandomState(5).randn(4, n).astype(np.float32) for n in (D_IN, D_OUT))

    @jax.jit
    def run(x, alphas, shifts, dy):
        def multiply(x, alphas, shifts):
            return packed_matmul(x, BitPlanes(base.planes, alphas, shifts, BITS, GROUP, D_IN))

        y, pull = jax.vjp(multiply, x, alphas, shifts)
        return y, *pull(dy)

    y, dx, d_alphas, d_shifts = run(x, base.alphas.astype(jnp.float32), base.shifts, dy)
    w = np.asarray(dense_of(base))
    np.testing.assert_allclose(y, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ w.T, rtol=1e-5, atol=1e-5)
    dw = (x.T @ dy).reshape(-1, GROUP, D_OUT)  # [groups, group, d_out]
    by_plane = (np.where(signs == 1, 1, -1).reshape(BITS, -1, GROUP, D_OUT) * dw).sum(2)
    wanted = by_plane if kind == "shifted" else by_plane.sum(0, keepdims=True)
    np.testing.assert_allclose(d_alphas, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_shifts, dw.sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_back_from_its_arrays(kind):
    leaf = jax.device_get(CompressedLinear(draw(kind)[0]))
    came = unflatten(*flatten({"q": {"kernel": leaf}}))["q"]["kernel"]
    assert jax.tree.structure(came) == jax.tree.structure(leaf)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(leaf), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
