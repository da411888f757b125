"""One layer of a stack of weights, read where it lies.

The body of a scan over stacked layers is given slices. XLA reads a slice in place where it fuses
what follows; before a kernel or a loop, into which it does not look, it copies. For one token that
is most of the time: every packed byte would be read twice and written once. So a product is given
the stack and the layer's number instead.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax import lax

from lqec_kernels.formats import CompressedLinear


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layer:
    """Layer `index` of a stack of weights.

    Attributes:
      stack: its arrays have a leading axis of layers.
      index: int32 [].
    """

    stack: CompressedLinear
    index: jax.Array


def pick_layer(segment: Any, index: jax.Array) -> Any:
    """Picks one layer of a tree of stacks: a `Layer` of compressed weights, slices of all else.

    Args:
      segment: a tree whose arrays have a leading axis of layers.
      index: int32 [], below their number.
    Example:
      >>> h, _ = lax.scan(lambda h, i: (block(pick_layer(segment, i), h), None), h, jnp.arange(32))
    """

    def is_weight(node: Any) -> bool:
        return isinstance(node, CompressedLinear)

    def pick(node: Any) -> Any:
        return Layer(node, index) if is_weight(node) else take_layer(node, index)

    return jax.tree.map(pick, segment, is_leaf=is_weight)


def take_layer(tree: Any, index: jax.Array | None) -> Any:
    """Slices every array of a tree; without an index the tree is one layer's already."""
    if index is None:
        return tree
    return jax.tree.map(lambda array: lax.dynamic_index_in_dim(array, index, keepdims=False), tree)
