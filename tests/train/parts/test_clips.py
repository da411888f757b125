"""Clipped ranges as what moves: where they begin, how they are read, and that reads are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.clipping import START, Clipped
from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.linear import linear
from lqec_jax.errors import InputError
from lqec_jax.train.parts import Clips
from lqec_jax.train.rates import Rates
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.sparse import Masked

GRID = GroupGrid(bits=2, group_size=16)
KEY = jax.random.key(0)
W = jnp.asarray(np.random.RandomState(0).standard_normal((32, 8)), jnp.float32)
SCALE = jnp.linspace(0.5, 2.0, 32)
LEAVES = {
    "bare": CompressedLinear(Dense(W)),
    "adapter": CompressedLinear(Dense(W), (LowRank(jnp.ones((32, 2)), jnp.ones((2, 8)) / 9),)),
    "transform": CompressedLinear(Dense(W), input_transform=ChannelScale(SCALE)),
    "zeros": CompressedLinear(Masked.from_mask(Dense(W), W > -0.5)),
}


def begin(part: Clips, leaf: CompressedLinear) -> CompressedLinear:
    """Begins, and draws the ranges in here and there."""
    begun = part.begin(leaf, KEY)
    moves = np.random.RandomState(1)

    def move(path, array):
        if not part.label(path, array):
            return array
        assert array.dtype == jnp.float32 and (array == START).all()
        return array - jnp.asarray(4 * moves.random(array.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(move, begun)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", LEAVES)
def test_what_is_read_is_what_is_stored(name, symmetric):
    leaf = LEAVES[name]
    whole, tiled = (Clips(grid=GroupGrid(2, 16, symmetric), tiled=t) for t in (False, True))
    begun = begin(whole, leaf)
    assert isinstance(begun.base, Clipped)
    stored = whole.keep(begun, leaf)
    x = jnp.asarray(np.random.RandomState(2).standard_normal((5, 32)), jnp.float32)
    wanted = linear(x, stored)
    np.testing.assert_allclose(linear(x, whole.read(begun)), wanted, rtol=1e-5, atol=1e-5)
    assert tiled.read(begun) is begun
    read = whole.read(begun)
    base = read if isinstance(read, jax.Array) else read.base.dense()
    np.testing.assert_array_equal(base, stored.base.dense())
    if name != "zeros":  # what was set to zero is set again when it is stored
        np.testing.assert_array_equal(begun.base.dense(), stored.base.dense())
    for what in ("corrections", "input_transform"):
        assert getattr(stored, what) is getattr(begun, what)


def test_only_ends_move_each_by_its_rate():
    part = Clips(grid=GRID, rates=Rates(0.3, "constant"))
    begun = part.begin(LEAVES["adapter"], KEY)
    labels = [part.label(path, a) for path, a in jax.tree_util.tree_leaves_with_path(begun)]
    assert labels.count("clips") == 2 and set(labels) == {"clips", None}
    ends = {"upper": begun.base.upper}
    (optimizer,) = part.optimizers(64, 10).values()
    step, _ = optimizer.update(jax.tree.map(jnp.ones_like, ends), optimizer.init(ends), ends)
    np.testing.assert_allclose(step["upper"], -0.3, rtol=1e-4)


def test_ends_are_counted_and_a_group_that_does_not_divide_is_refused():
    shapes = jax.eval_shape(lambda: LEAVES["bare"])
    assert Clips(grid=GRID).count(shapes) == 2 * 2 * 8
    assert Clips(grid=GroupGrid(2, 16, True)).count(shapes) == 2 * 8
    with pytest.raises(InputError, match="a_method: d_in=32 is not divisible by group_size=24"):
        Clips(grid=GroupGrid(2, 24)).named("a_method").count(shapes)
