"""What the base of a model is called, and that adapters are no part of its name."""

import hashlib

import jax
import numpy as np

from lqec_jax.core.tree import set_at, stack_blocks
from lqec_jax.io.artifact.leaves import flatten
from lqec_jax.io.base import drop_corrections, each_block, hash_base
from tests.io.packed_models import make_model


def test_the_hash_is_of_the_base_alone():
    model = make_model()
    wanted = hash_base(model.params)
    assert hash_base(drop_corrections(model.params)) == wanted
    other = jax.tree.map(lambda a: a, model.params)
    other["norm"] = {"scale": model.params["norm"]["scale"].at[3].add(1e-3)}
    assert hash_base(other) != wanted
    assert hash_base(make_model(symmetric=False).params) != wanted


def test_the_hash_does_not_see_how_blocks_are_stacked():
    model = make_model()
    apart = tuple(s for block in each_block(model.params) for s in stack_blocks([block]))
    assert (len(model.params["blocks"]), len(apart)) == (1, 2)
    assert hash_base({**model.params, "blocks": apart}) == hash_base(model.params)


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


def test_a_models_name_is_the_one_it_always_had():
    """Of arrays as `np.ascontiguousarray` gives them: a block's own window is an array of one."""
    model = make_model()
    segment = set_at(model.params["blocks"][0], "attn/window", np.array([3, 4], np.int32))
    params = {**model.params, "blocks": (segment,)}
    base = drop_corrections(params)
    blocks = {str(number): block for number, block in enumerate(each_block(base))}
    arrays = flatten({**base, "blocks": blocks})[0]
    assert arrays["blocks.1.attn.window"].shape == ()
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode() + array.tobytes())
    assert hash_base(params) == digest.hexdigest()
