"""Trees: paths, stacks of blocks, and the split into what trains and what does not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.tree import (
    combine,
    drop_corrections,
    drop_input_grids,
    each_block,
    equal_trees,
    get_at,
    has_input_grids,
    is_compressed,
    partition,
    set_at,
    stack_blocks,
    unstack_blocks,
)
from lqec_jax.errors import InputError
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.inputs import InputGrid
from tests.io.packed_models import make_model


def compressed(seed: int = 0, rank: int = 2, zeros: bool = True) -> CompressedLinear:
    random = np.random.RandomState(seed)
    base = Affine(
        random.randint(0, 9, (2, 6)).astype(np.uint32),
        random.rand(2, 6).astype(np.float16),
        random.rand(2, 6).astype(np.float16) if zeros else None,
        bits=2,
        group_size=16,
        d_in=32,
    )
    adapter = LowRank(*(random.rand(*s).astype(np.float32) for s in ((32, rank), (rank, 6))))
    return CompressedLinear(base, (adapter,), ChannelScale(np.ones(32, np.float32)))


def block(seed: int = 0, **options) -> dict:
    norm = np.random.RandomState(seed).rand(32).astype(np.float32)
    return {"attn": {"q": {"kernel": compressed(seed, **options)}}, "norm": {"scale": norm}}


def assert_same(came, wanted) -> None:
    assert jax.tree.structure(came) == jax.tree.structure(wanted)
    for c, w in zip(jax.tree.leaves(came), jax.tree.leaves(wanted), strict=True):
        assert c.dtype == w.dtype
        np.testing.assert_array_equal(c, w)


def test_set_at_copies_the_path_and_shares_the_rest():
    tree = {"attn": {"q": {"kernel": 1}, "k": {"kernel": 2}}, "mlp": {"up": 3}}
    changed = set_at(tree, "attn/q/kernel", 9)
    assert get_at(changed, "attn/q/kernel") == 9
    assert get_at(tree, "attn/q/kernel") == 1
    assert changed["mlp"] is tree["mlp"] and changed["attn"]["k"] is tree["attn"]["k"]
    assert set_at({}, "a/b", 1) == {"a": {"b": 1}}
    with pytest.raises(KeyError):
        get_at(tree, "attn/o/kernel")


def test_blocks_of_one_structure_are_one_segment():
    blocks = [block(seed) for seed in range(3)]
    (segment,) = stack_blocks(blocks)
    assert segment["norm"]["scale"].shape == (3, 32)
    assert segment["attn"]["q"]["kernel"].base.bits == 2
    for came, wanted in zip(unstack_blocks([segment]), blocks, strict=True):
        assert_same(came, wanted)


@pytest.mark.parametrize(
    "change",
    [{"rank": 3}, {"zeros": False}],
    ids=["another shape", "another structure"],
)
def test_a_change_of_structure_starts_a_segment(change):
    blocks = [block(0), block(1), block(2, **change), block(3), block(4)]
    segments = stack_blocks(blocks)
    assert [segment["norm"]["scale"].shape[0] for segment in segments] == [2, 1, 2]
    for came, wanted in zip(unstack_blocks(segments), blocks, strict=True):
        assert_same(came, wanted)


def test_another_dtype_starts_a_segment():
    blocks = [{"w": np.zeros(3, np.float32)}, {"w": np.zeros(3, np.float16)}]
    assert [segment["w"].dtype for segment in stack_blocks(blocks)] == [jnp.float32, jnp.float16]


def test_no_blocks_are_no_segments():
    assert stack_blocks([]) == () and unstack_blocks(()) == []


def test_is_compressed_knows_a_leaf():
    assert is_compressed(compressed())
    assert not is_compressed(np.zeros((2, 2))) and not is_compressed({})


def chosen(params, select) -> set[str]:
    train, frozen = partition(params, select)
    names = [
        {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (train, frozen, params)
    ]
    assert names[0] | names[1] == names[2] and not names[0] & names[1]
    assert_same(combine(train, frozen), params)
    return {name.rsplit("['kernel']", 1)[-1] for name in names[0]}


def test_adapters_are_the_factors_of_corrections():
    assert chosen({"blocks": (block(),)}, "adapters") == {".corrections[0].a", ".corrections[0].b"}


def test_scales_and_zeros_are_the_floating_arrays_of_bases():
    assert chosen(block(), "scales") == {".base.scales"}
    assert chosen(block(), "zeros") == {".base.zeros"}
    assert chosen(block(zeros=False), "zeros") == set()
    packed = set_at(
        block(),
        "attn/q/kernel",
        CompressedLinear(
            Affine(np.zeros((2, 6), np.uint32), np.ones((2, 6), np.float16),
                   np.zeros((2, 2), np.uint32), 2, 16, 32)
        ),
    )  # fmt: skip
    assert chosen(packed, "scales") == {".base.scales"}
    assert chosen(packed, "zeros") == set()


def test_any_function_of_path_and_array_selects():
    def is_norm(path, leaf):
        return path[0].key == "norm" and leaf.ndim == 1

    assert chosen(block(), is_norm) == {"['norm']['scale']"}
    nothing, everything = partition(block(), lambda path, leaf: False)
    assert jax.tree.leaves(nothing) == [] and len(jax.tree.leaves(everything)) == 7


def test_gradients_of_the_trained_half_alone():
    params = {
        "q": CompressedLinear(Dense(jnp.eye(4)), (LowRank(jnp.ones((4, 1)), jnp.ones((1, 4))),))
    }
    train, frozen = partition(params)
    grads = jax.grad(lambda train: combine(train, frozen)["q"].dense()[1, 2])(train)
    assert grads["q"].base.w is None
    np.testing.assert_array_equal(grads["q"].corrections[0].a[:, 0], [0, 1, 0, 0])


def test_refuses_an_unknown_selection():
    with pytest.raises(InputError, match="select='adaptors' is unknown; did you mean 'adapters'"):
        partition(block(), "adaptors")


def test_blocks_come_in_order_over_segments():
    model = make_model((2, 3), (2, 2))
    blocks = list(each_block(model.params))
    assert [block["attn"]["q"]["kernel"].base.bits for block in blocks] == [2, 3]
    scale = model.params["blocks"][1]["attn_norm"]["scale"]
    np.testing.assert_array_equal(blocks[1]["attn_norm"]["scale"], scale[0])


def test_every_correction_goes_and_nothing_else():
    model = make_model()
    bare = drop_corrections(model.params)
    leaf, kept = (p["blocks"][0]["mlp"]["up"]["kernel"] for p in (bare, model.params))
    assert leaf.corrections == () and len(kept.corrections) == 1
    assert leaf.base is kept.base


def test_input_grids_go_and_nothing_else():
    leaf = compressed()
    params = {"q": replace(leaf, input_grid=InputGrid()), "norm": np.ones(3)}
    assert has_input_grids(params) and not has_input_grids({"q": leaf})
    came = drop_input_grids(params)
    assert came["q"].input_grid is None and came["q"].base is leaf.base
    assert came["q"].corrections is leaf.corrections and came["norm"] is params["norm"]


def test_equal_trees_are_of_the_same_nodes_and_bytes():
    leaf = compressed()
    nan = {"a": jnp.array([jnp.nan, 0.0], jnp.bfloat16), "b": np.zeros((), np.int32)}
    assert equal_trees(leaf, compressed()) and equal_trees(nan, dict(nan))
    assert equal_trees({"a": np.arange(6).reshape(2, 3).T}, {"a": np.arange(6).reshape(2, 3).T})
    assert not equal_trees(leaf, compressed(seed=1)) and not equal_trees(leaf, compressed(rank=3))
    assert not equal_trees(leaf, compressed(zeros=False))
    zero = np.zeros(2, np.float32)
    assert not equal_trees({"a": zero}, {"a": -zero})
    assert not equal_trees({"a": zero}, {"a": zero.astype(np.int32)})
    assert not equal_trees({"a": zero}, {"a": zero.reshape(2, 1)})
    assert not equal_trees({"a": zero}, {"b": zero})
