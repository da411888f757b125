"""What every part has: nothing moves unless it says so, and nothing is lost where it is stored."""

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.train.parts import Norms, Part, Rest
from lqec_jax.train.parts.part import attributes, is_floating, put_weight, store_as
from lqec_kernels.formats import ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.sparse import Masked
from tests.train.tiny import Shrink

W = jnp.asarray(np.random.RandomState(0).standard_normal((32, 8)), jnp.float32)
LEAF = CompressedLinear(Dense(W), (LowRank(jnp.ones((32, 2)), jnp.ones((2, 8))),))
KEY = jax.random.key(0)


def test_a_part_that_says_nothing_moves_nothing():
    part = Part().named("a_method")
    assert part.method == "a_method"
    assert part.begin(LEAF, KEY) is part.read(LEAF) is part.keep(LEAF, LEAF) is LEAF
    assert part.unmoved(LEAF, LEAF) is part.solve(LEAF, LEAF, None) is LEAF
    assert part.count(LEAF) == 0 and part.optimizers(64, 10) == {}


def test_without_a_gain_what_was_put_in_is_stored_as_it_began():
    part = Shrink(first=0.5)
    kept = part.unmoved(part.begin(LEAF, KEY), LEAF)
    np.testing.assert_array_equal(kept.base.w, 0.5 * W)


def test_numbers_are_counted_from_shapes_alone():
    shapes = jax.eval_shape(lambda: LEAF)
    assert Shrink(each=True).count(shapes) == 32 * 8 and Shrink().count(shapes) == 1
    assert Norms().count(shapes) == Rest().count(shapes) == 0


def test_a_path_tells_the_fields_of_a_weight():
    tree = {"blocks": ({"mix": {"kernel": LEAF, "bias": jnp.ones(8)}},)}
    found = {jax.tree_util.keystr(path): attributes(path)
             for path, _ in jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip
    assert list(found.values()) == [[], ["base", "w"], ["corrections", "a"], ["corrections", "b"]]
    assert is_floating(W) and not is_floating(jnp.arange(3))


def test_arrays_are_stored_in_the_dtype_they_had_within_its_range():
    half = jnp.ones(3, jnp.float16)
    stored = store_as(half, jnp.array([0.1, 1e6, -1e6]))
    assert stored.dtype == jnp.float16
    np.testing.assert_array_equal(stored, np.array([0.1, 65504, -65504], np.float16))
    assert store_as(W, W) is W


def test_a_weight_alone_is_read_as_an_array_and_all_else_stays():
    bare = CompressedLinear(Dense(W))
    assert put_weight(bare, 2 * W).shape == W.shape
    for leaf in (
        LEAF,
        CompressedLinear(Masked.from_mask(Dense(W), W > 0)),
        CompressedLinear(Dense(W), input_transform=ChannelScale(jnp.linspace(0.5, 2.0, 32))),
    ):
        read = put_weight(leaf, 2 * leaf.base.dense())
        assert jax.tree.structure(read) == jax.tree.structure(leaf)
        np.testing.assert_array_equal(read.base.dense(), 2 * leaf.base.dense())
        assert read.corrections is leaf.corrections
