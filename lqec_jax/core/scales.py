"""What a scale becomes when it is stored, and what is done where its dtype has no place for it.

float16 holds 2^-24 to 65504, below 2^-14 with fewer digits than its eleven. So a weight whose
largest entry is far from one is compressed in a unit of its own, a power of four: whatever a method
computes is then the same times a power of two, and so is what it stores. Multiplied back, what
float16 holds to the last digit stays float16; an array that it does not hold becomes float32, for
this weight alone. Weights of an ordinary size have the unit one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.tree import LEVELS, SCALES
from lqec_kernels.formats import CompressedLinear

# Largest magnitudes of weights that are compressed as they are: their groups' scales lie inside
# float16 at every width from 1 to 8 bits. A trained model's largest is 0.1 to 10.
ORDINARY = (2.0**-10, 2.0**8)
IN_UNITS = {*SCALES, *LEVELS, "shifts", "w", "values"}


def store_scale(scale: jax.Array, dtype: Any) -> jax.Array:
    """Returns positive scales in the dtype they are stored in, none of them zero or infinite.

    One that is too small or too large becomes the dtype's smallest or largest number. float16's
    smallest is 2^-24, subnormal: every backend here keeps float16's subnormals, none float32's.
    """
    return jnp.clip(scale, smallest(dtype), float(jnp.finfo(dtype).max)).astype(dtype)


def store_number(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns numbers of any sign in the dtype they are stored in, none of them infinite."""
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def smallest(dtype: Any) -> float:
    """Returns the smallest positive scale that a dtype holds in every computation."""
    limits = jnp.finfo(dtype)
    return float(limits.smallest_subnormal if dtype == jnp.float16 else limits.tiny)


def suit_dtype(dtype: Any, w: jax.Array | CompressedLinear) -> Any:
    """Returns the dtype of scales that are trained for a weight: float32 where it is not ordinary.

    A tracer has no size yet: what `preview` says of it is what is said of an ordinary one.
    """
    traced = any(isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)
                 for array in jax.tree.leaves(w))  # fmt: skip
    return dtype if traced or find_exponent(w) == 0 else jnp.dtype(jnp.float32)


def find_exponent(w: jax.Array | CompressedLinear) -> int:
    """Returns e, even, such that w is to be compressed in units of 2^e; 0 for an ordinary weight.

    Cost: reads w, and waits for it.
    """
    largest = float(_find_largest(w))
    if not math.isfinite(largest) or largest == 0 or ORDINARY[0] <= largest <= ORDINARY[1]:
        return 0
    return 2 * (math.frexp(largest)[1] // 2)


@jax.jit
def _find_largest(w: jax.Array | CompressedLinear) -> jax.Array:
    dense = w.base.dense() if isinstance(w, CompressedLinear) else w
    return jnp.max(jnp.abs(dense.astype(jnp.float32)))


def times_power(array: jax.Array, exponent: int) -> jax.Array:
    """Returns array · 2^exponent, float32; exact where no result is below float32's smallest."""
    half = exponent // 2  # by 2^-127 at once, the factor itself would be flushed to zero
    return array.astype(jnp.float32) * 2.0**half * 2.0 ** (exponent - half)


def rescale(leaf: CompressedLinear, exponent: int) -> CompressedLinear:
    """Multiplies a weight by 2^exponent, exactly: what is in its units, whatever the format.

    The factors of a correction take half each, so that the exponent must be even. Transforms stay.
    An array keeps its dtype where that holds the products, else it becomes float32.
    """

    def change(path: tuple, array: jax.Array) -> jax.Array:
        names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        own = _exponent_of(names, exponent) if jnp.issubdtype(array.dtype, jnp.floating) else 0
        return _narrow(times_power(array, own), array.dtype) if own else array

    return jax.tree_util.tree_map_with_path(change, leaf)


def _exponent_of(names: list[str], exponent: int) -> int:
    if names[0] == "base":
        return exponent if IN_UNITS & set(names) else 0
    if names[0] != "corrections":
        return 0
    if names[1] in ("a", "b"):  # exact ones, and the scales of rounded ones
        return exponent // 2
    return exponent if IN_UNITS & set(names) else 0


def _narrow(array: jax.Array, dtype: Any) -> jax.Array:
    narrow = array.astype(dtype)
    return narrow if bool((narrow.astype(jnp.float32) == array).all()) else array


def describe(in_unit: CompressedLinear, leaf: CompressedLinear, exponent: int) -> list[str]:
    """Returns what a report should say of how a weight's scales are stored.

    Args:
      in_unit: the weight in the unit 2^exponent that it was compressed in.
      leaf: the same as it is stored.
    """
    lines = []
    pairs = zip(jax.tree.leaves(in_unit), jax.tree.leaves(leaf), strict=True)
    if any(before.dtype != after.dtype for before, after in pairs):
        lines.append(
            f"scales: weights are of the size 2^{exponent}, for which float16 has no place; stored "
            "as float32"
        )
    lost, count = 0, 0
    for path, array in jax.tree_util.tree_leaves_with_path(leaf):
        names = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}
        if array.dtype == jnp.float16 and names & {*SCALES, *LEVELS}:
            size = jnp.abs(array)
            ends = (size == smallest(array.dtype)) | (size == jnp.finfo(array.dtype).max)
            lost, count = lost + int(jnp.sum(ends)), count + array.size
    if lost:
        lines.append(
            f"scales: {lost} of {count} were beyond what float16 holds and became its smallest or "
            "largest number"
        )
    return lines
