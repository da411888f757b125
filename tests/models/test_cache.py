"""A cache is written where it should be, and only there."""

import jax.numpy as jnp
import numpy as np

from lqec_jax.models.cache import Cache, Past, count_layers

RNG = np.random.default_rng(0)
LAYERS, B, KV, D = 3, 2, 2, 4


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def draw_cache(length: int) -> Cache:
    return Cache(draw(LAYERS, B, KV, length, D), draw(LAYERS, B, KV, D, length))


def test_a_cache_begins_with_the_prompt_and_has_room():
    given = draw_cache(5)
    cache = Cache.begin(given.keys, given.values, 8)
    assert cache.length == 8
    assert cache.keys.shape == (LAYERS, B, KV, 8, D)
    assert cache.values.shape == (LAYERS, B, KV, D, 8)
    np.testing.assert_array_equal(cache.keys[:, :, :, :5], given.keys)
    np.testing.assert_array_equal(cache.values[..., :5], given.values)


def test_a_write_touches_one_layer_at_one_place():
    before = draw_cache(8)
    k, v = draw(B, 2, KV, D), draw(B, 2, KV, D)
    past = Past(before, jnp.int32(1), jnp.int32(5)).write(k, v)
    keys = before.keys.at[1, :, :, 5:7].set(np.einsum("bthd->bhtd", k))
    values = before.values.at[1, ..., 5:7].set(np.einsum("bthd->bhdt", v))
    np.testing.assert_array_equal(past.cache.keys, keys)
    np.testing.assert_array_equal(past.cache.values, values)
    for whole, read in zip((keys, values), past.read(), strict=True):
        np.testing.assert_array_equal(read, whole[1])


def test_layers_are_counted():
    assert count_layers({"a": np.zeros((4, 2)), "b": {"c": np.zeros(4)}}) == 4
