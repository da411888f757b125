"""Keys and values of the tokens read so far, so that the next token reads them and no more.

A segment's cache is a pair of arrays of a fixed length, written in place where it is donated. What
lies beyond the tokens read is never looked at. Both arrays end in the axis that a product sums
over, and XLA is held to that order: in another it turns a layer's values around for every new
token, and in those of its own choice the whole cache.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from lqec_jax.core.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """A segment's keys and values.

    Attributes:
      keys: [layers, b, kv_heads, length, head_dim].
      values: [layers, b, kv_heads, head_dim, length].
    """

    keys: jax.Array
    values: jax.Array

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    @classmethod
    def begin(cls, keys: jax.Array, values: jax.Array, length: int) -> "Cache":
        """Makes a cache of `length` tokens that begins with these, arranged as they are in it."""
        none, room = (0, 0), (0, length - keys.shape[3])
        keys = jnp.pad(keys, (none, none, none, room, none))
        return cls(keys, jnp.pad(values, (none, none, none, none, room)))


class Past(NamedTuple):
    """What one layer's new tokens may read: its place in the cache, and where they begin.

    layer and position are int32 scalars.
    """

    cache: Cache
    layer: jax.Array
    position: jax.Array

    def write(self, k: jax.Array, v: jax.Array) -> "Past":
        """Puts new keys and values, [b, t, kv_heads, head_dim], at `position`."""
        k, v = arrange(k, v)
        keys, values = self.cache.keys, self.cache.values
        place = (self.layer, 0, 0, self.position, 0)
        keys = lax.dynamic_update_slice(keys, k[None].astype(keys.dtype), place)
        place = (self.layer, 0, 0, 0, self.position)
        values = lax.dynamic_update_slice(values, v[None].astype(values.dtype), place)
        return self._replace(cache=Cache(_in_order(keys), _in_order(values)))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Returns the layer's keys [b, kv_heads, length, d] and values [b, kv_heads, d, length]."""
        take = lambda x: lax.dynamic_index_in_dim(x, self.layer, keepdims=False)  # noqa: E731
        return take(self.cache.keys), take(self.cache.values)


def arrange(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns a layer's keys and values [b, t, kv_heads, d] to the order of the cache."""
    return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)


def _in_order(array: jax.Array) -> jax.Array:
    """Says that the axes lie in memory as they are written."""
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))


def count_layers(segment: Params) -> int:
    """Returns how many blocks a segment stacks."""
    return jax.tree.leaves(segment)[0].shape[0]
