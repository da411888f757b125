"""Codebooks: their equation, their bits, their product and its gradients, and the way to disk."""

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_kernels import packed_matmul
from lqec_kernels.codebook import Codebook, DoubleScales
from lqec_kernels.formats import CompressedLinear
from lqec_kernels.tables import find_points, find_table

D_IN, D_OUT, GROUP = 96, 10, 32
RNG = np.random.default_rng(0)
KINDS = ("scalars", "scales of scales", "pairs", "lattice", "levels")


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@lru_cache
def make(kind: str, lead: tuple = (), d_in: int = D_IN) -> tuple[Codebook, np.ndarray]:
    """Returns a codebook and the weight that its equation gives in numpy."""
    table = {"pairs": "gauss3_p2", "lattice": "e8p", "levels": ""}.get(kind, "nf3")
    dim, bits = (find_table(table).dim, find_table(table).bits) if table else (1, 3)
    codes = RNG.integers(0, 2**bits, (*lead, -(-d_in // dim), D_OUT))
    packed = jnp.asarray(codes.astype(np.uint16))
    if kind == "levels":
        levels = draw(*lead, 2**bits, D_OUT).astype(np.float16)
        base = jax.jit(partial(Codebook.from_levels, bits=bits))(packed, levels)
        return base, np.take_along_axis(levels, codes, axis=-2).astype(np.float32)
    groups, wide = (1, 1) if kind == "lattice" else (d_in // GROUP, D_OUT)
    scales = (0.1 + np.abs(draw(*lead, groups, wide))).astype(np.float16)
    spread = np.repeat(scales.astype(np.float32), d_in // groups, axis=-2)
    if kind == "scales of scales":
        scales = jax.vmap(DoubleScales.from_scales) if lead else DoubleScales.from_scales
        scales = jax.jit(scales)(spread[..., ::GROUP, :])
        spread = np.repeat(np.asarray(scales.dense()), GROUP, axis=-2)
    base = jax.jit(lambda c, s: Codebook.from_codes(
        c, s, table=table, group_size=d_in // groups, d_in=d_in))(packed, scales)  # fmt: skip
    points = every_point() if table == "e8p" else find_points(table)
    level = np.swapaxes(points[codes], -1, -2)  # [..., codes, dim, d_out]
    level = level.reshape(*lead, -1, D_OUT)[..., :d_in, :]
    return base, level * spread


@lru_cache
def every_point() -> np.ndarray:
    return np.asarray(find_table("e8p").decode(jnp.arange(2**16)[:, None]))[..., 0]


dense = jax.jit(lambda operator: operator.dense())


@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_is_its_equation(kind):
    base, wanted = make(kind)
    assert (base.d_in, base.d_out) == (D_IN, D_OUT)
    np.testing.assert_allclose(dense(base), wanted, rtol=1e-6)
    codes = base.layout.codes(base.codes)
    assert codes.shape == (D_IN // base.layout.dim, D_OUT) and int(codes.max()) < 2**base.bits


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_its_layers(kind):
    base, wanted = make(kind, lead=(2,))
    np.testing.assert_allclose(dense(base), wanted, rtol=1e-6)
    np.testing.assert_allclose(
        dense(jax.tree.map(lambda leaf: leaf[1], base)), wanted[1], rtol=1e-6
    )
    assert CompressedLinear(base).stack_shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_and_its_gradients_are_the_dense_weights(kind):
    base, wanted = make(kind)
    x, dy = draw(3, D_IN), draw(3, D_OUT)

    @jax.jit
    def packed(x, base):
        y, pull = jax.vjp(lambda x, base: packed_matmul(x, base), x, base)
        return y, pull(dy)

    @jax.jit
    def plain(x, base):
        y, pull = jax.vjp(lambda x, base: x @ base.dense(), x, base)
        return y, pull(dy)

    for came, want in zip(jax.tree.leaves(packed(x, base)), jax.tree.leaves(plain(x, base)),
                          strict=True):  # fmt: skip
        if came.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(came, want, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(packed(x, base)[0], x @ wanted, atol=1e-4)
    trained = packed(x, base)[1][1]
    floats = trained.levels if kind == "levels" else trained.scales
    assert all(np.abs(np.asarray(leaf, np.float32)).max() > 0 for leaf in jax.tree.leaves(floats)
               if leaf.dtype != jax.dtypes.float0)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "d_in", "bits"),
    [
        ("scalars", 96, 96 * 3 * D_OUT + 3 * D_OUT * 16),
        # A byte a scale, one block's absmax and the mean.
        ("scales of scales", 96, 96 * 3 * D_OUT + 3 * D_OUT * 8 + 32 + 32),
        ("pairs", 96, 96 * 3 * D_OUT + 3 * D_OUT * 16),
        ("lattice", 96, 96 * 2 * D_OUT + 16),
        # 4 codes of 16 bits: two words, not a run of 32 codes; 5 codes: three words.
        ("lattice", 32, 32 * 2 * D_OUT + 16),
        ("lattice", 36, 3 * 32 * D_OUT + 16),
        ("levels", 96, 96 * 3 * D_OUT + 8 * D_OUT * 16),
    ],
)
def test_stored_bits_are_exact(kind, d_in, bits):
    base, wanted = make(kind, d_in=d_in)
    assert base.stored_bits() == bits == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    np.testing.assert_allclose(dense(base), wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_comes_back_from_disk(kind):
    base, _ = make(kind)
    back = unflatten(*flatten({"q": {"kernel": CompressedLinear(base)}}))["q"]["kernel"].base
    assert jax.tree.structure(back) == jax.tree.structure(base)
    for came, wanted in zip(jax.tree.leaves(back), jax.tree.leaves(base), strict=True):
        assert came.dtype == wanted.dtype
        np.testing.assert_array_equal(came, wanted)


def test_whole_words_and_groups_are_not_parted():
    # 32 codes of 3 bits; 16 codes of pairs in 6 bits; 2 codes of 8 inputs in 16 bits.
    units = {kind: make(kind)[0].unit(-2) for kind in KINDS}
    assert units == {
        "scalars": 32,
        "scales of scales": 32,
        "pairs": 32,
        "lattice": 16,
        "levels": 32,
    }
    wide = dataclasses.replace(make("scalars")[0], group_size=48)
    assert wide.unit(-2) == 96 and wide.unit(-1) == 1


def test_scales_of_scales_lose_less_than_a_hundredth():
    # Absolute maxima of groups of 64 normal weights, as QLoRA has them.
    scales = np.abs(np.random.default_rng(3).standard_normal((64, 8, 100))).max(axis=0)
    twice = jax.jit(DoubleScales.from_scales)(scales.astype(np.float32))
    error = np.abs(np.asarray(twice.dense()) / scales - 1)
    assert 1e-4 < np.mean(error) < 0.002 and error.max() < 0.01
    assert twice.absmax.shape == (4,)  # 800 scales in blocks of 256
    np.testing.assert_allclose(twice.mean, scales.mean(), rtol=1e-6)
    # In the order of output columns: the first block is the first 32 columns.
    deviation = np.abs(scales - scales.mean())
    np.testing.assert_allclose(twice.absmax[0], deviation[:, :32].max(), rtol=1e-5)


def test_equal_scales_are_kept_exactly():
    scales = jnp.full((2, 5), 0.375)
    np.testing.assert_array_equal(DoubleScales.from_scales(scales).dense(), scales)
    np.testing.assert_array_equal(DoubleScales.from_scales(0 * scales).dense(), 0)
