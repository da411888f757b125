"""Weights in the form in which a machine multiplies by them fastest, made once."""

import dataclasses
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.capability import PREPARED
from lqec_kernels.formats import CompressedLinear, Dense, LowRank
from lqec_kernels.prepare import prepare

# Only weights as small as those of a model of width 128 gain by a copy on a CPU: 6 % of a decode
# step on one thread, 11 % on two. From width 256 on packed ones are faster on one thread and level
# on two, from 512 on faster on both (configs/studies/cpu_decode).
DENSE_ELEMENTS = 2**16

_log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseCopy(Dense):
    """A packed weight's numbers, unpacked: for products, not for disk."""


def ready(tree: Any, *, dtype: Any = jnp.float32, platform: str | None = None) -> Any:
    """Puts every compressed weight in the form in which a platform multiplies by it fastest.

    On a GPU or TPU that is the layout that kernels read, see `prepare`; on a TPU, whose kernels can
    be given no 16-bit scales, with scales in float32 and adapters in `dtype`. On a CPU it is as
    stored, unpacked in every product a tile at a time, but for weights of at most `DENSE_ELEMENTS`
    numbers, whose dense copy is a quarter of a megabyte: they are copied. What was chosen is
    logged.

    Args:
      tree: any tree with CompressedLinear in it, stacks of layers included.
      dtype: of dense copies, and of adapters on a TPU; that in which the model computes.
      platform: 'cpu', 'gpu' or 'tpu'; JAX's default backend unless given.
    Returns:
      The tree with other bases; corrections and all else are kept. For products, not for disk.
    Example:
      >>> params = ready(model.params)
    """
    platform = platform or jax.default_backend()
    if platform == "tpu":
        return jax.tree.map(partial(_widen, dtype=dtype), prepare(tree), is_leaf=_is_weight)
    if platform != "cpu":
        return prepare(tree)
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
    """Says a prepared weight's numbers in float32, words apart, and its adapters in dtype."""
    if not isinstance(node, CompressedLinear) or not isinstance(node.base, PREPARED):
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
