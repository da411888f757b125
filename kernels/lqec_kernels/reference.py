"""x @ base in plain XLA, one tile of output columns at a time: the oracle and the CPU path.

Memory: neither direction holds more than one tile of the dense weight, and one of the low-rank
correction that joins it. The residual of the forward pass is the packed base, never its dense copy.
`jax.checkpoint` alone does not promise that (XLA inlines one-block loops and keeps the copies), the
inner scan over at least two tiles does.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lqec_kernels.formats import Base, Dense, Layout
from lqec_kernels.layers import take_layer

# A tile's dense copy is at most this many elements; the dense weight is cut into two at least.
# Accelerators have room for more: the backward pass writes the gradient of x anew with every tile,
# and a TPU's compiler expects a fifth more cycles of 16 tiles of 4096 x 11008 than of 4, with 8192
# tokens (2 take longer again).
TILE_ELEMENTS, ACCELERATOR_ELEMENTS = 4 * 2**20, 16 * 2**20
# On a CPU the forward pass takes narrow tiles, whose copies stay in a core's cache between being
# unpacked and being multiplied by: one token's product with 2-bit 4096 x 4096 takes 0.55 of the
# dense one's time on one thread and 1.30 on two; with large tiles it takes 1.51 and 1.52
# (configs/studies/cpu_decode).
# The backward pass adds to all inputs once a tile, and wants few tiles.
CACHED_ELEMENTS = 2**16


class Cut(NamedTuple):
    """How the output columns are walked: each of `shards` shares in `tiles` steps of `width`."""

    d_in: int
    shards: int
    tiles: int
    width: int


def tiled_matmul(
    x: jax.Array,
    base: Base,
    *,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    layer: jax.Array | None = None,
    shards: int = 1,
) -> jax.Array:
    """Multiplies by a stored weight without making it dense: y = x @ (base.dense() + a b).

    Args:
      x: floating [..., d_in]; the product has its dtype, sums are float32 or wider.
      base: any format of `formats`, unstacked.
      low_rank: factors a [d_in, r] and b [r, d_out] that are added to every tile before it is
        multiplied by. With many tokens that costs less than a product of their own.
      layer: int32 []; the base is a stack then, and tiles are read out of this layer of it. Meant
        for few tokens: gradients, if asked for, keep every tile.
      shards: over how many devices the columns are split; tiles are cut inside each share, so that
        every device works on its own columns of every tile.
    Returns:
      [..., d_out] of x.dtype. Differentiable in x, the factors and the base's floating arrays
      (scales, zeros); what is not asked for is not computed once the program is compiled.
    Cost: 2 · tokens · d_in · d_out flops, and the base is unpacked once per direction.
    """
    if isinstance(base, Dense) and base.w.dtype == x.dtype:
        return _multiply_dense(x, take_layer(base.w, layer), low_rank)  # nothing is to be unpacked
    if base.d_out % shards:
        shards = 1
    # A tile of a b is held beside the weight's own, so with factors tiles are half as large.
    least = 2 if low_rank is None else 4
    cuts = tuple(
        _cut(base.d_in, base.d_out, shards, least, elements)
        for elements in (_forward_elements(base.d_in), _most_elements())
    )
    if layer is None:
        return _tiled(base.layout, cuts, *vary_alike((x, base.columns(), low_rank)))
    given = vary_alike((x, _columns_of_layer(base, layer), low_rank))
    return _multiply_tiles(base.layout, cuts[0], *given)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _InStack:
    """A layer's column that is not sliced yet: XLA would copy it before the loop over tiles."""

    stack: jax.Array
    layer: jax.Array


def _columns_of_layer(base: Base, layer: jax.Array) -> tuple:
    """Returns a layer's columns; what the base holds as it is stays in its stack."""
    one = take_layer(base, layer)
    stacks = {
        id(taken): stack
        for taken, stack in zip(jax.tree.leaves(one), jax.tree.leaves(base), strict=True)
    }
    return tuple(
        _InStack(stacks[id(column)], layer) if id(column) in stacks else column
        for column in one.columns()
    )


def _multiply_dense(x: jax.Array, w: jax.Array, low_rank) -> jax.Array:
    wide = {"preferred_element_type": _sum_dtype(x)}
    y = jnp.matmul(x, w, **wide)
    if low_rank is not None:
        a, b = low_rank
        y = y + jnp.matmul(jnp.matmul(x, a, **wide), b, **wide)
    return y.astype(x.dtype)


def _most_elements() -> int:
    """Returns how large a tile may be."""
    return TILE_ELEMENTS if jax.default_backend() == "cpu" else ACCELERATOR_ELEMENTS


def _forward_elements(d_in: int) -> int:
    """Returns how large a tile of the forward pass is wanted."""
    if jax.default_backend() != "cpu":
        return _most_elements()
    return max(CACHED_ELEMENTS, d_in * (64 if d_in <= 8192 else 32))


def _cut(d_in: int, d_out: int, shards: int, least: int, elements: int) -> Cut:
    """Cuts each share evenly: into tiles of about so many elements, at most `_most_elements`.

    An odd width has no even cut; a prime one is one column a tile, which is slow but never dense.
    """
    share = d_out // shards
    fewest = min(share, max(least, -(-d_in * share // _most_elements())))
    wanted = max(fewest, -(-d_in * share // elements))
    even = (n for n in range(fewest, share + 1) if share % n == 0)
    tiles = min(even, key=lambda n: max(n, wanted) / min(n, wanted))
    return Cut(d_in, shards, tiles, share // tiles)


def vary_alike(arrays):
    """Under `shard_map`, lets every array vary over all the mesh axes that any of them varies over.

    A loop's state needs that, and the gradient of the widening is the sum over the added axes. It
    is nothing elsewhere.
    """
    varying = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def widen(array):
        missing = axes - jax.typeof(array).manual_axis_type.varying
        return lax.pcast(array, tuple(missing), to="varying") if missing else array

    return jax.tree.map(widen, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(layout: Layout, cuts: tuple[Cut, Cut], x: jax.Array, columns: tuple, low_rank):
    """Returns the product; `cuts` are those of the forward and the backward pass."""
    return _multiply_tiles(layout, cuts[0], x, columns, low_rank)


def _multiply_tiles(layout: Layout, cut: Cut, x: jax.Array, columns: tuple, low_rank):
    def multiply(y, number):
        w = layout.dense(_take(columns, number, cut), x.dtype)
        w = w + _product_tile(low_rank, number, cut, w.dtype)
        tile = jnp.matmul(x, w, preferred_element_type=_sum_dtype(x)).astype(x.dtype)
        tile = tile.reshape(*lead, cut.shards, 1, cut.width)
        return lax.dynamic_update_slice_in_dim(y, tile, number, axis=-2), None

    lead = x.shape[:-1]
    y = _unset(x[..., :1, None, None], (*lead, cut.shards, cut.tiles, cut.width))
    y, _ = lax.scan(multiply, y, jnp.arange(cut.tiles))
    return y.reshape(*lead, cut.shards * cut.tiles * cut.width)  # [..., d_out]


def _forward(layout: Layout, cuts, x, columns, low_rank):
    return _tiled(layout, cuts, x, columns, low_rank), (x, columns, low_rank)


def _backward(layout: Layout, cuts, residual, dy):
    x, columns, low_rank = residual
    _, cut = cuts

    def multiply(dx, number):
        dy_tile = _take(dy, number, cut)
        floats, rest = _part_floats(_take(columns, number, cut))
        w, pull = jax.vjp(lambda floats: layout.dense(_unite(floats, rest), dy.dtype), floats)
        whole = w + _product_tile(low_rank, number, cut, w.dtype)
        dx = jnp.where(number == 0, 0.0, dx) + _dot_transpose(dy_tile, whole, cut)
        dw = jnp.einsum("...i,...o->io", x, dy_tile, preferred_element_type=_sum_dtype(x))
        return dx, pull(dw.astype(w.dtype))[0]

    dx = _unset(dy[None, ..., :1].astype(_sum_dtype(dy)), (cut.shards, *dy.shape[:-1], cut.d_in))
    dx, d_floats = lax.scan(multiply, dx, jnp.arange(cut.tiles))
    d_columns = jax.tree.map(lambda d: _join(d, cut), d_floats)
    return jnp.sum(dx, axis=0).astype(dy.dtype), d_columns, _factor_gradients(x, dy, low_rank)


_tiled.defvjp(_forward, _backward)


def _product_tile(low_rank, number, cut: Cut, dtype):
    """Returns a b for one tile's columns, or 0 where there are no factors."""
    if low_rank is None:
        return jnp.zeros((), dtype)
    a, b = low_rank
    return jnp.matmul(a, _take(b, number, cut)).astype(dtype)


def _factor_gradients(x: jax.Array, dy: jax.Array, low_rank):
    """Returns the gradients of a and b through the rank, never through a dense d_in x d_out one."""
    if low_rank is None:
        return None
    a, b = low_rank
    wide = {"preferred_element_type": _sum_dtype(x)}
    down = jnp.einsum("...i,ir->...r", x, a.astype(x.dtype))
    up = jnp.einsum("...o,ro->...r", dy, b.astype(dy.dtype))
    d_a = jnp.einsum("...i,...r->ir", x, up, **wide)
    d_b = jnp.einsum("...r,...o->ro", down, dy, **wide)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


def _unset(some: jax.Array, shape: tuple) -> jax.Array:
    """Returns room that a loop will fill, holding `some` of its operand's numbers until then.

    Zeros would do, but they wait for nothing: XLA's CPU scheduler makes the room of every product
    of a program before the first of them runs, and holds all of it.
    """
    return jnp.broadcast_to(some, shape)


def _dot_transpose(dy: jax.Array, w: jax.Array, cut: Cut) -> jax.Array:
    """Returns dy wᵀ as one partial sum a share, so that devices add up once and not once a tile."""
    dy = dy.reshape(*dy.shape[:-1], cut.shards, cut.width)  # [..., shards, width]
    w = w.reshape(cut.d_in, cut.shards, cut.width)  # [d_in, shards, width]
    return jnp.einsum("...sn,isn->s...i", dy, w, preferred_element_type=_sum_dtype(dy))


def _take(columns, number, cut: Cut):
    """Returns one tile: [..., d_out] -> [..., d_out / tiles].

    Tiles are sliced inside the loop; cut before it, they would be a second copy of the packed
    arrays.
    """

    def take(array: Any) -> jax.Array:
        layer = None
        if isinstance(array, _InStack):
            array, layer = array.stack, array.layer
        if cut.shards == 1:
            # Reshaped, where a tile's width is no multiple of a TPU's lanes, the whole array moves.
            return _slice_columns(array, layer, number * cut.width, cut.width)
        array = array.reshape(*array.shape[:-1], cut.shards, cut.tiles, cut.width)
        tile = lax.dynamic_index_in_dim(take_layer(array, layer), number, axis=-2, keepdims=False)
        return tile.reshape(*tile.shape[:-2], cut.shards * cut.width)  # [..., shards · width]

    return jax.tree.map(take, columns, is_leaf=lambda node: isinstance(node, _InStack))


def _slice_columns(array: jax.Array, layer: jax.Array | None, start, width: int) -> jax.Array:
    if layer is None:
        return lax.dynamic_slice_in_dim(array, start, width, axis=-1)
    _, *middle, _ = array.shape
    starts = (layer, *(0 for _ in middle), start)
    return lax.dynamic_slice(array, starts, (1, *middle, width))[0]


def _join(tiles: jax.Array, cut: Cut) -> jax.Array:
    """Puts tiles side by side: [tiles, ..., d_out / tiles] -> [..., d_out]."""
    tiles = tiles.reshape(*tiles.shape[:-1], cut.shards, cut.width)
    array = jnp.moveaxis(tiles, 0, -2)  # [..., shards, tiles, width]
    return array.reshape(*array.shape[:-3], cut.shards * cut.tiles * cut.width)  # [..., d_out]


def _sum_dtype(array: jax.Array) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)


def _is_float(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _part_floats(columns: tuple) -> tuple[tuple, tuple]:
    """Separates trainable arrays from codes; the two have None where the other has an array."""
    floats = tuple(c if c is not None and _is_float(c) else None for c in columns)
    return floats, tuple(c if f is None else None for c, f in zip(columns, floats, strict=True))


def _unite(floats: tuple, rest: tuple) -> tuple:
    return tuple(r if f is None else f for f, r in zip(floats, rest, strict=True))
