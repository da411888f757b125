"""How the Pallas kernel reads each format: which arrays it needs, and a block made a weight.

Written in what Mosaic (TPU), Pallas' Triton and the interpreter all lower: 32-bit words, shifts
that are broadcast, rows loaded one by one, sizes that are powers of two, no gather. Arrays are read
where they lie; inputs alone are put in another order, if any.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lqec_kernels.formats import Base
from lqec_kernels.level_planes import LevelPlanesLayout
from lqec_kernels.packing import RUN
from lqec_kernels.planes import WIDTHS, PlanesLayout
from lqec_kernels.sparse import KEPT, PLACE_BITS, QUAD
from lqec_kernels.sparse_planes import SparsePlanesLayout
from lqec_kernels.tables import find_points

MOST_LEVEL_BITS = 4  # 16 levels are 16 comparisons a weight
SMALLEST_SHARE = 8  # inputs; a scale that fewer share would be a large part of the weight


class Blocks(NamedTuple):
    """A weight as a kernel walks it: `steps` blocks, each of `parts` matrices of `size` inputs.

    Attributes:
      arrays: words uint32 and numbers floating, [..., rows, d_out], as the base has them.
      parts: 1 where a block's inputs are consecutive; 4 where part k has input k of every four.
      open: (refs of the arrays, [rows, columns], and step) -> for each part float32 [size,
        columns]. Rows past d_in are any finite numbers.
    """

    arrays: tuple[jax.Array, ...]
    steps: int
    parts: int
    size: int
    open: Callable[[Sequence[Any], Any], list[jax.Array]]

    def cut(self, x: jax.Array) -> jax.Array:
        """Gives each part its inputs: [..., m, d_in] -> [..., parts, m, rows], zeros past d_in."""
        *lead, m, d_in = x.shape
        missing = self.steps * self.size - d_in // self.parts
        x = x.reshape(*lead, m, d_in // self.parts, self.parts)
        x = jnp.moveaxis(x, -1, -3)  # [..., parts, m, rows]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


class Groups(NamedTuple):
    """How many inputs share a number, of those in a unit."""

    size: int
    unit: int

    @property
    def shared(self) -> int:
        """Inputs of a unit that share one: all of a group, or what it has in common with units."""
        return math.gcd(self.size, self.unit)

    def rows(self, ref: Any, step: Any) -> list[jax.Array]:
        """Returns a unit's numbers in turn, each float32 [1, columns]; one if it is all."""
        groups = ref.shape[0]
        if groups == 1:
            return [_load_row(ref, 0)]
        starts = [(step * self.unit + i) for i in range(0, self.unit, self.shared)]
        # Mosaic has no `//` of signed numbers where no TPU is. Past d_in, where inputs are zeros,
        # the last row is said again.
        rows = [lax.div(jnp.int32(start), jnp.int32(self.size)) for start in starts]
        return [_load_row(ref, jnp.minimum(row, groups - 1)) for row in rows]


def read_blocks(base: Base, *, on_gpu: bool = False) -> Blocks:
    """Says how to walk a base; no array is touched, which may be stacks.

    Args:
      base: of a format of `READERS`.
      on_gpu: for Triton, which stacks no rows.
    Raises:
      NotImplementedError: a format, or groups, that the kernel cannot read; says why.
    """
    layout = base.layout
    if type(layout) not in READERS:
        raise NotImplementedError(
            f"the Pallas kernel reads no {type(base).__name__}; 'xla' takes every format"
        )
    spread = _select_rows if on_gpu else stack_rows
    return READERS[type(layout)](layout, base.columns(), spread)


def _read_planes(layout: PlanesLayout, columns: tuple, spread: Callable) -> Blocks:
    *planes, scales, offsets = columns
    unit, steps = layout.unit_size, -(-layout.d_in // layout.unit_size)
    numbers = [a for a in (scales, offsets) if a is not None]
    numbers_of = _open_groups(scales, layout.group_size, unit, spread)

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        codes = open_codes(refs[: len(planes)], step, layout.bits, unit)
        return [_open_grid(codes, refs[len(planes) :], step, layout.bits, numbers_of)]

    return Blocks((*planes, *numbers), steps, 1, unit, open_block)


def _read_level_planes(layout: LevelPlanesLayout, columns: tuple, spread: Callable) -> Blocks:
    """Codes become levels by a chain of choices: a gather is not lowered."""
    *planes, scales, levels = columns
    unit, steps = layout.unit_size, -(-layout.d_in // layout.unit_size)
    if layout.bits > MOST_LEVEL_BITS:
        raise NotImplementedError(
            f"the Pallas kernel chooses among {2**MOST_LEVEL_BITS} levels, not {2**layout.bits}; "
            "'xla' takes all"
        )
    numbers = [a for a in (levels, scales) if a is not None]
    scale_of = None
    if scales is not None:
        scale_of = _open_groups(scales, layout.group_size, unit, spread)

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        codes = open_codes(refs[: len(planes)], step, layout.bits, unit)
        rest = list(refs[len(planes) :])
        if levels is None:
            known = [float(point) for point in find_points(layout.table)[:, 0]]
        else:
            table = rest.pop(0)
            known = [_load_row(table, code) for code in range(2**layout.bits)]
        w = jnp.zeros(codes.shape, jnp.float32)
        for code, level in enumerate(known):
            w = jnp.where(codes == code, level, w)
        return [w * scale_of(rest[0], step) if scale_of else w]

    return Blocks((*planes, *numbers), steps, 1, unit, open_block)


def _read_sparse_planes(layout: SparsePlanesLayout, columns: tuple, spread: Callable) -> Blocks:
    """Part k has input k of every four: whichever of the two kept weights lies there, or 0."""
    *words, scales, offsets = columns
    unit, steps = layout.unit_size, -(-layout.d_in // QUAD // layout.unit_size)
    count = len(WIDTHS[layout.bits])
    numbers = [a for a in (scales, offsets) if a is not None]
    numbers_of = _open_groups(scales, layout.group_size // KEPT, unit, spread)

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        kept = []
        for k in range(KEPT):
            codes = open_codes(refs[k * count : (k + 1) * count], step, layout.bits, unit)
            places = open_codes(refs[KEPT * count + k :][:1], step, PLACE_BITS, unit)
            grid = _open_grid(codes, refs[len(words) :], step, layout.bits, numbers_of)
            kept.append((places, grid))
        return [
            sum(jnp.where(places == k, values, 0.0) for places, values in kept) for k in range(QUAD)
        ]

    return Blocks((*words, *numbers), steps, QUAD, unit, open_block)


def _open_grid(
    codes: jax.Array, numbers: Sequence[Any], step: Any, bits: int, numbers_of: Callable
):
    """Returns (codes - offsets) · scales of one unit; numbers are refs of scales and offsets."""
    scales, *offsets = numbers
    offset = numbers_of(offsets[0], step) if offsets else 2.0 ** (bits - 1)
    return (codes.astype(jnp.float32) - offset) * numbers_of(scales, step)


def open_codes(planes: Sequence[Any], step: Any, bits: int, unit: int) -> jax.Array:
    """Unpacks one unit of every plane and unites them, int32 [unit, columns]."""
    codes, below = None, 0
    for width, ref in zip(WIDTHS[bits], planes, strict=True):
        words = load_unit(ref, step, unit * width // RUN)  # [rows, columns]
        shifts = lax.broadcasted_iota(jnp.int32, (RUN // width, 1, 1), 0) * width
        words, shifts = jnp.broadcast_arrays(words[None], shifts)
        part = lax.shift_right_logical(words, shifts) & (2**width - 1)
        part = part.reshape(unit, part.shape[-1])  # [unit, columns]
        codes = part if codes is None else codes | (part << below)
        below += width
    return codes


def load_unit(ref: Any, step: Any, rows: int) -> jax.Array:
    """Returns the words of one unit, int32 [rows, columns]."""
    if rows == ref.shape[0]:
        return lax.bitcast_convert_type(ref[...], jnp.int32)
    start = pl.multiple_of(step * rows, rows)  # Mosaic wants to know
    return lax.bitcast_convert_type(ref[pl.ds(start, rows), :], jnp.int32)


def _open_groups(numbers: jax.Array, size: int, unit: int, spread: Callable) -> Callable:
    """Returns (ref of such numbers, step) -> float32 [unit, columns], or one row if it is all."""
    groups = Groups(size, unit)
    if numbers.shape[-2] > 1 and groups.shared < SMALLEST_SHARE:
        raise NotImplementedError(
            f"groups of {size} rows and units of {unit} share blocks of {groups.shared}; the "
            f"Pallas kernel needs {SMALLEST_SHARE} or more; 'xla' takes all"
        )

    def open_rows(ref: Any, step: Any) -> jax.Array:
        rows = groups.rows(ref, step)
        return rows[0] if len(rows) == 1 else spread(rows, groups.shared)

    return open_rows


def _load_row(ref: Any, row: Any) -> jax.Array:
    return ref[pl.ds(row, 1), :].astype(jnp.float32)


def stack_rows(rows: list[jax.Array], times: int) -> jax.Array:
    """Says each of some rows so many times, one under the other: free on a TPU."""
    return jnp.concatenate([jnp.broadcast_to(row, (times, row.shape[1])) for row in rows])


def _select_rows(rows: list[jax.Array], times: int) -> jax.Array:
    """Does the same for Triton, which stacks nothing."""
    which = lax.broadcasted_iota(jnp.int32, (len(rows), 1), 0)
    stacked = rows[0]
    for i, row in enumerate(rows[1:], 1):
        stacked = jnp.where(which == i, row, stacked)
    return jnp.repeat(stacked, times, axis=0)


READERS: dict[type, Callable[[Any, tuple], Blocks]] = {
    PlanesLayout: _read_planes,
    LevelPlanesLayout: _read_level_planes,
    SparsePlanesLayout: _read_sparse_planes,
}
