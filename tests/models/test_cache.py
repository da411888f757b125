"""A cache is written where it should be, and only there."""

import jax.numpy as jnp
import numpy as np

from lqec_jax.models.cache import Cache, Past, count_layers

RNG = np.random.default_rng(0)
LAYERS, B, KV, D = 3, 2, 2, 4


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_a_cache_begins_with_the_prompt_and_has_room():
    keys, values = draw(LAYERS, B, 5, KV, D), draw(LAYERS, B, 5, KV, D)
    cache = Cache.begin(keys, values, 8)
    assert cache.keys.shape == cache.values.shape == (LAYERS, B, 8, KV, D)
    np.testing.assert_array_equal(cache.keys[:, :, :5], keys)
    np.testing.assert_array_equal(cache.values[:, :, :5], values)


def test_a_write_touches_one_layer_at_one_place():
    before = Cache(draw(LAYERS, B, 8, KV, D), draw(LAYERS, B, 8, KV, D))
    k, v = draw(B, 2, KV, D), draw(B, 2, KV, D)
    past = Past(before, jnp.int32(1), jnp.int32(5)).write(k, v)
    for was, now, new in ((before.keys, past.cache.keys, k), (before.values, past.cache.values, v)):
        np.testing.assert_array_equal(now, was.at[1, :, 5:7].set(new))
    for whole, read in zip((past.cache.keys, past.cache.values), past.read(), strict=True):
        np.testing.assert_array_equal(read, whole[1])


def test_layers_are_counted():
    assert count_layers({"a": np.zeros((4, 2)), "b": {"c": np.zeros(4)}}) == 4
