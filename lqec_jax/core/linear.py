"""The one function through which every model multiplies by every weight."""

from functools import partial

import jax

from lqec_kernels import Layer, packed_matmul, take_layer
from lqec_kernels.formats import CompressedLinear

MODEL_AXIS = "model"


def linear(x: jax.Array, leaf: jax.Array | CompressedLinear | Layer) -> jax.Array:
    """Applies a dense or compressed weight: everything the leaf says.

        y = T_out( base( T_in(x) ) ) + Σ correction(x),

    x rounded first where the leaf has an input grid.
    Compressed weights stay packed, forward and backward; see `lqec_kernels.reference`.

    Args:
      x: floating [..., d_in].
      leaf: [d_in, d_out], a CompressedLinear, or a layer of a stack of them.
    Returns:
      [..., d_out] of x.dtype.
    Example:
      >>> y = linear(x, leaf)
    """
    if isinstance(leaf, Layer):
        return _multiply(x, leaf.stack, leaf.index)
    if isinstance(leaf, CompressedLinear):
        return _multiply(x, leaf, None)
    return x @ leaf.astype(x.dtype)


def _multiply(x: jax.Array, leaf: CompressedLinear, layer: jax.Array | None) -> jax.Array:
    if leaf.input_grid is not None:
        x = leaf.input_grid.apply(x)
    to_base = partial(packed_matmul, layer=layer, shards=model_shards())
    if leaf.input_transform is None and leaf.output_transform is None:
        return to_base(x, leaf.base, corrections=leaf.corrections)
    before, after = take_layer((leaf.input_transform, leaf.output_transform), layer)
    y = to_base(x if before is None else before.apply(x), leaf.base)
    if after is not None:
        y = after.apply(y)
    for correction in take_layer(leaf.corrections, layer):
        y = y + correction.apply(x)
    return y


def model_shards() -> int:
    """Returns over how many devices the mesh in use splits a weight's columns; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(MODEL_AXIS, 1)
