"""How scales are stored: subnormals, the ends of float16, and a unit for weights far from one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core import scales
from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.codebook import Codebook, DoubleScales
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.outliers import Outliers
from lqec_kernels.sums import Sum

W = jax.random.normal(jax.random.key(0), (32, 8))
CODES = jnp.zeros((32, 8), jnp.uint8).at[3].set(1)
HALF = jnp.full((2, 8), 0.25, jnp.float16)


def test_a_subnormal_scale_stays_and_none_is_zero_or_infinite():
    store = jax.jit(lambda s: scales.store_scale(s, jnp.float16).astype(jnp.float32))
    came = store(jnp.asarray([0.0, 1e-9, 2.0**-20, 3e-5, 1.0, 1e9], jnp.float32))
    np.testing.assert_array_equal(came[:3], [2.0**-24, 2.0**-24, 2.0**-20])
    assert abs(came[3] - 3e-5) <= 2.0**-25
    np.testing.assert_array_equal(came[4:], [1.0, 65504.0])
    assert scales.store_scale(jnp.zeros(1), jnp.float32)[0] == jnp.finfo(jnp.float32).tiny


def test_numbers_keep_their_sign_and_are_never_infinite():
    came = scales.store_number(jnp.asarray([-1e9, 0.0, 1e9]), jnp.float16)
    np.testing.assert_array_equal(came, np.array([-65504, 0, 65504], np.float16))


@pytest.mark.parametrize("size", [0.0, 2.0**-10, 1.0, 256.0, np.inf, np.nan])
def test_ordinary_weights_have_the_unit_one(size):
    assert scales.find_exponent(jnp.full((2, 2), size)) == 0


@pytest.mark.parametrize("size", [2e-38, 1e-30, 1e-7, 9e-4, 257.0, 1e5, 3e38])
def test_a_unit_brings_a_weight_near_one_and_back_to_the_bit(size):
    w = jnp.asarray([[-size, size / 4]], jnp.float32)
    exponent = scales.find_exponent(w)
    unit = scales.times_power(w, -exponent)
    assert exponent % 2 == 0 and 0.5 <= float(jnp.max(jnp.abs(unit))) < 2
    if size > 1e-37:  # a quarter of less is subnormal
        np.testing.assert_array_equal(scales.times_power(unit, exponent), w)


BASES = {
    "dense": Dense(W),
    "affine": Affine.from_codes(CODES, HALF, CODES[:2], bits=2, group_size=16),
    "real zeros": Affine.from_codes(CODES, HALF, HALF, bits=2, group_size=16),
    "planes": BitPlanes.from_signs(CODES[None], HALF[None], HALF, group_size=16),
    "table": Codebook.from_codes(CODES, HALF, table="nf2", group_size=16, d_in=32),
    "double": Codebook.from_codes(CODES, DoubleScales.from_scales(HALF.astype(jnp.float32)),
                                  table="nf2", group_size=16, d_in=32),
    "levels": Codebook.from_levels(CODES, HALF, bits=1),
}  # fmt: skip
BASES["sum"] = Sum(BASES["table"], BASES["table"])
CORRECTIONS = {
    "low rank": LowRank(W[:, :2].astype(jnp.float16), W[:2].astype(jnp.float16)),
    "rounded": QuantizedLowRank.round(W[:, :2], W[:2], bits=4, group_size=16),
    "outliers": Outliers(jnp.arange(3, dtype=jnp.uint32), HALF[0, :3], 32, 8),
}


@pytest.mark.parametrize("exponent", [-80, -4, 4, 80])
@pytest.mark.parametrize("part", [*BASES, *CORRECTIONS])
def test_what_is_in_units_of_the_weight_is_rescaled_and_nothing_else(part, exponent):
    corrections = (CORRECTIONS[part],) if part in CORRECTIONS else ()
    around = ChannelScale(jnp.full(32, 0.5, jnp.float16))
    leaf = CompressedLinear(BASES.get(part, BASES["affine"]), corrections, around)
    new = scales.rescale(leaf, exponent)
    np.testing.assert_array_equal(new.dense(), scales.times_power(leaf.dense(), exponent))
    assert new.input_transform is leaf.input_transform or (new.input_transform.scale == 0.5).all()
    back = scales.rescale(new, -exponent)
    np.testing.assert_array_equal(back.dense(), leaf.dense())
    wide = any(a.dtype == jnp.float32 for a in jax.tree.leaves((new.base, new.corrections)))
    assert wide or abs(exponent) == 4


def test_a_report_says_what_became_float32_and_what_was_cut_off():
    leaf = CompressedLinear(BASES["affine"])
    assert scales.describe(leaf, leaf, 0) == []
    (line,) = scales.describe(leaf, scales.rescale(leaf, -40), -40)
    assert "2^-40" in line and "stored as float32" in line
    ends = jnp.asarray([[2.0**-24] * 3 + [1.0] * 4 + [65504.0]] * 2, jnp.float16)
    cut = CompressedLinear(Affine.from_codes(CODES, ends, None, bits=2, group_size=16))
    (line,) = scales.describe(cut, cut, 0)
    assert line.startswith("scales: 8 of 16 were beyond what float16 holds")


def test_scales_that_are_trained_are_float32_for_weights_far_from_one():
    leaf = CompressedLinear(Dense(W))
    assert scales.suit_dtype(jnp.float16, leaf) == jnp.float16
    small = scales.rescale(leaf, -20)
    assert scales.suit_dtype(jnp.float16, small) == jnp.float32
    # Shapes alone say nothing of sizes.
    assert jax.eval_shape(lambda w: jnp.zeros(1, scales.suit_dtype(jnp.float16, w)),
                          small).dtype == jnp.float16  # fmt: skip
