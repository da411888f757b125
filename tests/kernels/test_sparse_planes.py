"""Two of four in planes: the same weight to the bit, exact sizes."""

import jax
import numpy as np
import pytest

from lqec_kernels import repack_for_kernels
from lqec_kernels.planes import join_planes
from lqec_kernels.sparse import Sparse24
from lqec_kernels.sparse_planes import SparsePlanes
from tests.kernels.products import dense_of, draw_affine, draw_sparse

KINDS = {
    "3 bits": lambda: draw_sparse(3, 320, 6, group=32),
    "floating zeros": lambda: draw_sparse(4, 64, 6, group=16, kind="floating"),
    "one group of odd fours": lambda: draw_sparse(2, 36, 6, group=36, kind="symmetric"),
    "a stack": lambda: draw_sparse(2, 64, 6, group=16, lead=(2,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_same_weight_to_the_bit(kind):
    base = KINDS[kind]()
    planes = repack_for_kernels(base)
    assert type(planes) is SparsePlanes
    assert (planes.d_in, planes.d_out, planes.bits) == (base.d_in, base.d_out, base.inner.bits)
    dense = dense_of(planes)
    np.testing.assert_array_equal(dense, dense_of(base))
    assert np.count_nonzero(dense) <= dense.size // 2


def test_firsts_and_seconds_lie_apart():
    base = KINDS["3 bits"]()
    planes = repack_for_kernels(base)
    first, second = (
        join_planes(places, 2, planes.unit_size, 80)
        for places in (planes.first_places, planes.second_places)
    )
    assert np.all(first < second)
    kept = np.asarray(base.kept()).reshape(80, 4, 6)
    np.testing.assert_array_equal(first, kept.argmax(axis=1))


def test_stored_bits_are_the_bytes_held():
    planes = repack_for_kernels(KINDS["3 bits"]())
    # 80 fours take one unit of 128.
    assert planes.stored_bits() == 6 * (128 * 2 * (3 + 2) + 10 * (16 + 8))
    assert planes.stored_bits() == 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(planes))


def test_units_and_groups_are_not_parted():
    assert repack_for_kernels(draw_sparse(2, 2048, 2, group=64)).unit(-2) == 4 * 256
    assert repack_for_kernels(draw_sparse(2, 3072, 2, group=1536)).unit(-2) == 4 * 768
    assert (
        repack_for_kernels(draw_sparse(2, 2048, 2, group=2048, kind="symmetric")).unit(-2)
        == 4 * 256
    )
    assert repack_for_kernels(KINDS["3 bits"]()).unit(-1) == 1


def test_what_no_kernel_could_read_stays():
    five = draw_sparse(5, 64, 6, group=16)
    assert repack_for_kernels(five) is five
    # Groups of three kept weights part fours.
    three = Sparse24(draw_affine(2, 36, 6, group=3), KINDS["one group of odd fours"]().positions)
    assert repack_for_kernels(three) is three
