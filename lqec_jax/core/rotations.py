"""Randomized Hadamard rotations around a dense base, and where they cannot be put.

With orthogonal M_in, M_out the base of the same weight is M_inᵀ w M_outᵀ: its entries are sums of
many of w's with random signs, so that outliers are spread and any weight looks like a normal one.
"""

import dataclasses

import jax

from lqec_jax.errors import InputError
from lqec_kernels import hadamard
from lqec_kernels.formats import CompressedLinear, Dense, Hadamard

LEAST_BLOCK = 4  # fewer channels mix nothing worth a transform


def rotate_inputs(method: str, leaf: CompressedLinear, key: jax.Array, block: int):
    """Rotates what a dense base reads, in blocks; a rotation that is there already stays.

    Raises:
      InputError: the base is packed, or the inputs have a transform of another kind.
    """
    if isinstance(leaf.input_transform, Hadamard):
        return leaf
    w = _dense_of(method, leaf, "input", leaf.input_transform)
    rotation = Hadamard.draw(key, leaf.d_in, block)
    base = Dense(rotation.apply(w.T).T)  # Mᵀ w
    return dataclasses.replace(leaf, base=base, input_transform=rotation)


def rotate_outputs(method: str, leaf: CompressedLinear, key: jax.Array, block: int):
    """Rotates what a dense base writes; see `rotate_inputs`."""
    if isinstance(leaf.output_transform, Hadamard):
        return leaf
    w = _dense_of(method, leaf, "output", leaf.output_transform)
    rotation = Hadamard.draw(key, leaf.d_out, block, inverse=True)
    base = Dense(rotation.apply_transpose(w))  # w Mᵀ
    return dataclasses.replace(leaf, base=base, output_transform=rotation)


def largest_block(method: str, side: str, size: int, limit: int | None = None) -> int:
    """Returns the largest block that a width can be rotated in: all of it where that is known.

    Args:
      side: 'd_in' or 'd_out', for the message.
      limit: the block is at most so large.
    Raises:
      InputError: there is none of at least four channels.
    """
    block = hadamard.largest_order(size, limit)
    if block < LEAST_BLOCK:
        raise InputError(
            f"{method}: {side}={size} has no Hadamard block of {LEAST_BLOCK} channels or more; "
            "rotate widths that are multiples of 4"
        )
    return block


def check_block(method: str, side: str, size: int, block: int) -> int:
    """Returns a block that was asked for.

    Raises:
      InputError: it does not divide the width, or no Hadamard matrix of this order is built here.
    """
    if size % block or hadamard.factor(block) is None:
        fitting = hadamard.largest_order(size, block)
        why = f"does not divide {side}={size}" if size % block else "is the order of no matrix here"
        raise InputError(f"{method}: block={block} {why}; choose for example {fitting}")
    return block


def _dense_of(method: str, leaf: CompressedLinear, side: str, transform) -> jax.Array:
    if transform is not None:
        raise InputError(
            f"{method}: rotates the {side}s, which have a {type(transform).__name__} transform "
            "already; leave one of the two out"
        )
    if not isinstance(leaf.base, Dense):
        raise InputError(
            f"{method}: rotates a dense weight, and this one is {type(leaf.base).__name__} "
            "already; put it before the steps that pack or prune"
        )
    return leaf.base.dense()
