"""Blocks of a weight: every input has its place, and opened they are the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_kernels import Dense, prepare
from lqec_kernels.pallas_tiles import read_blocks
from tests.kernels.products import draw, draw_affine, draw_codebook, draw_sparse

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


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_weight(kind):
    d_in, make = KINDS[kind]
    base, x = prepare(make()), draw(2, d_in)

    @jax.jit
    def multiply(x, base):
        blocks = read_blocks(base)
        pieces = blocks.cut(x)  # [steps, parts, m, size]
        assert pieces.shape == (blocks.steps, blocks.parts, 2, blocks.size)
        opened = [jnp.stack(blocks.open(blocks.arrays, step)) for step in range(blocks.steps)]
        return jnp.einsum("spmi,spio->mo", pieces, jnp.stack(opened), precision="highest")

    wanted = x @ np.asarray(base.dense())
    np.testing.assert_allclose(multiply(x, base), wanted, atol=1e-5 * np.abs(wanted).max())


def test_arrays_are_words_and_float32_whose_last_axis_is_the_columns():
    blocks = read_blocks(prepare(draw_affine(3, 512, 5, group=64)))
    shapes = [(array.dtype.name, array.shape) for array in blocks.arrays]
    assert shapes == [
        ("int32", (2, 16, 5)),
        ("int32", (2, 8, 5)),
        ("float32", (2, 4, 5)),
        ("float32", (2, 4, 5)),
    ]
    # A whole weight's numbers are not said again for each unit.
    whole = read_blocks(prepare(draw_affine(2, 512, 5, group=512)))
    assert [array.shape[0] for array in whole.arrays] == [2, 1, 1]


def test_refuses_what_it_cannot_read_and_says_why():
    with pytest.raises(NotImplementedError, match="reads no Dense; 'xla' takes every format"):
        read_blocks(Dense(jnp.ones((4, 4))))
    with pytest.raises(NotImplementedError, match="groups of 60 rows and units of 256 share bl"):
        read_blocks(prepare(draw_affine(2, 300, 5, group=60)))
    with pytest.raises(NotImplementedError, match="chooses among 16 levels, not 256"):
        read_blocks(prepare(draw_codebook(8, 40, 5)))
