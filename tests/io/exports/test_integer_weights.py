"""Which weights the integer formats can hold, and how words leave us."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.exports.integer_weights import (
    as_words,
    cast_scales,
    describe_wide,
    is_packed,
    pack_rows,
    read_affine,
    read_zeros,
)
from lqec_jax.io.exports.walk import Placed
from lqec_jax.models.families import StoredTensor
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense
from tests.io.packed_models import make_leaf

STORED = StoredTensor("model.layers.0.q.weight", (32, 64), True)


def place(leaf):
    return Placed("blocks/0/q/kernel", STORED, leaf)


def leaf(**options):
    return make_leaf(np.random.default_rng(0), (64, 32), **{"bits": 3, **options})


def test_two_codes_by_hand():
    # 1 and 2 at two bits: 0b1001; the 30 rows of padding take no second word.
    assert pack_rows(np.array([[1], [2]], np.uint8), 2).tolist() == [[0b1001]]
    assert pack_rows(np.array([[0]] * 15 + [[2]], np.uint8), 2).tolist() == [[-(2**31)]]


def test_words_end_with_the_bits():
    words = np.zeros((6, 4), np.uint32)  # two runs of 32 codes of 3 bits
    assert as_words(words, 64, 3).shape == (6, 4)
    assert as_words(words, 40, 3).shape == (4, 4)  # 120 bits
    assert as_words(words, 40, 3).dtype == np.int32


def test_zeros_are_the_middle_or_what_is_stored():
    assert set(read_zeros(leaf().base).ravel().tolist()) == {4}
    base = leaf(symmetric=False).base
    zeros = read_zeros(base)
    assert zeros.shape == base.scales.shape and 1 <= zeros.min() < zeros.max() <= 7
    np.testing.assert_array_equal(zeros, base.columns()[2])


def test_packed_is_whatever_is_not_one_array():
    w = jnp.ones((64, 32))
    assert not is_packed(place(w)) and not is_packed(place(CompressedLinear(Dense(w))))
    assert is_packed(place(leaf()))
    assert is_packed(place(CompressedLinear(Dense(w), input_transform=ChannelScale(w[:, 0]))))
    assert is_packed(place(CompressedLinear(Dense(w), leaf(rank=1).corrections)))


def test_an_integer_grid_is_read():
    assert read_affine(place(leaf()), "gptq", (3,)).bits == 3


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (leaf(rank=1), "low-rank corrections, which gptq cannot hold; add --base-only"),
        (replace(leaf(), input_transform=ChannelScale(jnp.ones(64))), "an input_transform"),
        (replace(leaf(), output_transform=ChannelScale(jnp.ones(32))), "an output_transform"),
        (CompressedLinear(Dense(jnp.ones((64, 32)))), "a Dense base"),
        (leaf(bits=1), "1-bit codes"),
        (replace(leaf(), base=replace(leaf().base, zeros=jnp.ones((2, 32)))), "float32 zeros"),
    ],
)
def test_what_it_cannot_hold_is_named(value, what):
    with pytest.raises(InputError) as said:
        read_affine(place(value), "gptq", (2, 3, 4, 8))
    assert str(said.value).startswith("export: blocks/0/q/kernel has ") and what in str(said.value)
    assert "\n" not in str(said.value)


def test_scales_that_a_dtype_takes_for_zero_are_refused():
    half = np.dtype(np.float16)
    scales = np.array([[1e-9, 0.5, 0.0]], np.float32)
    with pytest.raises(InputError, match="blocks/0/q has 1 scales that float16 takes for zero"):
        cast_scales(scales, half, "blocks/0/q")
    np.testing.assert_array_equal(cast_scales(scales, None, "q"), scales)
    assert cast_scales(scales[:, 1:], half, "q").dtype == half


def test_scales_that_float16_does_not_hold_are_said():
    base = leaf().base
    fine = replace(base, scales=base.scales.astype(jnp.float32) * (1 + 2**-13))
    bases = [base, fine, *(replace(base, scales=fine.scales * by) for by in (1e-9, 1e9))]
    (line,) = describe_wide("gptq", bases)
    assert line.startswith("2 linears have float32 scales that float16 does not hold")
    assert describe_wide("gptq", bases[:2]) == []
