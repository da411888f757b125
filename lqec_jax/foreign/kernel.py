"""A packed kernel that somebody else's Flax model reads as the array it replaces.

Flax opens every `AxisMetadata` box before a module sees its content, and checks only the shape of
what comes out. So a box whose content is made on reading stands in for an array in any module:
Dense, DenseGeneral, an own `self.param` with an einsum, under `nn.scan`, `jit` and `grad`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from flax.core.meta import AxisMetadata
from flax.linen.dtypes import canonicalize_dtype

from lqec_jax.core.linear import linear
from lqec_jax.errors import InputError
from lqec_jax.foreign.axes import count_weights, order_axes, split_shape
from lqec_kernels.formats import CompressedLinear, static


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class PackedKernel(AxisMetadata):
    """A compressed weight in the shape its module expects.

    Attributes:
      leaf: the weight as [*stack, d_in, d_out]; `scan` and `vmap` take the stack's axes away.
      axes: the kernel's own axes, i and o in the module's order, without the stack's.
      shape: their sizes.
      dtype: of the array that it replaced, and that it reads as.
    """

    leaf: CompressedLinear
    axes: str = static()
    shape: tuple[int, ...] = static()
    dtype: Any = static()

    def unbox(self) -> jax.Array:
        """Returns the dense kernel [*stack, *shape]; differentiable in the leaf's floats."""
        stack = self.leaf.stack_shape
        _, inputs, outputs = split_shape(self.shape, self.axes)
        w = self.leaf.dense().reshape(*stack, *inputs, *outputs)  # [*stack, *inputs, *outputs]
        order = order_axes(self.axes)
        back = [len(stack) + order.index(axis) for axis in range(len(order))]
        return w.transpose(*range(len(stack)), *back).astype(self.dtype)  # [*stack, *shape]

    def replace_boxed(self, val: Any) -> Any:
        """Returns the new value itself: an array cannot be put back into codes."""
        return val

    def add_axis(self, index: int, params: dict) -> "PackedKernel":
        """Returns itself: the stack is read off the arrays."""
        return self

    def remove_axis(self, index: int, params: dict) -> "PackedKernel":
        """Returns itself: the stack is read off the arrays."""
        return self

    def __repr__(self) -> str:
        # Of static fields only: trees are also printed with other things in place of arrays.
        return f"PackedKernel(shape={self.shape}, axes={self.axes!r}, dtype={self.dtype})"


def multiply(
    x: Any, kernel: Any, bias: Any, axis: Sequence[int], features: Sequence[int], dtype: Any
) -> jax.Array | None:
    """Multiplies by a packed kernel as Flax's dense layers do by an array, and makes no dense copy.

    Args:
      axis: of x, over which it is contracted with the kernel's first axes, in the order of x.
      features: sizes of the kernel's other axes.
      dtype: of the product; None is what x, the array that was replaced and the bias promote to.
    Returns:
      [..., *features], or None where `kernel` is no packed one or does not fit: what Flax itself
      says or does then is right.
    """
    if not isinstance(kernel, PackedKernel) or kernel.leaf.stack_shape:
        return None
    x = jnp.asarray(x)
    axis = sorted(i % x.ndim for i in axis)
    fits = kernel.shape == (*(x.shape[i] for i in axis), *features)
    if not fits or kernel.axes != "i" * len(axis) + "o" * len(features):
        return None
    dtype = canonicalize_dtype(x, jnp.zeros((), kernel.dtype), bias, dtype=dtype)
    x = jnp.moveaxis(x.astype(dtype), axis, range(-len(axis), 0))  # [..., *inputs]
    lead = x.shape[: x.ndim - len(axis)]
    y = linear(x.reshape(*lead, kernel.leaf.d_in), kernel.leaf)  # [..., d_out]
    y = y.reshape(*lead, *features)  # [..., *features]
    return y if bias is None else y + jnp.asarray(bias, dtype)


@partial(jax.jit, static_argnums=1)
def to_matrix(w: Any, axes: str) -> jax.Array:
    """Turns one layer's kernel into a float32 [d_in, d_out] matrix."""
    _, *sizes = count_weights(w.shape, axes)
    w = jnp.asarray(w, jnp.float32).transpose(order_axes(axes))  # [*inputs, *outputs]
    return w.reshape(sizes)  # [d_in, d_out]


def box(leaves: Sequence[CompressedLinear], w: Any, axes: str) -> PackedKernel:
    """Boxes what became of a kernel: one leaf, or one for each layer of its stack."""
    stack = split_shape(w.shape, axes)[0]
    leaf = _stack(stack, leaves) if stack else leaves[0]
    return PackedKernel(leaf, axes.lstrip("l"), w.shape[len(stack) :], jnp.dtype(w.dtype))


@partial(jax.jit, static_argnums=0)
def _stack(stack: tuple[int, ...], leaves: Sequence[CompressedLinear]) -> CompressedLinear:
    return jax.tree.map(lambda *a: jnp.stack(a).reshape(*stack, *a[0].shape), *leaves)


def _to_state(kernel: PackedKernel) -> dict[str, jax.Array]:
    named, _ = jax.tree_util.tree_flatten_with_path(kernel.leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): array for path, array in named}


def _from_state(kernel: PackedKernel, state: dict[str, jax.Array]) -> PackedKernel:
    names, shape = list(_to_state(kernel)), jax.tree.structure(kernel.leaf)
    if set(names) != set(state):
        raise InputError(
            f"a packed kernel of {sorted(state)} was read into one of {sorted(names)}; restore "
            "into a tree quantized by the same recipe"
        )
    return replace(kernel, leaf=jax.tree.unflatten(shape, [state[name] for name in names]))


serialization.register_serialization_state(PackedKernel, _to_state, _from_state)
