"""Formats of compressed weights: what they stand for, and what they cost to store."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.outliers import Outliers

D_IN, D_OUT, GROUP = 96, 10, 32
KINDS = ("symmetric", "packed", "floating")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@lru_cache
def draw_affine(kind: str, bits: int = 3, lead: tuple = (), scale_dtype=np.float16):
    """Returns an Affine and the numpy arrays that it was made of."""
    random = np.random.RandomState(bits)
    codes = random.randint(0, 2**bits, (*lead, D_IN, D_OUT)).astype(np.uint8)
    scales = (0.01 + random.rand(*lead, D_IN // GROUP, D_OUT)).astype(scale_dtype)
    zeros = {
        "symmetric": None,
        "packed": random.randint(0, 2**bits, scales.shape).astype(np.uint8),
        "floating": (random.rand(*scales.shape) * 2**bits).astype(np.float16),
    }[kind]
    arrays = [
        jnp.asarray(codes),
        jnp.asarray(scales),
        None if zeros is None else jnp.asarray(zeros),
    ]
    base = jax.jit(partial(Affine.from_codes, bits=bits, group_size=GROUP))(*arrays)
    return base, codes, scales, zeros


@jax.jit
def dense_of(operator):
    return operator.dense()


def dense_by_numpy(codes, scales, zeros, bits):
    zeros = np.full(scales.shape, 2 ** (bits - 1)) if zeros is None else zeros
    spread = [np.repeat(a.astype(np.float32), GROUP, axis=-2) for a in (scales, zeros)]
    return (codes.astype(np.float32) - spread[1]) * spread[0]


@pytest.mark.parametrize(
    ("kind", "bits"), [*((kind, 3) for kind in KINDS), ("packed", 1), ("symmetric", 8)]
)
def test_affine_is_its_formula(kind, bits):
    base, codes, scales, zeros = draw_affine(kind, bits)
    assert (base.d_in, base.d_out) == (D_IN, D_OUT)
    dense = dense_of(base)
    assert dense.dtype == jnp.float32
    np.testing.assert_array_equal(dense, dense_by_numpy(codes, scales, zeros, bits))


@pytest.mark.parametrize("kind", ["packed", "floating"])
def test_a_stack_is_its_layers(kind):
    base, codes, scales, zeros = draw_affine(kind, bits=3, lead=(2,))
    assert (base.d_in, base.d_out) == (D_IN, D_OUT)
    wanted = dense_by_numpy(codes, scales, zeros, 3)
    np.testing.assert_array_equal(dense_of(base), wanted)
    np.testing.assert_array_equal(jax.vmap(dense_of)(base), wanted)
    second = jax.tree.map(lambda leaf: leaf[1], base)
    np.testing.assert_array_equal(dense_of(second), wanted[1])


@pytest.mark.parametrize("kind", KINDS)
def test_some_columns_are_those_columns_of_the_weight(kind):
    base, *_ = draw_affine(kind)

    @jax.jit
    def dense_of_some(base):
        cut = jax.tree.map(lambda array: array[..., 3:7], base.columns())
        return base.layout.dense(cut, jnp.float32)

    np.testing.assert_array_equal(dense_of_some(base), dense_of(base)[:, 3:7])
    assert hash(base.layout) == hash(draw_affine(kind)[0].layout)


@pytest.mark.parametrize(
    ("kind", "zero_bits"), [("symmetric", 0), ("packed", 3 * 32 * 3), ("floating", 3 * D_OUT * 16)]
)
def test_stored_bits_are_the_bytes_held(kind, zero_bits):
    base, *_ = draw_affine(kind, bits=3)
    codes_bits = D_IN * D_OUT * 3  # 96 rows are whole runs
    scale_bits = (D_IN // GROUP) * D_OUT * 16
    # Zeros are packed along d_out: 10 columns take one run of 32.
    assert base.stored_bits() == codes_bits + scale_bits + zero_bits
    assert base.stored_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))


def test_one_scale_may_stand_for_the_whole_weight():
    base, codes, _, _ = draw_affine("symmetric", lead=(2,))
    scales = np.float32([[[0.5]], [[2.0]]])
    single = dataclasses.replace(base, scales=jnp.asarray(scales), group_size=D_IN)
    wanted = (codes.astype(np.float32) - 4) * scales
    np.testing.assert_array_equal(dense_of(single), wanted)
    first = jax.tree.map(lambda leaf: leaf[0], single)
    np.testing.assert_array_equal(dense_of(first), wanted[0])
    assert first.stored_bits() == D_IN * D_OUT * 3 + 32
    # What belongs to all inputs does not keep them together.
    assert (first.unit(-2), base.unit(-2)) == (32, 32)
    assert dataclasses.replace(base, group_size=D_IN).unit(-2) == 96

    def loss(scales):
        return jnp.sum(dataclasses.replace(first, scales=scales).dense())

    gradient = jax.grad(loss)(first.scales)
    assert gradient.shape == (1, 1) and gradient[0, 0] == (codes[0].astype(np.float32) - 4).sum()


def test_float32_scales_cost_twice_float16():
    half, *_ = draw_affine("symmetric")
    single, *_ = draw_affine("symmetric", scale_dtype=np.float32)
    assert single.stored_bits() - half.stored_bits() == (D_IN // GROUP) * D_OUT * 16


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_structure_and_arrays_are_leaves(kind):
    base, *_ = draw_affine(kind)
    leaves, structure = jax.tree.flatten(base)
    assert len(leaves) == (2 if kind == "symmetric" else 3)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.bits, again.group_size, again.d_in) == (3, GROUP, D_IN)
    other = dataclasses.replace(base, group_size=16)
    assert jax.tree.structure(other) != structure
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.bits = 4


def test_dense_base_is_the_weight():
    w = draw(D_IN, D_OUT)
    base = Dense(jnp.asarray(w, jnp.bfloat16))
    assert (base.d_in, base.d_out, base.stored_bits()) == (D_IN, D_OUT, D_IN * D_OUT * 16)
    assert base.dense().dtype == jnp.float32
    np.testing.assert_array_equal(base.layout.dense(base.columns(), jnp.float32), base.dense())


def test_low_rank_applies_what_it_stands_for():
    a, b, x = draw(D_IN, 4), draw(4, D_OUT, seed=1), draw(5, D_IN, seed=2)
    correction = LowRank(jnp.asarray(a), jnp.asarray(b, jnp.float16))
    assert correction.rank == 4
    assert correction.stored_bits() == 4 * D_IN * 32 + 4 * D_OUT * 16
    wanted = x @ a @ b.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(correction.apply(x), wanted, atol=1e-4)
    np.testing.assert_allclose(x @ np.asarray(correction.dense()), wanted, atol=1e-4)
    assert correction.apply(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_pooled_correction_reads_the_means_of_its_inputs():
    a, b, x = draw(D_IN // 8, 4), draw(4, D_OUT, seed=1), draw(5, D_IN, seed=2)
    correction = LowRank(jnp.asarray(a, jnp.float16), jnp.asarray(b), 8)
    assert (correction.rank, correction.stored_bits()) == (4, 4 * 12 * 16 + 4 * D_OUT * 32)
    a = a.astype(np.float16).astype(np.float32)
    wanted = x.reshape(5, -1, 8).mean(axis=-1) @ a @ b
    np.testing.assert_allclose(correction.apply(x), wanted, atol=1e-5)
    assert correction.apply(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    for whole in (correction, correction.expanded()):
        assert whole.dense().shape == (D_IN, D_OUT)
        np.testing.assert_allclose(whole.dense(), np.repeat(a @ b / 8, 8, axis=0), atol=1e-6)
    assert correction.expanded().pool == 1
    stack = jax.tree.map(lambda array: jnp.stack([array, 2 * array]), correction)
    np.testing.assert_allclose(stack.dense()[1], 4 * correction.dense(), rtol=1e-5)
    assert LowRank(a, b).expanded().a is a and LowRank(a, b).pool == 1


def test_channel_scale_is_its_own_transpose():
    transform = ChannelScale(jnp.arange(1.0, D_IN + 1))
    x = draw(2, D_IN)
    np.testing.assert_allclose(transform.apply(x), x * np.arange(1, D_IN + 1), rtol=1e-6)
    np.testing.assert_array_equal(transform.apply_transpose(x), transform.apply(x))
    assert transform.stored_bits() == 32 * D_IN


def compressed() -> CompressedLinear:
    return CompressedLinear(
        base=draw_affine("packed")[0],
        corrections=tuple(
            LowRank(jnp.asarray(draw(D_IN, r, seed=r)), jnp.asarray(draw(r, D_OUT))) for r in (2, 5)
        ),
        input_transform=ChannelScale(jnp.asarray(1 + np.abs(draw(D_IN)))),
        output_transform=ChannelScale(jnp.asarray(1 + np.abs(draw(D_OUT)))),
    )


def test_a_compressed_weight_is_the_sum_of_its_terms():
    leaf = compressed()
    assert (leaf.d_in, leaf.d_out) == (D_IN, D_OUT)
    base, into, out = (
        np.asarray(array)
        for array in (dense_of(leaf.base), leaf.input_transform.scale, leaf.output_transform.scale)
    )
    wanted = into[:, None] * base * out
    for correction in leaf.corrections:
        wanted = wanted + np.asarray(correction.a) @ np.asarray(correction.b)
    np.testing.assert_allclose(dense_of(leaf), wanted, atol=1e-4)
    np.testing.assert_array_equal(dense_of(CompressedLinear(leaf.base)), base)


def test_bits_per_weight_counts_everything_stored():
    leaf = compressed()
    held = 8 * sum(array.nbytes for array in jax.tree.leaves(leaf))
    assert leaf.stored_bits() == held
    assert leaf.bits_per_weight == held / (D_IN * D_OUT)
    stack = jax.tree.map(lambda array: np.stack([array] * 3), leaf)
    assert stack.bits_per_weight == leaf.bits_per_weight
    assert CompressedLinear(Dense(jnp.zeros((4, 6)))).bits_per_weight == 32


def draw_corrections() -> dict:
    a, b = draw(2, 128, 4), draw(2, 4, 64, seed=1)
    places = np.tile(np.arange(3, dtype=np.uint32), (2, 1))
    return {
        "low rank": LowRank(jnp.asarray(a), jnp.asarray(b)),
        "pooled": LowRank(jnp.asarray(a[:, ::16]), jnp.asarray(b), pool=16),
        "rounded": QuantizedLowRank.round(a, b, bits=3, group_size=32),
        "outliers": Outliers(jnp.asarray(places), jnp.ones((2, 3), jnp.float16), 128, 64),
    }


def cut(node, axis):
    """Takes the first half of an array or an Affine along an axis."""
    size = getattr(node, "d_in", 0)
    half = jax.tree.map(lambda array: jnp.split(array, 2, axis)[0], node)
    return dataclasses.replace(half, d_in=size // 2) if size else half


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", draw_corrections())
def test_a_corrections_fields_cut_along_their_axes_are_the_matrix_cut(name, axis):
    correction = draw_corrections()[name]
    axes = correction.axes(axis)
    fields = {field: cut(getattr(correction, field), where) for field, where in axes.items()}
    half = dataclasses.replace(correction, **fields)
    # What names no axis stands for the whole matrix on every device.
    wanted = jnp.split(correction.dense(), 2, axis)[0] if axes else correction.dense()
    np.testing.assert_allclose(half.dense(), wanted, atol=1e-6)
    assert len(axes) == (0 if name == "outliers" else 1)


@pytest.mark.parametrize("name", draw_corrections())
def test_a_correction_is_its_factors_or_has_none(name):
    correction = draw_corrections()[name]
    factors = correction.factors()
    assert (factors is None) == (name == "outliers")
    if factors is not None:
        assert type(factors) is LowRank and jnp.issubdtype(factors.a.dtype, jnp.floating)
        np.testing.assert_array_equal(factors.dense(), correction.dense())
