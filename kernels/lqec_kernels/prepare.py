"""Stored weights -> the layouts that kernels read, once, before many products with them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import Affine, Base, CompressedLinear
from lqec_kernels.level_planes import LevelPlanes
from lqec_kernels.packing import unpack
from lqec_kernels.planes import WIDTHS, Planes
from lqec_kernels.sparse import KEPT, PLACE_BITS, Sparse24
from lqec_kernels.sparse_planes import SparsePlanes


def prepare(tree: Any) -> Any:
    """Repacks weights for the kernels; what no kernel reads comes back as it is.

    Of 2, 3, 4 or 8 bits an Affine becomes `Planes`, and a Sparse24 over one `SparsePlanes`; a
    Codebook of scalars `LevelPlanes`. They are the same numbers to the bit, columns padded to whole
    units of 256 inputs, integer zeros a byte each; bases like any other, for every implementation
    of the product and for gradients. They are not written to disk: save what you loaded.

    Args:
      tree: a base, a CompressedLinear, or any tree of them, stacks of layers included. Corrections
        and all else are kept.
    Returns:
      A tree with other bases.
    Example:
      >>> y = packed_matmul(x, prepare(leaf.base), corrections=leaf.corrections)
    """
    return jax.tree.map(_prepare_node, tree, is_leaf=_is_weight)


def can_prepare(base: Base) -> bool:
    """Says whether `prepare` makes another base of it, one that kernels read."""
    return _find_repack(base) is not None


def _prepare_node(node: Any) -> Any:
    if isinstance(node, CompressedLinear):
        return dataclasses.replace(node, base=_prepare_node(node.base))
    repack = _find_repack(node)
    return node if repack is None else repack(node)


def _is_weight(node: Any) -> bool:
    return isinstance(node, CompressedLinear) or hasattr(node, "columns")


def _find_repack(base: Any) -> Callable | None:
    if isinstance(base, Affine) and base.bits in WIDTHS:
        return _to_planes
    if isinstance(base, Codebook) and base.bits in WIDTHS and base.layout.dim == 1:
        return _to_level_planes
    if isinstance(base, Sparse24) and _find_repack(base.inner) is _to_planes:
        # A group of fours is half a group of kept weights, unless it is all of them.
        inner = base.inner
        whole = inner.group_size == inner.d_in
        return _to_sparse_planes if whole or inner.group_size % KEPT == 0 else None
    return None


@jax.jit
def _to_planes(base: Affine) -> Planes:
    codes, scales, offsets = _read_grid(base)
    return Planes.from_codes(codes, scales, offsets, bits=base.bits, group_size=base.group_size)


@jax.jit
def _to_level_planes(base: Codebook) -> LevelPlanes:
    codes = base.layout.codes(base.codes)
    return LevelPlanes.from_codes(codes, base.scales, base.levels, base.layout)


@jax.jit
def _to_sparse_planes(base: Sparse24) -> SparsePlanes:
    codes, scales, offsets = _read_grid(base.inner)
    places = unpack(base.positions, PLACE_BITS, base.inner.d_in)
    return SparsePlanes.from_codes(
        codes, places, scales, offsets, bits=base.inner.bits, group_size=base.inner.group_size
    )


def _read_grid(base: Affine) -> tuple:
    """Returns codes [..., d_in, d_out], scales and offsets as numbers of every column."""
    words, scales, zeros = base.columns()
    if zeros is not None and not jnp.issubdtype(zeros.dtype, jnp.floating):
        zeros = zeros.astype(jnp.uint8)
    return unpack(words, base.bits, base.d_in), scales, zeros
