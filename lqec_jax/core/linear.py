"""The one function through which every model multiplies by every weight."""

import jax

from lqec_kernels import packed_matmul
from lqec_kernels.formats import CompressedLinear

MODEL_AXIS = "model"


def linear(x: jax.Array, leaf: jax.Array | CompressedLinear) -> jax.Array:
    """Applies a dense or compressed weight: everything the leaf says.

        y = T_out( base( T_in(x) ) ) + Σ correction(x),

    x rounded first where the leaf has an input grid.
    Compressed weights stay packed, forward and backward; see `lqec_kernels.reference`.

    Args:
      x: floating [..., d_in].
      leaf: [d_in, d_out], or a CompressedLinear.
    Returns:
      [..., d_out] of x.dtype.
    Example:
      >>> y = linear(x, leaf)
    """
    if not isinstance(leaf, CompressedLinear):
        return x @ leaf.astype(x.dtype)
    if leaf.input_grid is not None:
        x = leaf.input_grid.apply(x)
    if leaf.input_transform is None and leaf.output_transform is None:
        return packed_matmul(x, leaf.base, corrections=leaf.corrections, shards=model_shards())
    inner = x if leaf.input_transform is None else leaf.input_transform.apply(x)
    y = packed_matmul(inner, leaf.base, shards=model_shards())
    if leaf.output_transform is not None:
        y = leaf.output_transform.apply(y)
    for correction in leaf.corrections:
        y = y + correction.apply(x)
    return y


def model_shards() -> int:
    """Returns over how many devices the mesh in use splits a weight's columns; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(MODEL_AXIS, 1)
