"""Blocks of a weight: every input has its place, and opened they are the weight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels import Dense, repack_for_kernels
from lqec_kernels.pallas_tiles import Groups, read_blocks
from tests.kernels.products import (
    dense_of,
    draw,
    draw_affine,
    draw_codebook,
    draw_sparse,
)

# Format -> d_in and what is drawn; units of 256 and of fewer, padded and whole.
KINDS = {
    "planes": (320, lambda: draw_affine(3, 320, 5, group=64)),
    "planes, groups of 48": (96, lambda: draw_affine(2, 96, 5, group=48, kind="floating")),
    "planes, groups larger than units": (768, lambda: draw_affine(2, 768, 3, group=384)),
    "levels of a table": (320, lambda: draw_codebook(4, 320, 5, group=64)),
    "levels of columns": (40, lambda: draw_codebook(3, 40, 5)),
    "two of four": (320, lambda: draw_sparse(3, 320, 5, group=32)),
    "two of four, one group": (2048, lambda: draw_sparse(4, 2048, 3, group=2048, kind="symmetric")),
    "planes, one group": (300, lambda: draw_affine(4, 300, 5, group=300, kind="symmetric")),
}


def open_all(blocks) -> jax.Array:
    """Opens every block from refs, as a kernel does: [steps, parts, size, columns]."""
    refs = [jax.new_ref(array) for array in blocks.arrays]
    return jnp.stack([jnp.stack(blocks.open(refs, step)) for step in range(blocks.steps)])


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_weight(kind, on_gpu):
    d_in, make = KINDS[kind]
    base, x = repack_for_kernels(make()), draw(2, d_in)

    @jax.jit
    def multiply(x, base):
        blocks = read_blocks(base, on_gpu=on_gpu)
        pieces = blocks.cut(x)  # [parts, m, rows]
        assert pieces.shape == (blocks.parts, 2, blocks.steps * blocks.size)
        pieces = pieces.reshape(blocks.parts, 2, blocks.steps, blocks.size)
        return jnp.einsum("pmsi,spio->mo", pieces, open_all(blocks), precision="highest")

    wanted = x @ np.asarray(dense_of(base))
    np.testing.assert_allclose(multiply(x, base), wanted, atol=1e-5 * np.abs(wanted).max())


def test_arrays_are_the_bases_own_stacks_too():
    base = repack_for_kernels(draw_affine(3, 512, 5, group=64, lead=(2,)))
    blocks = read_blocks(base)
    own = [*base.planes, base.scales, base.offsets]
    assert all(array is wanted for array, wanted in zip(blocks.arrays, own, strict=True))
    assert (blocks.steps, blocks.parts, blocks.size) == (2, 1, 256)
    # What is stacked is cut as one is.
    assert blocks.cut(jnp.ones((7, 3, 512))).shape == (7, 1, 3, 512)
    assert read_blocks(repack_for_kernels(draw_sparse(4, 512, 12, group=32))).cut(
        jnp.ones((7, 3, 512))
    ).shape == (7, 4, 3, 128)


def test_groups_say_which_of_their_numbers_a_unit_has():
    @partial(jax.jit, static_argnums=(0, 1))
    def read(size: int, step: int) -> list:
        numbers = jax.new_ref(jnp.arange(5.0)[:, None] * jnp.ones((5, 3)))
        return [row[0, 0] for row in Groups(size, 256).rows(numbers, jnp.int32(step))]

    def rows(size: int, step: int) -> list:
        return [float(row) for row in read(size, step)]

    assert rows(64, 0) == [0, 1, 2, 3]
    # 320 inputs: the second unit has one group more.
    assert rows(64, 1) == [4, 4, 4, 4]
    assert (rows(384, 0), rows(384, 1), rows(384, 2)) == ([0, 0], [0, 1], [1, 1])
    assert (rows(512, 1), rows(512, 2)) == ([0], [1])
    assert (Groups(96, 256).shared, Groups(512, 256).shared) == (32, 256)


def test_refuses_what_it_cannot_read_and_says_why():
    with pytest.raises(NotImplementedError, match="reads no Dense; 'xla' takes every format"):
        read_blocks(Dense(jnp.ones((4, 4))))
    with pytest.raises(NotImplementedError, match="groups of 60 rows and units of 256 share bl"):
        read_blocks(repack_for_kernels(draw_affine(2, 300, 5, group=60)))
    with pytest.raises(NotImplementedError, match="chooses among 16 levels, not 256"):
        read_blocks(repack_for_kernels(draw_codebook(8, 40, 5)))
