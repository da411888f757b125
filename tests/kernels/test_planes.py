"""Codes in planes: where each lies, exact sizes, and back; a base like any other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels.planes import WIDTHS, Planes, choose_unit, join_planes, split_codes

SIZES = [(2, 256), (3, 256), (4, 300), (8, 40), (3, 40), (2, 1)]


def draw_codes(bits: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 2**bits, shape).astype(np.uint8)


def split_by_numpy(codes: np.ndarray, bits: int, unit: int) -> list[np.ndarray]:
    """The layout said code by code: plane p, word r, bits p·s hold the code of input r + s·rows."""
    d_in, n = codes.shape
    units, below, planes = -(-d_in // unit), 0, []
    for width in WIDTHS[bits]:
        rows = unit * width // 32
        words = np.zeros((units * rows, n), np.uint32)
        for i in range(d_in):
            s, r = divmod(i % unit, rows)
            part = codes[i].astype(np.uint32) >> below & (2**width - 1)
            words[i // unit * rows + r] |= part << np.uint32(width * s)
        planes.append(words)
        below += width
    return planes


@pytest.mark.parametrize(("bits", "d_in"), SIZES)
def test_each_code_lies_where_the_layout_says(bits, d_in):
    codes, unit = draw_codes(bits, d_in, 3), choose_unit(d_in)

    @jax.jit
    def there_and_back(codes):
        planes = split_codes(codes, bits, unit)
        return planes, join_planes(planes, bits, unit, d_in)

    planes, back = there_and_back(codes)
    for came, wanted in zip(planes, split_by_numpy(codes, bits, unit), strict=True):
        assert came.dtype == jnp.uint32
        np.testing.assert_array_equal(came, wanted)
    np.testing.assert_array_equal(back, codes)


def test_the_widths_of_planes_sum_to_the_bits_and_are_powers_of_two():
    assert set(WIDTHS) == {2, 3, 4, 8}
    for bits, widths in WIDTHS.items():
        assert sum(widths) == bits and all(32 % width == 0 for width in widths)


def test_a_unit_is_256_inputs_or_what_a_small_weight_needs():
    sizes = {1: 32, 32: 32, 33: 64, 128: 128, 129: 256, 256: 256, 257: 256, 11008: 256}
    assert {d_in: choose_unit(d_in) for d_in in sizes} == sizes


def draw_planes(bits: int, d_in: int, group: int, lead: tuple = ()) -> tuple:
    codes = draw_codes(bits, *lead, d_in, 6)
    random = np.random.RandomState(1)
    scales = (0.1 + random.rand(*lead, d_in // group, 6)).astype(np.float16)
    offsets = (random.rand(*scales.shape) * 2**bits).astype(np.float32)
    make = jax.jit(partial(Planes.from_codes, bits=bits, group_size=group))
    return make(codes, scales, offsets), codes, scales, offsets


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_weight_and_a_stack_are_their_equation(lead):
    base, codes, scales, offsets = draw_planes(3, 300, 60, lead)
    spread = [np.repeat(a.astype(np.float32), 60, axis=-2) for a in (scales, offsets)]
    wanted = (codes.astype(np.float32) - spread[1]) * spread[0]
    dense = jax.jit(lambda base: base.dense())
    np.testing.assert_array_equal(dense(base), wanted)
    if lead:
        np.testing.assert_array_equal(jax.jit(jax.vmap(Planes.dense))(base), wanted)
    assert (base.d_in, base.d_out, base.unit_size) == (300, 6, 256)
    assert hash(base.layout) == hash(draw_planes(3, 300, 60)[0].layout)


def test_stored_bits_are_the_bytes_held():
    base, *_ = draw_planes(3, 300, 60)
    # Two units of 256 codes stand for 300.
    assert base.stored_bits() == 6 * (512 * 3 + 5 * (16 + 32))
    assert base.stored_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(base))


def test_units_and_groups_are_not_parted():
    base, *_ = draw_planes(4, 512, 64)
    assert (base.unit(-2), base.unit(-1)) == (256, 1)
    assert draw_planes(4, 768, 384)[0].unit(-2) == 768
    # What belongs to all inputs does not keep them together.
    assert draw_planes(4, 768, 768)[0].unit(-2) == 256
    # Each share of a weight that is split along its inputs is a weight.
    half = jax.tree.map(lambda array: np.split(array, 2)[1], base.columns())
    dense = Planes(half[:1], half[1], half[2], 4, 64, 256, 256).dense()
    np.testing.assert_array_equal(dense, base.dense()[256:])
