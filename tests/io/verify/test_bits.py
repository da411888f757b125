"""The readers' bits, against numbers worked out by hand."""

import numpy as np
import pytest

from lqec_jax.io.verify.bits import read_codes


def test_two_codes_of_two_bits():
    # 0b10_01: code 0 is 1, code 1 is 2.
    words = np.array([[0b1001]], np.int32)
    assert read_codes(words, 2, 2).tolist() == [[1], [2]]


def test_the_highest_bit_is_no_sign():
    words = np.array([[-(2**31)]], np.int32)  # bit 31 alone
    assert read_codes(words, 2, 16)[:, 0].tolist() == [0] * 15 + [2]
    assert read_codes(words, 8, 4)[:, 0].tolist() == [0, 0, 0, 128]


def test_codes_of_three_bits_straddle_words():
    # Code 10 is bits 30-32: 0b110 puts bit 31 in the first word and bit 32 in the second.
    words = np.array([[0x80000000], [0x1]], np.uint32)
    codes = read_codes(words, 3, 12)[:, 0]
    assert codes.tolist() == [0] * 10 + [6, 0]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_an_octal_like_number_is_its_digits(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (32, 3))
    streams = [sum(int(code) << (bits * i) for i, code in enumerate(codes[:, c])) for c in range(3)]
    words = np.array(
        [[s >> (32 * w) & 0xFFFFFFFF for s in streams] for w in range(bits)], np.uint32
    )
    np.testing.assert_array_equal(read_codes(words, bits, 32), codes)


def test_columns_are_read_apart():
    words = np.array([[3, 12]], np.uint32)
    assert read_codes(words, 2, 2).tolist() == [[3, 0], [0, 3]]
