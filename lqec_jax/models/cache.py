"""Keys and values of the tokens read so far, so that the next token reads them and no more.

A segment's cache is a pair of arrays of a fixed length, written in place where it is donated. What
lies beyond the tokens read is never looked at.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lqec_jax.core.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A segment's keys and values, [layers, b, length, kv_heads, head_dim] each."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def begin(cls, keys: jax.Array, values: jax.Array, length: int) -> "Cache":
        """Makes a cache of `length` tokens that begins with these, [layers, b, t, kv_heads, d]."""
        room = ((0, 0), (0, 0), (0, length - keys.shape[2]), (0, 0), (0, 0))
        return cls(jnp.pad(keys, room), jnp.pad(values, room))


class Past(NamedTuple):
    """What one layer's new tokens may read: its place in the cache, and where they begin.

    layer and position are int32 scalars.
    """

    cache: Cache
    layer: jax.Array
    position: jax.Array

    def write(self, k: jax.Array, v: jax.Array) -> "Past":
        """Puts new keys and values, [b, t, kv_heads, head_dim], at `position`."""
        place = (self.layer, 0, self.position, 0, 0)
        put = lambda into, x: lax.dynamic_update_slice(into, x[None].astype(into.dtype), place)  # noqa: E731
        return self._replace(cache=Cache(put(self.cache.keys, k), put(self.cache.values, v)))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's keys and values, [b, length, kv_heads, head_dim]."""
        take = lambda x: lax.dynamic_index_in_dim(x, self.layer, keepdims=False)  # noqa: E731
        return take(self.cache.keys), take(self.cache.values)


def count_layers(segment: Params) -> int:
    """Returns how many blocks a segment stacks."""
    return jax.tree.leaves(segment)[0].shape[0]
