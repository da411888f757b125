"""Parameter trees: paths, stacks of blocks, what is left out, and what trains and what does not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.errors import InputError, did_you_mean
from lqec_kernels.formats import CompressedLinear

Params = Any  # a pytree of arrays and CompressedLinear leaves


def get_at(tree: dict, path: str) -> Any:
    """Reads 'attn/q/kernel' from nested dicts."""
    for key in path.split("/"):
        tree = tree[key]
    return tree


def set_at(tree: dict, path: str, value: Any) -> dict:
    """Returns a copy of nested dicts with one entry replaced; everything else is shared."""
    key, _, rest = path.partition("/")
    value = set_at(tree.get(key, {}), rest, value) if rest else value
    return {**tree, key: value}


def stack_blocks(blocks: Sequence[Params]) -> tuple[Params, ...]:
    """Stacks runs of consecutive blocks of one structure into segments for `lax.scan`.

    Blocks whose structure, shapes or dtypes differ from their predecessor's start a new segment.
    """
    segments: list[list[Params]] = []
    for block in blocks:
        if segments and _signature(segments[-1][0]) == _signature(block):
            segments[-1].append(block)
        else:
            segments.append([block])
    return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *run) for run in segments)


def unstack_blocks(segments: Sequence[Params]) -> list[Params]:
    """Undoes `stack_blocks`: one tree a block, in order."""
    blocks = []
    for segment in segments:
        count = jax.tree.leaves(segment)[0].shape[0]
        blocks += [jax.tree.map(lambda leaf, i=i: leaf[i], segment) for i in range(count)]
    return blocks


def _signature(tree: Params) -> tuple:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)


def equal_trees(left: Params, right: Params) -> bool:
    """Says whether two trees are made of the same nodes, dtypes and bytes."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=False)
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        a.dtype == b.dtype and a.shape == b.shape and bool((_bytes(a) == _bytes(b)).all())
        for a, b in pairs
    )


def _bytes(array: Any) -> np.ndarray:
    # Of bytes, because NaN differs from itself and 0.0 equals -0.0.
    return np.ascontiguousarray(jax.device_get(array)).reshape(-1).view(np.uint8)


def is_compressed(node: Any) -> bool:
    return isinstance(node, CompressedLinear)


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


def partition(params: Params, select: str | Callable = "adapters") -> tuple[Params, Params]:
    """Splits a tree into (train, frozen), each with None where the other has an array.

    Gradients are taken of `train` alone: packed codes are integers, and a gradient over the whole
    tree fails on them.

    Args:
      params: any tree with CompressedLinear leaves.
      select: 'adapters' (factors of low-rank corrections); 'scales', 'zeros' or 'levels' (what
        bases multiply codes by, shift them by, or look up, where it is floating); or
        (path, array) -> bool with path as `jax.tree_util` gives it.
    Raises:
      InputError: an unknown selection.
    Example:
      >>> train, frozen = partition(params)
      >>> params = combine(train, frozen)
    """
    if not callable(select):
        if select not in SELECTIONS:
            raise InputError(
                f"partition: select={select!r} is unknown{did_you_mean(select, SELECTIONS)}"
            )
        select = SELECTIONS[select]
    mask = jax.tree_util.tree_map_with_path(select, params)
    train = jax.tree.map(lambda chosen, leaf: leaf if chosen else None, mask, params)
    frozen = jax.tree.map(lambda chosen, leaf: None if chosen else leaf, mask, params)
    return train, frozen


def combine(train: Params, frozen: Params) -> Params:
    """Undoes `partition`."""
    return jax.tree.map(
        lambda t, f: f if t is None else t, train, frozen, is_leaf=lambda node: node is None
    )


def _attributes(path: tuple) -> list[str]:
    return [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]


def _is_adapter(path: tuple, leaf: jax.Array) -> bool:
    names = _attributes(path)
    return "corrections" in names and names[-1] in ("a", "b")


# What formats call the numbers that codes are multiplied by, shifted by, or stand for.
SCALES, ZEROS, LEVELS = ("scales", "alphas"), ("zeros", "shifts"), ("levels",)


def _of_base(*fields: str) -> Callable:
    """Selects the floating arrays of bases that lie under one of the fields."""

    def select(path: tuple, leaf: jax.Array) -> bool:
        names = _attributes(path)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return "base" in names[:1] and not set(fields).isdisjoint(names) and floating

    return select


SELECTIONS = {"adapters": _is_adapter, "scales": _of_base(*SCALES), "zeros": _of_base(*ZEROS),
              "levels": _of_base(*LEVELS)}  # fmt: skip
