"""The one owner of addresses: what is put is got, what lies beside stays, numbers go in order."""

import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.sites import (
    Site,
    each,
    get,
    get_all,
    in_groups,
    kernel_path,
    linear_path,
    map_block,
    map_model,
    put,
    put_all,
)
from lqec_kernels.formats import CompressedLinear, Dense

SITES = in_groups([("attn/q", "attn/k"), ("mlp/down",)], row_parallel=["mlp/down"])
PATHS = [site.path for site in SITES]


def make_block(start: float = 0.0) -> dict:
    q, k, down = (np.full((2, 3), start + i, np.float32) for i in range(3))
    attn = {"q": {"kernel": q, "bias": np.ones(3)}, "k": {"kernel": k}}
    return {"attn": attn, "mlp": {"down": {"kernel": down}}, "norm": {"scale": np.ones(2)}}


def test_sites_of_groups_say_group_and_split():
    assert [site.group for site in SITES] == [0, 0, 1]
    assert [site.split for site in SITES] == ["out", "out", "in"]
    assert SITES == in_groups(iter([["attn/q", "attn/k"], ["mlp/down"]]), ("mlp/down",))


def test_a_shape_has_its_experts_in_front():
    assert Site("mlp/up", 8, 12).shape == (8, 12)
    assert Site("mlp/up", 8, 12, experts=4).shape == (4, 8, 12)


@pytest.mark.parametrize("path", ["q", "attn/q", "blocks/3/attn/q"])
def test_an_address_belongs_to_its_linear(path):
    assert linear_path(kernel_path(path)) == path
    assert kernel_path(Site(path, 2, 3)) == kernel_path(path)


@pytest.mark.parametrize("other", ["kernel", "/kernel", "attn/q/bias", "norm/scale", "q/mykernel"])
def test_other_addresses_belong_to_no_linear(other):
    assert linear_path(other) is None


@pytest.mark.parametrize("site", [SITES[0], "attn/q"], ids=["site", "path"])
def test_what_is_put_is_got_and_all_else_is_shared(site):
    block, new = make_block(), np.zeros((5, 5))
    changed = put(block, site, new)
    assert get(changed, site) is new and get(block, site) is block["attn"]["q"]["kernel"]
    assert changed["attn"]["q"]["bias"] is block["attn"]["q"]["bias"]
    assert changed["attn"]["k"] is block["attn"]["k"] and changed["mlp"] is block["mlp"]


def test_a_linear_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError, match="gate"):
        get(make_block(), "mlp/gate")


def test_all_weights_go_out_and_in_by_path():
    leaves = get_all(make_block(), SITES)
    assert list(leaves) == PATHS and [w[0, 0] for w in leaves.values()] == [0, 1, 2]
    again = get_all(put_all(make_block(7), leaves), PATHS)
    assert all(again[path] is leaves[path] for path in PATHS)


def test_a_block_is_changed_at_its_linears_alone():
    block = make_block()
    changed = map_block(block, SITES[:2], lambda w: w + 1)
    assert [w[0, 0] for w in get_all(changed, SITES).values()] == [1, 2, 2]
    assert changed["norm"] is block["norm"] and changed["mlp"] is block["mlp"]


def test_each_goes_segment_after_segment():
    params = {"blocks": (make_block(), make_block(3)), "embed": None}
    seen = [(path, w[0, 0]) for path, w in each(params, iter(SITES))]
    assert seen == list(zip(PATHS * 2, range(6), strict=True))


def test_a_model_is_changed_where_it_is_compressed_and_every_linear_has_its_number():
    leaf = CompressedLinear(Dense(jnp.ones((1, 2, 3))))
    params = {"blocks": (put(make_block(), "attn/k", leaf), make_block()), "embed": 5}
    params["blocks"] = (params["blocks"][0], put(params["blocks"][1], "mlp/down", leaf))
    seen = []
    changed = map_model(params, iter(SITES), lambda leaf, number: seen.append(number) or number)
    assert seen == [1, 5] and changed["embed"] == 5
    assert get(changed["blocks"][0], "attn/k") == 1 and get(changed["blocks"][1], "mlp/down") == 5
    assert get(changed["blocks"][1], "attn/k") is get(params["blocks"][1], "attn/k")
