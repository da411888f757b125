"""Codebook's scalars in planes: the same weight to the bit, exact sizes."""

import jax
import numpy as np
import pytest

from lqec_kernels import Codebook, repack_for_kernels
from lqec_kernels.level_planes import LevelPlanes
from tests.kernels.products import dense_of, draw_codebook

KINDS = {
    "a table": lambda: draw_codebook(4, 320, 6, group=64),
    "a table, scales of scales": lambda: draw_codebook(4, 320, 6, group=64, double=True),
    "levels a column": lambda: draw_codebook(3, 40, 6),
    "a stack": lambda: draw_codebook(2, 40, 6, group=8, lead=(2,)),
    "one scale": lambda: Codebook.from_codes(
        np.arange(80).reshape(40, 2) % 8, np.float32([[3]]), table="nf3", group_size=40, d_in=40
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_same_weight_to_the_bit(kind):
    base = KINDS[kind]()
    planes = repack_for_kernels(base)
    assert type(planes) is LevelPlanes
    assert (planes.d_in, planes.d_out, planes.bits) == (base.d_in, base.d_out, base.bits)
    np.testing.assert_array_equal(dense_of(planes), dense_of(base))


def test_scales_of_scales_stay_so_and_sizes_are_the_bytes_held():
    plain, double = (
        repack_for_kernels(KINDS[k]()) for k in ("a table", "a table, scales of scales")
    )
    codes = 512 * 6 * 4  # two units of 256 stand for 320 inputs
    assert plain.stored_bits() == codes + 5 * 6 * 32
    assert double.stored_bits() == codes + 5 * 6 * 8 + 32 + 32
    assert plain.stored_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(plain))


def test_units_and_groups_are_not_parted():
    assert repack_for_kernels(draw_codebook(4, 768, 6, group=384)).unit(-2) == 768
    assert repack_for_kernels(draw_codebook(4, 512, 6, group=64)).unit(-2) == 256
    assert repack_for_kernels(draw_codebook(3, 40, 6)).unit(-2) == 64
    assert repack_for_kernels(draw_codebook(3, 40, 6)).unit(-1) == 1
