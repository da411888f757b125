"""Sums of two bases: what both store, multiplied as one."""

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_kernels import packed_matmul
from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.sums import Sum

D_IN, D_OUT = 64, 10
RNG = np.random.default_rng(0)


def make(lead: tuple = ()) -> Sum:
    def codebook(table: str, bits: int, scale: float) -> Codebook:
        codes = RNG.integers(0, 2**bits, (*lead, D_IN // 8, D_OUT)).astype(np.uint16)
        scales = jnp.full((*lead, 1, 1), scale)
        return Codebook.from_codes(codes, scales, table=table, group_size=D_IN, d_in=D_IN)

    return Sum(codebook("e8p", 16, 0.5), codebook("e8", 8, 0.1))


dense = jax.jit(lambda base: base.dense())


def test_a_sum_is_both():
    both = make()
    wanted = np.asarray(dense(both.first)) + np.asarray(dense(both.second))
    np.testing.assert_allclose(dense(both), wanted, rtol=1e-6)
    assert (both.d_in, both.d_out) == (D_IN, D_OUT)
    assert both.stored_bits() == D_IN * D_OUT * 3 + 2 * 32
    assert (both.unit(-2), both.unit(-1)) == (32, 1)  # two codes in a word, and four


def test_a_product_and_the_scales_gradients_are_the_dense_weights():
    both = make()
    x = RNG.standard_normal((3, D_IN)).astype(np.float32)

    def loss(product):
        return jax.jit(jax.value_and_grad(lambda s: jnp.sum(jnp.sin(product(with_scales(s))))))

    def with_scales(scales):
        first, second = both.first, both.second
        return Sum(*(Codebook(c.codes, s, None, c.table, c.bits, D_IN, D_IN)
                     for c, s in zip((first, second), scales, strict=True)))  # fmt: skip

    scales = (both.first.scales, both.second.scales)
    came = loss(lambda base: packed_matmul(x, base))(scales)
    wanted = loss(lambda base: x @ base.dense())(scales)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(c, w, rtol=1e-4, atol=1e-4)


def test_a_stack_comes_back_from_disk():
    stack = make(lead=(2,))
    np.testing.assert_array_equal(
        dense(stack)[1], dense(jax.tree.map(lambda array: array[1], stack))
    )
    back = unflatten(*flatten({"q": {"kernel": CompressedLinear(stack)}}))["q"]["kernel"]
    assert back.stack_shape == (2,) and jax.tree.structure(back.base) == jax.tree.structure(stack)
    np.testing.assert_array_equal(dense(back.base), dense(stack))
