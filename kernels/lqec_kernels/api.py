"""One product for every format and every implementation."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lqec_kernels.formats import Base, LowRank
from lqec_kernels.reference import tiled_matmul

IMPLEMENTATIONS = ("xla",)
# What taking an input into a mean costs, in multiply-adds: on a CPU, over 128 to 352 inputs.
MEANS = 4


def packed_matmul(
    x: jax.Array,
    base: Base,
    *,
    corrections: Sequence = (),
    implementation: str = "auto",
    shards: int = 1,
) -> jax.Array:
    """Multiplies by a packed weight and adds its corrections: y = x·base + Σ correction(x).

    Args:
      x: floating [..., d_in].
      base: a format of `formats`, unstacked.
      corrections: operators with `apply(x)`, such as LowRank.
      implementation: 'xla', or 'auto', which is 'xla' until there are others.
      shards: see `tiled_matmul`.
    Returns:
      [..., d_out] of x.dtype; sums are float32.
    Raises:
      ValueError: x has another width than the base; an unknown implementation.
    Example:
      >>> packed_matmul(x, leaf.base, corrections=leaf.corrections).shape
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(("auto", *IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is not one of {known}")
    if x.shape[-1] != base.d_in:
        raise ValueError(f"x has width {x.shape[-1]}, the weight [{base.d_in}, {base.d_out}]")
    inside, beside = _place_corrections(x, base, corrections)
    y = tiled_matmul(x, base, low_rank=inside, shards=shards)
    for correction in beside:
        y = y + correction.apply(x)
    return y


def _place_corrections(x: jax.Array, base: Base, corrections: Sequence) -> tuple:
    """Says which low-rank correction joins the weight's tiles, and which are products of their own.

    Below float32 joining would round the correction to the weight's few digits, so there it stands
    beside.
    """
    tokens = math.prod(x.shape[:-1])
    joining = [
        c for c in corrections if isinstance(c, LowRank) and _is_cheaper_inside(c, base, tokens)
    ]
    if not joining or x.dtype != jnp.float32:
        return None, tuple(corrections)
    first = joining[0]
    whole = first.expanded()
    factors = (whole.a.astype(x.dtype), whole.b.astype(x.dtype))
    return factors, tuple(c for c in corrections if c is not first)


def _is_cheaper_inside(correction: LowRank, base: Base, tokens: int) -> bool:
    """Compares multiply-adds of a correction in the tiles and beside them.

    Joining costs d_in · d_out · r, standing beside tokens · (d_in + d_out) · r, forward as
    backward. One that is pooled reads less beside, and takes means first; the gradients of its
    factors are counted too, which inside are those of the expanded ones.
    """
    d_in, d_out, rank = base.d_in, base.d_out, correction.rank
    if correction.pool == 1:
        return tokens * (d_in + d_out) > d_in * d_out
    inside = 2 * rank * (d_in * d_out + tokens * (d_in + d_out))
    beside = 3 * tokens * (rank * (d_in // correction.pool + d_out) + MEANS * d_in)
    return inside < beside
