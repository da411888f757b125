"""Few rows times a grid of 2, 3 or 4 bits, in bfloat16: weights are opened two at a time.

A TPU's registers have 32 bits, and its matrix units take bfloat16 by twos. A word of `planes` holds
inputs of the unit's first half in its low 16 bits and of the second half in its high ones, so that
one shift, one mask and one OR make two numbers: their codes become the first bits behind the point
of v = 1 + code · 2^-bits, exact in bfloat16. Scales and offsets then belong to sums over groups,

    y = Σ_g scale_g · 2^bits · (Σ_{i in g} x_i v_i - (1 + offset_g · 2^-bits) · Σ_{i in g} x_i),

which are few. The groups of a unit are told apart by rows of x: one for each, zero elsewhere.

Compiled for a TPU v5e, 256 x 512 weights of 2 bits in groups of 64 take 94 instruction bundles with
one row of x and 168 with 16; opened one by one in float32, scaled and rounded, 228 and 236. What
bounds 94 is that its matrix units take 2048 numbers of a weight in a cycle.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lqec_kernels.formats import Base
from lqec_kernels.pallas_tiles import Groups, load_unit, stack_rows
from lqec_kernels.planes import LARGEST_UNIT, WIDTHS, Planes, PlanesLayout

HALF = LARGEST_UNIT // 2
MOST_ROWS = 64  # of x, once for each group of a unit: more, and to scale sums costs as much
AT_ONCE = 4  # units, so that one's results come while the next is opened
POINT = 7  # bits of a bfloat16 behind the point
ONE = 0x3F803F80  # two ones


def can_pair(base: Base, m: int, dtype: Any) -> bool:
    """Says whether a product of m rows can be made this way, and gains by it."""
    if not isinstance(base, Planes) or base.bits == 8 or dtype != jnp.bfloat16:
        return False
    whole = base.scales.shape[-2] == 1
    groups = 1 if whole else LARGEST_UNIT // Groups(base.group_size, LARGEST_UNIT).shared
    return base.unit_size == LARGEST_UNIT and groups * m <= MOST_ROWS


def interleave(x: jax.Array) -> jax.Array:
    """Puts the halves of each unit one into the other: [..., units · 256] -> the same."""
    *lead, d_in = x.shape
    x = x.reshape(*lead, d_in // LARGEST_UNIT, 2, HALF).swapaxes(-1, -2)
    return x.reshape(*lead, d_in)  # [..., units · 256]


def multiply_pairs(x_ref: Any, refs: Sequence[Any], layout: PlanesLayout) -> jax.Array:
    """Makes one tile of a product in a kernel.

    Args:
      x_ref: bfloat16 [parts, m, units · 256], of which the last part is interleaved.
      refs: of the planes, scales and offsets, [rows, columns].
      layout: of the weight.
    Returns:
      float32 [m, columns].
    """
    count = len(WIDTHS[layout.bits])
    planes, numbers = refs[:count], refs[count:]
    groups = Groups(layout.group_size, LARGEST_UNIT)
    m, columns = x_ref.shape[1], refs[0].shape[1]
    told = 1 if numbers[0].shape[0] == 1 else LARGEST_UNIT // groups.shared

    def add(step: jax.Array, sums: jax.Array) -> jax.Array:
        start = pl.multiple_of(step * LARGEST_UNIT, LARGEST_UNIT)
        x = _tell_groups(x_ref[x_ref.shape[0] - 1, :, pl.ds(start, LARGEST_UNIT)], told, groups)
        part = jnp.dot(
            x.astype(jnp.bfloat16),
            open_pairs(planes, step, layout.bits),
            preferred_element_type=jnp.float32,
        )
        scale, *offset = (stack_rows(groups.rows(ref, step), m) for ref in numbers)
        middle = offset[0] if offset else 2.0 ** (layout.bits - 1)
        total = jnp.sum(x, axis=1, keepdims=True)
        return sums + scale * (part - total * (1 + middle * 2.0**-layout.bits))

    def add_some(first: jax.Array, count: int, sums: jax.Array) -> jax.Array:
        for i in range(count):
            sums = add(first + i, sums)
        return sums

    steps, sums = x_ref.shape[2] // LARGEST_UNIT, jnp.zeros((told * m, columns), jnp.float32)
    at_once = min(AT_ONCE, steps)
    rest = steps % at_once
    sums = lax.fori_loop(
        0, steps // at_once, lambda i, sums: add_some(i * at_once, at_once, sums), sums
    )
    sums = add_some(steps - rest, rest, sums)
    return sum(sums[group * m : (group + 1) * m] for group in range(told)) * 2.0**layout.bits


def _tell_groups(x: jax.Array, told: int, groups: Groups) -> jax.Array:
    """Says x, interleaved, once for each group of the unit, zero elsewhere: [told · m, 256]."""
    if told == 1:
        return x.astype(jnp.float32)
    m = x.shape[0]
    x = jnp.concatenate([x.astype(jnp.float32)] * told)
    place = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    place = (place & 1) * HALF + (place >> 1)  # which input of the unit
    first = lax.div(lax.broadcasted_iota(jnp.int32, x.shape, 0), m) * groups.shared
    return jnp.where((place >= first) & (place < first + groups.shared), x, 0.0)


def open_pairs(planes: Sequence[Any], step: Any, bits: int) -> jax.Array:
    """Returns 1 + code · 2^-bits of one unit, interleaved, bfloat16 [256, columns]."""
    pairs, below = jnp.int32(ONE), POINT - bits
    for width, ref in zip(WIDTHS[bits], planes, strict=True):
        words = load_unit(ref, step, LARGEST_UNIT * width // 32)
        field = (2**width - 1) << below
        runs = [_shift(words, low - below) for low in range(0, 16, width)]
        pairs = pairs | (jnp.concatenate(runs) & (field | field << 16))  # [128, columns]
        below += width
    return pltpu.bitcast(pairs, jnp.bfloat16)  # [256, columns]


def _shift(words: jax.Array, right: int) -> jax.Array:
    return lax.shift_right_logical(words, right) if right >= 0 else words << -right
