"""Packed codes: GPTQ's bit order, exact sizes, and back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.packing import RUN, pack, unpack, words_for

BITS = range(1, 17)


@partial(jax.jit, static_argnums=1)
def round_trip(codes: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    words = pack(codes, bits)
    return words, unpack(words, bits, codes.shape[-2])


def draw_codes(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return (
        np.random.RandomState(seed)
        .randint(0, 2**bits, shape)
        .astype(np.uint8 if bits <= 8 else np.uint16)
    )


def pack_by_integers(codes: np.ndarray, bits: int) -> np.ndarray:
    """GPTQ's order said with Python's unbounded integers: code i of a run is worth 2^(bits·i)."""
    rows, columns = codes.shape
    words = np.zeros((-(-rows // RUN) * bits, columns), np.uint32)
    for column in range(columns):
        for run in range(-(-rows // RUN)):
            stream = sum(
                int(code) << (bits * i)
                for i, code in enumerate(codes[run * RUN : (run + 1) * RUN, column])
            )
            for word in range(bits):
                words[run * bits + word, column] = (stream >> (32 * word)) & 0xFFFFFFFF
    return words


@pytest.mark.parametrize(
    ("bits", "rows"),
    [(bits, 33) for bits in (*range(1, 9), 10, 13, 16)]
    + [(2, 352), (3, 352), (5, 352), (3, 1), (3, 31)],
)
def test_bit_order_is_that_of_one_long_integer(bits, rows):
    codes = draw_codes(bits, (rows, 3), seed=rows)
    words, back = round_trip(codes, bits)
    assert words.dtype == jnp.uint32 and back.dtype == codes.dtype
    assert words.shape == (words_for(rows, bits), 3)
    np.testing.assert_array_equal(words, pack_by_integers(codes, bits))
    np.testing.assert_array_equal(back, codes)


def test_a_whole_run_wastes_no_bit():
    assert [words_for(352, bits) * 32 for bits in BITS] == [352 * bits for bits in BITS]


def test_three_bit_codes_straddle_words():
    # Code 10 sits on bits 30-32 and code 21 on bits 63-65: each is cut by a word's end.
    codes = np.zeros((32, 2), np.uint8)
    codes[10, 0], codes[21, 1] = 0b101, 0b110
    words = np.asarray(round_trip(codes, 3)[0])
    np.testing.assert_array_equal(words[:, 0], [1 << 30, 1, 0])
    np.testing.assert_array_equal(words[:, 1], [0, 0, 0b11])


@pytest.mark.parametrize("bits", [3, 7])
def test_a_code_disturbs_no_neighbour(bits):
    everywhere = 2**bits - 1
    one_hot = np.eye(RUN, dtype=np.uint8) * everywhere  # column i holds code i alone
    words, back = round_trip(one_hot, bits)
    np.testing.assert_array_equal(back, one_hot)
    ones = sum(int(word).bit_count() for word in np.asarray(words).ravel())
    assert ones == RUN * bits
    full, _ = round_trip(np.full_like(one_hot, everywhere), bits)
    np.testing.assert_array_equal(full, np.uint32(0xFFFFFFFF))


def test_padding_is_zero():
    words, _ = round_trip(np.full((33, 1), 15, np.uint8), 4)
    np.testing.assert_array_equal(words[:, 0], [0xFFFFFFFF] * 4 + [15, 0, 0, 0])


def test_leading_axes_are_vmapped_matrices():
    codes = draw_codes(3, (2, 3, 40, 5))
    words, back = round_trip(codes, 3)
    assert words.shape == (2, 3, 6, 5)
    np.testing.assert_array_equal(back, codes)
    each_words, each_back = jax.vmap(jax.vmap(lambda c: round_trip(c, 3)))(codes)
    np.testing.assert_array_equal(each_words, words)
    np.testing.assert_array_equal(each_back, codes)


def test_the_example_of_the_docstring():
    words, back = round_trip(jnp.array([[3], [1]], jnp.uint8), 2)
    np.testing.assert_array_equal(words, [[0b0111], [0]])
    np.testing.assert_array_equal(back[:, 0], [3, 1])
