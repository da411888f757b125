"""The base of a model: everything but what adapters add, and its name by content."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax

from lqec_jax.core.hashing import hash_arrays
from lqec_jax.core.tree import is_compressed
from lqec_jax.core.types import Params
from lqec_jax.io.artifact.leaves import flatten


def drop_corrections(params: Params) -> Params:
    """Returns the tree with every compressed weight's corrections left out."""

    def drop(node: Any) -> Any:
        return replace(node, corrections=()) if is_compressed(node) else node

    return jax.tree.map(drop, params, is_leaf=is_compressed)


def drop_input_grids(params: Params) -> Params:
    """Returns the tree with every compressed weight reading its inputs as they come."""

    def drop(node: Any) -> Any:
        return replace(node, input_grid=None) if is_compressed(node) else node

    return jax.tree.map(drop, params, is_leaf=is_compressed)


def has_input_grids(params: Params) -> bool:
    """Says whether some weight rounds what it reads."""
    leaves = jax.tree.leaves(params, is_leaf=is_compressed)
    return any(is_compressed(leaf) and leaf.input_grid is not None for leaf in leaves)


def each_block(params: Params) -> Iterator[Params]:
    """Yields the blocks of a model in order, each as views of its stack on the host."""
    for segment in params["blocks"]:
        stack = jax.device_get(segment)
        for layer in range(jax.tree.leaves(stack)[0].shape[0]):
            yield jax.tree.map(lambda array, i=layer: array[i], stack)


def hash_base(params: Params) -> str:
    """Hashes what adapters are added to: every array but theirs, in order of name, sha256 hex.

    How blocks are stacked in memory does not enter.
    """
    base = drop_corrections(params)
    blocks = {str(number): block for number, block in enumerate(each_block(base))}
    return hash_arrays(sorted(flatten({**base, "blocks": blocks})[0].items()))
