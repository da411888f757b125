"""Weights in the form in which a machine multiplies by them fastest, made once: repacked.

`repack_for_kernels` puts stored numbers in the order in which kernels read them, `repack` does what
is best on a platform. Neither form is for disk.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.codebook import Codebook
from lqec_kernels.formats import Affine, Base, CompressedLinear, Dense, LowRank
from lqec_kernels.level_planes import LevelPlanes
from lqec_kernels.packing import unpack
from lqec_kernels.planes import WIDTHS, Planes
from lqec_kernels.sparse import KEPT, PLACE_BITS, Sparse24
from lqec_kernels.sparse_planes import SparsePlanes

# Formats in the order in which kernels read them.
REPACKED = (Planes, LevelPlanes, SparsePlanes)
# Only weights as small as those of a model of width 128 gain by a copy on a CPU: 6 % of a decode
# step on one thread, 11 % on two. From width 256 on packed ones are faster on one thread and level
# on two, from 512 on faster on both (configs/studies/cpu_decode).
DENSE_ELEMENTS = 2**16

_log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCopy(Dense):
    """A packed weight's numbers, unpacked: for products, not for disk."""


def repack(tree: Any, *, dtype: Any = jnp.float32, platform: str | None = None) -> Any:
    """Puts every compressed weight in the form in which a platform multiplies by it fastest.

    On a GPU or TPU that is the layout that kernels read, see `repack_for_kernels`; on a TPU, whose
    kernels can be given no 16-bit scales, with scales in float32 and adapters in `dtype`. On a CPU
    it is as stored, unpacked in every product a tile at a time, but for weights of at most
    `DENSE_ELEMENTS` numbers, whose dense copy is a quarter of a megabyte: they are copied. What was
    chosen is logged.

    Args:
      tree: any tree with CompressedLinear in it, stacks of layers included.
      dtype: of dense copies, and of adapters on a TPU; that in which the model computes.
      platform: 'cpu', 'gpu' or 'tpu'; JAX's default backend unless given.
    Returns:
      The tree with other bases; corrections and all else are kept. For products, not for disk.
    Example:
      >>> params = repack(model.params)
    """
    platform = platform or jax.default_backend()
    if platform != "cpu":
        tree = repack_for_kernels(tree)
        widen = partial(_widen, dtype=dtype)
        return jax.tree.map(widen, tree, is_leaf=_is_weight) if platform == "tpu" else tree
    counts: Counter[str] = Counter()

    def copy(node: Any) -> Any:
        if not isinstance(node, CompressedLinear):
            return node
        if node.d_in * node.d_out > DENSE_ELEMENTS or isinstance(node.base, Dense):
            counts["stay as they are"] += 1
            return node
        counts["become dense copies"] += 1
        return dataclasses.replace(node, base=DenseCopy(node.base.dense(dtype)))

    tree = jax.tree.map(copy, tree, is_leaf=_is_weight)
    for what, count in sorted(counts.items()):
        _log.info("%d stacks of weights %s on a CPU", count, what)
    return tree


def _is_weight(node: Any) -> bool:
    return isinstance(node, CompressedLinear)


def _widen(node: Any, dtype: Any) -> Any:
    """Says a repacked weight's numbers in float32, words apart, and its adapters in dtype."""
    if not isinstance(node, CompressedLinear) or not isinstance(node.base, REPACKED):
        return node
    numbers = {
        field.name: value.astype(jnp.float32)
        for field in dataclasses.fields(node.base)
        if isinstance(value := getattr(node.base, field.name), jax.Array)
        and value.dtype != jnp.uint32
    }
    corrections = tuple(
        dataclasses.replace(c, a=c.a.astype(dtype), b=c.b.astype(dtype))
        if isinstance(c, LowRank)
        else c
        for c in node.corrections
    )
    base = dataclasses.replace(node.base, **numbers)
    return dataclasses.replace(node, base=base, corrections=corrections)


def repack_for_kernels(tree: Any) -> Any:
    """Puts weights in the layouts that kernels read; what no kernel reads comes back as it is.

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
      >>> y = packed_matmul(x, repack_for_kernels(leaf.base), corrections=leaf.corrections)
    """
    return jax.tree.map(_repack_node, tree, is_leaf=_is_weight_or_base)


def can_repack(base: Base) -> bool:
    """Says whether `repack_for_kernels` makes another base of it, one that kernels read."""
    return _find_layout(base) is not None


def _repack_node(node: Any) -> Any:
    if isinstance(node, CompressedLinear):
        return dataclasses.replace(node, base=_repack_node(node.base))
    convert = _find_layout(node)
    return node if convert is None else convert(node)


def _is_weight_or_base(node: Any) -> bool:
    return isinstance(node, CompressedLinear) or hasattr(node, "columns")


def _find_layout(base: Any) -> Callable | None:
    if isinstance(base, Affine) and base.bits in WIDTHS:
        return _to_planes
    if isinstance(base, Codebook) and base.bits in WIDTHS and base.layout.dim == 1:
        return _to_level_planes
    if isinstance(base, Sparse24) and _find_layout(base.inner) is _to_planes:
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
