"""Repacking: the same weight to the bit, the same gradients, and all else left alone."""

import dataclasses
import logging
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lqec_kernels
from lqec_kernels import (
    Affine,
    Codebook,
    CompressedLinear,
    Dense,
    LowRank,
    Planes,
    repack_for_kernels,
    repacking,
)
from lqec_kernels.api import packed_matmul
from lqec_kernels.repacking import DenseCopy, can_repack, repack

KINDS = ("symmetric", "packed", "floating", "whole")


@lru_cache
def draw_affine(kind: str, bits: int, d_in: int = 320, lead: tuple = ()) -> Affine:
    random = np.random.RandomState(bits)
    codes = random.randint(0, 2**bits, (*lead, d_in, 10)).astype(np.uint8)
    group = d_in if kind == "whole" else d_in // 5
    shape = (*lead, 1, 1) if kind == "whole" else (*lead, 5, 10)
    scales = (0.01 + random.rand(*shape)).astype(np.float16)
    zeros = {
        "packed": random.randint(0, 2**bits, shape).astype(np.uint8),
        "floating": (random.rand(*shape) * 2**bits).astype(np.float16),
    }.get(kind)
    return jax.jit(partial(Affine.from_codes, bits=bits, group_size=group))(codes, scales, zeros)


@jax.jit
def dense_of(base):
    return base.dense()


@pytest.mark.parametrize(
    ("kind", "bits", "d_in"),
    [*((kind, 3, 320) for kind in KINDS), ("packed", 2, 40), ("packed", 8, 85), ("whole", 4, 512)],
)
def test_is_the_same_weight_to_the_bit(kind, bits, d_in):
    base = draw_affine(kind, bits, d_in)
    planes = repack_for_kernels(base)
    assert type(planes) is Planes
    assert (planes.d_in, planes.d_out, planes.group_size) == (d_in, 10, base.group_size)
    np.testing.assert_array_equal(dense_of(planes), dense_of(base))


@pytest.mark.parametrize("kind", ["packed", "whole"])
def test_a_stack_is_repacked_whole(kind):
    stack = repack_for_kernels(draw_affine(kind, 3, lead=(2,)))
    np.testing.assert_array_equal(dense_of(stack), dense_of(draw_affine(kind, 3, lead=(2,))))
    one = repack_for_kernels(jax.tree.map(lambda leaf: leaf[1], draw_affine(kind, 3, lead=(2,))))
    for part, whole in zip(jax.tree.leaves(one), jax.tree.leaves(stack), strict=True):
        np.testing.assert_array_equal(part, whole[1])


def test_products_and_gradients_are_those_of_what_was_stored():
    base = draw_affine("floating", 3)
    random = np.random.RandomState(0)
    x = random.standard_normal((4, 320)).astype(np.float32)

    @jax.jit
    def gradients(floats, x, base):
        def loss(floats, x):
            names = ("scales", "zeros" if isinstance(base, Affine) else "offsets")
            whole = dataclasses.replace(base, **dict(zip(names, floats, strict=True)))
            return jnp.sum(jnp.sin(packed_matmul(x, whole)))

        return jax.value_and_grad(loss, (0, 1))(floats, x)

    floats = (base.scales.astype(jnp.float32), base.zeros.astype(jnp.float32))
    came, wanted = gradients(floats, x, repack_for_kernels(base)), gradients(floats, x, base)
    for a, b in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_a_tree_gets_other_bases_and_keeps_all_else():
    adapter = LowRank(jnp.ones((320, 2)), jnp.ones((2, 10)))
    leaf = CompressedLinear(draw_affine("packed", 2), (adapter,))
    book = Codebook.from_codes(
        np.zeros((160, 10), np.uint8), None, table="gauss2_p2", group_size=320, d_in=320
    )  # of pairs
    five = dataclasses.replace(draw_affine("packed", 4), bits=5)
    tree = {"blocks": ({"q": leaf, "norm": jnp.ones(3)},), "head": book, "five": five}
    came = repack_for_kernels(tree)
    assert type(came["blocks"][0]["q"].base) is Planes
    assert came["blocks"][0]["q"].corrections == (adapter,)
    assert came["blocks"][0]["norm"] is tree["blocks"][0]["norm"]
    assert came["head"] is book and came["five"] is five
    assert can_repack(leaf.base) and not can_repack(book) and not can_repack(five)
    assert jax.tree.structure(repack_for_kernels(came)) == jax.tree.structure(came)
    assert repack_for_kernels(Dense(jnp.ones((2, 2)))).w.shape == (2, 2)


def test_sizes_are_known_before_the_first_byte():
    shapes = jax.eval_shape(repack_for_kernels, draw_affine("packed", 3))
    assert shapes.stored_bits() == repack_for_kernels(draw_affine("packed", 3)).stored_bits()


# What a platform multiplies fastest by


def draw_leaf(d_in: int, d_out: int, layers: int = 2) -> CompressedLinear:
    random = np.random.RandomState(0)
    codes = random.randint(0, 4, (layers, d_in, d_out)).astype(np.uint8)
    scales = random.rand(layers, d_in // 32, d_out).astype(np.float16)
    base = Affine.from_codes(codes, scales, None, bits=2, group_size=32)
    factors = jnp.ones((layers, d_in, 2)), jnp.ones((layers, 2, d_out))
    return CompressedLinear(base, (LowRank(*factors),))


def test_on_a_cpu_small_weights_become_dense_and_large_ones_stay(monkeypatch, caplog):
    monkeypatch.setattr(repacking, "DENSE_ELEMENTS", 64 * 32)
    tree = {"small": draw_leaf(64, 32), "large": draw_leaf(64, 48), "norm": jnp.ones(3)}
    with caplog.at_level(logging.INFO, "lqec_kernels.repacking"):
        made = repack(tree, dtype=jnp.bfloat16, platform="cpu")
    assert caplog.messages == [
        "1 stacks of weights become dense copies on a CPU",
        "1 stacks of weights stay as they are on a CPU",
    ]
    small = made["small"]
    assert isinstance(small.base, DenseCopy) and small.base.w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(small.base.w, tree["small"].base.dense(jnp.bfloat16))
    assert small.corrections is tree["small"].corrections
    assert made["large"] is tree["large"] and made["norm"] is tree["norm"]
    assert repack(made, platform="cpu")["small"] is small


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_elsewhere_weights_are_in_the_order_of_the_kernels(platform):
    leaf = draw_leaf(64, 32)
    made = repack(leaf, platform=platform, dtype=jnp.bfloat16)
    assert isinstance(made.base, Planes)
    np.testing.assert_array_equal(made.dense(), leaf.dense())
    on_tpu = platform == "tpu"
    assert made.base.scales.dtype == (jnp.float32 if on_tpu else jnp.float16)
    assert made.base.planes[0].dtype == jnp.uint32
    assert made.corrections[0].a.dtype == (jnp.bfloat16 if on_tpu else jnp.float32)


def test_it_takes_the_platform_that_jax_runs_on():
    leaf = CompressedLinear(Dense(jnp.ones((4, 4))))
    assert jax.default_backend() == "cpu" and repack(leaf) is leaf
    assert isinstance(repack(draw_leaf(32, 8)).base, DenseCopy)


def test_the_names_that_it_had_before_are_kept():
    assert lqec_kernels.prepare is repack_for_kernels and lqec_kernels.ready is repack
