"""One product for every format and every implementation."""

from collections.abc import Sequence

import jax

from lqec_kernels.formats import Base
from lqec_kernels.reference import tiled_matmul

IMPLEMENTATIONS = ("xla",)


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
    y = tiled_matmul(x, base, shards=shards)
    for correction in corrections:
        y = y + correction.apply(x)
    return y
