"""x @ base in plain XLA, one tile of output columns at a time: the oracle and the CPU path.

Memory: neither direction holds more than one tile of the dense weight. The residual of the forward
pass is the packed base, never its dense copy. `jax.checkpoint` alone does not promise that (XLA
inlines one-block loops and keeps the copies), the inner scan over at least two tiles does.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lqec_kernels.formats import Base, Layout

# A tile's dense copy is at most this many elements, unless a dense half is smaller still.
TILE_ELEMENTS = 4 * 2**20


class Cut(NamedTuple):
    """How the output columns are walked: each of `shards` shares in `tiles` steps."""

    d_in: int
    shards: int
    tiles: int


def tiled_matmul(x: jax.Array, base: Base, *, shards: int = 1) -> jax.Array:
    """Multiplies by a stored weight without making it dense: y = x @ base.dense().

    Args:
      x: floating [..., d_in]; the product has its dtype, sums are float32 or wider.
      base: any format of `formats`, unstacked.
      shards: over how many devices the columns are split; tiles are cut inside each share, so that
        every device works on its own columns of every tile.
    Returns:
      [..., d_out] of x.dtype. Differentiable in x and in the base's floating arrays (scales,
      zeros), whose gradients are computed only where they are asked for.
    Cost: 2 · tokens · d_in · d_out flops, and the base is unpacked once per direction.
    """
    if base.d_out % shards:
        shards = 1
    tiles = _count_tiles(base.d_in, base.d_out, shards)
    return _tiled(base.layout, Cut(base.d_in, shards, tiles), x, base.columns())


def _count_tiles(d_in: int, d_out: int, shards: int) -> int:
    """Returns the least count >= 2 that cuts each share evenly into small enough tiles.

    An odd width has no even cut; a prime one is one column a tile, which is slow but never dense.
    """
    share = d_out // shards
    wanted = max(2, -(-d_in * d_out // (TILE_ELEMENTS * shards)))
    return next((n for n in range(min(wanted, share), share + 1) if share % n == 0), 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(layout: Layout, cut: Cut, x: jax.Array, columns: tuple) -> jax.Array:
    def multiply(y, number):
        w = layout.dense(_take(columns, number, cut), x.dtype)
        tile = jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
        tile = tile.reshape(*tile.shape[:-1], cut.shards, 1, -1)  # [..., shards, 1, n]
        return lax.dynamic_update_slice_in_dim(y, tile, number, axis=-2), None

    d_out = jax.tree.leaves(columns)[0].shape[-1]
    y = _unset_like(x, (*x.shape[:-1], cut.shards, cut.tiles, d_out // (cut.shards * cut.tiles)))
    y, _ = lax.scan(multiply, y, jnp.arange(cut.tiles))
    return y.reshape(*x.shape[:-1], d_out)  # [..., d_out]


def _forward(layout: Layout, cut: Cut, x, columns):
    # x is kept only where a floating array of the base is being trained.
    trained = any(leaf.perturbed and _is_float(leaf.value) for leaf in jax.tree.leaves(columns))
    columns = jax.tree.map(lambda leaf: leaf.value, columns)
    return _tiled(layout, cut, x.value, columns), (x.value if trained else None, columns)


def _backward(layout: Layout, cut: Cut, residual, dy):
    x, columns = residual
    if isinstance(dy, SymbolicZero):
        return None, None

    def multiply(dx, number):
        dy_tile = _take(dy, number, cut)
        floats, rest = _part_floats(_take(columns, number, cut))
        w, pull = jax.vjp(lambda floats: layout.dense(_unite(floats, rest), dy.dtype), floats)
        dx = jnp.where(number == 0, 0.0, dx) + _dot_transpose(dy_tile, w, cut)
        if x is None:
            return dx, None
        dw = jnp.einsum("...i,...o->io", x, dy_tile, preferred_element_type=jnp.float32)
        return dx, pull(dw.astype(w.dtype))[0]

    dx = _unset_like(dy.astype(jnp.float32), (cut.shards, *dy.shape[:-1], cut.d_in))
    dx, d_floats = lax.scan(multiply, dx, jnp.arange(cut.tiles))
    d_columns = None if x is None else jax.tree.map(lambda d: _join(d, cut), d_floats)
    return jnp.sum(dx, axis=0).astype(dy.dtype), d_columns


_tiled.defvjp(_forward, _backward, symbolic_zeros=True)


def _unset_like(x: jax.Array, shape: tuple) -> jax.Array:
    """Returns room that a loop will fill, its content some of x's numbers.

    Zeros would do, but they depend on nothing: XLA's CPU scheduler then makes the room of every
    product of the program before the first of them runs.
    """
    return jnp.broadcast_to(x.ravel()[0], shape)


def _dot_transpose(dy: jax.Array, w: jax.Array, cut: Cut) -> jax.Array:
    """Returns dy wᵀ as one partial sum a share, so that devices add up once and not once a tile."""
    dy = dy.reshape(*dy.shape[:-1], cut.shards, -1)  # [..., shards, n]
    w = w.reshape(cut.d_in, cut.shards, -1)  # [d_in, shards, n]
    return jnp.einsum("...sn,isn->s...i", dy, w, preferred_element_type=jnp.float32)


def _take(columns, number, cut: Cut):
    """Returns one tile: [..., d_out] -> [..., d_out / tiles].

    Tiles are sliced inside the loop; cut before it, they would be a second copy of the packed
    arrays.
    """

    def take(array):
        lead = array.shape[:-1]
        array = array.reshape(*lead, cut.shards, cut.tiles, -1)
        tile = lax.dynamic_index_in_dim(array, number, axis=-2, keepdims=False)
        return tile.reshape(*lead, -1)  # [..., shards · n]

    return jax.tree.map(take, columns)


def _join(tiles: jax.Array, cut: Cut) -> jax.Array:
    """Puts tiles side by side: [tiles, ..., d_out / tiles] -> [..., d_out]."""
    tiles = tiles.reshape(*tiles.shape[:-1], cut.shards, -1)
    array = jnp.moveaxis(tiles, 0, -2)  # [..., shards, tiles, n]
    return array.reshape(*array.shape[:-3], -1)


def _is_float(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _part_floats(columns: tuple) -> tuple[tuple, tuple]:
    """Separates trainable arrays from codes; the two have None where the other has an array."""
    floats = tuple(c if c is not None and _is_float(c) else None for c in columns)
    return floats, tuple(c if f is None else None for c, f in zip(columns, floats, strict=True))


def _unite(floats: tuple, rest: tuple) -> tuple:
    return tuple(r if f is None else f for f, r in zip(floats, rest, strict=True))
