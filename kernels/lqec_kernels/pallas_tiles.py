"""How the Pallas kernel reads each format: which arrays it needs, and a block made a weight.

Written in what Mosaic (TPU), Pallas' Triton and the interpreter all lower: 32-bit words, shifts
that are broadcast, rows loaded one by one, two arrays joined, sizes that are powers of two, no
gather. Arrays are read where they lie; only the inputs are put in another order, if any.
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


def read_blocks(base: Base) -> Blocks:
    """Says how to walk a base; no array is touched, which may be stacks.

    Raises:
      NotImplementedError: a format, or groups, that the kernel cannot read; says why.
    """
    layout = base.layout
    if type(layout) not in READERS:
        raise NotImplementedError(
            f"the Pallas kernel reads no {type(base).__name__}; 'xla' takes every format"
        )
    return READERS[type(layout)](layout, base.columns())


def _read_planes(layout: PlanesLayout, columns: tuple) -> Blocks:
    *planes, scales, offsets = columns
    unit, steps = layout.unit_size, -(-layout.d_in // layout.unit_size)
    numbers = [a for a in (scales, offsets) if a is not None]
    _check_groups(scales, layout.group_size, unit)

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        codes = open_codes(refs[: len(planes)], step, layout.bits, unit)
        return [_open_grid(codes, refs[len(planes) :], step, layout, layout.group_size)]

    return Blocks((*planes, *numbers), steps, 1, unit, open_block)


def _read_level_planes(layout: LevelPlanesLayout, columns: tuple) -> Blocks:
    """Codes become levels by a chain of choices: a gather is not lowered."""
    *planes, scales, levels = columns
    unit, steps = layout.unit_size, -(-layout.d_in // layout.unit_size)
    if layout.bits > MOST_LEVEL_BITS:
        raise NotImplementedError(
            f"the Pallas kernel chooses among {2**MOST_LEVEL_BITS} levels, not {2**layout.bits}; "
            "'xla' takes all"
        )
    numbers = [a for a in (levels, scales) if a is not None]
    if scales is not None:
        _check_groups(scales, layout.group_size, unit)

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
        return [w * open_groups(rest[0], step, unit, layout.group_size) if rest else w]

    return Blocks((*planes, *numbers), steps, 1, unit, open_block)


def _read_sparse_planes(layout: SparsePlanesLayout, columns: tuple) -> Blocks:
    """Part k has input k of every four: whichever of the two kept weights lies there, or 0."""
    *words, scales, offsets = columns
    unit, steps = layout.unit_size, -(-layout.d_in // QUAD // layout.unit_size)
    count = len(WIDTHS[layout.bits])
    numbers = [a for a in (scales, offsets) if a is not None]
    group = layout.group_size // KEPT
    _check_groups(scales, group, unit)

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        kept = []
        for k in range(KEPT):
            codes = open_codes(refs[k * count : (k + 1) * count], step, layout.bits, unit)
            places = open_codes(refs[KEPT * count + k :][:1], step, PLACE_BITS, unit)
            kept.append((places, _open_grid(codes, refs[len(words) :], step, layout, group)))
        return [
            sum(jnp.where(places == k, values, 0.0) for places, values in kept) for k in range(QUAD)
        ]

    return Blocks((*words, *numbers), steps, QUAD, unit, open_block)


def _open_grid(codes: jax.Array, numbers: Sequence[Any], step: Any, layout: Any, group: int):
    """Returns (codes - offsets) · scales of one unit; numbers are refs of scales and offsets."""
    unit = layout.unit_size
    scales, *offsets = numbers
    offset = open_groups(offsets[0], step, unit, group) if offsets else 2.0 ** (layout.bits - 1)
    return (codes.astype(jnp.float32) - offset) * open_groups(scales, step, unit, group)


def open_codes(planes: Sequence[Any], step: Any, bits: int, unit: int) -> jax.Array:
    """Unpacks one unit of every plane and unites them, int32 [unit, columns]."""
    codes, below = None, 0
    for width, ref in zip(WIDTHS[bits], planes, strict=True):
        words = _load_unit(ref, step, unit * width // RUN)  # [rows, columns]
        shifts = lax.broadcasted_iota(jnp.int32, (RUN // width, 1, 1), 0) * width
        words, shifts = jnp.broadcast_arrays(words[None], shifts)
        part = lax.shift_right_logical(words, shifts) & (2**width - 1)
        part = part.reshape(unit, part.shape[-1])  # [unit, columns]
        codes = part if codes is None else codes | (part << below)
        below += width
    return codes


def _load_unit(ref: Any, step: Any, rows: int) -> jax.Array:
    """Returns the words of one unit, int32 [rows, columns]."""
    if rows == ref.shape[0]:
        return lax.bitcast_convert_type(ref[...], jnp.int32)
    start = pl.multiple_of(step * rows, rows)  # Mosaic wants to know
    return lax.bitcast_convert_type(ref[pl.ds(start, rows), :], jnp.int32)


def open_groups(ref: Any, step: Any, unit: int, group: int) -> jax.Array:
    """Says groups' numbers once an input, float32 [unit, columns]; [1, columns] if one is all.

    A group that is no power of two, or larger than a unit, is said for each block of inputs that it
    has in common with units.
    """
    groups = ref.shape[0]
    if groups == 1:
        return _load_row(ref, 0)
    shared = math.gcd(group, unit)
    blocks = unit // shared
    # Past d_in the last row is said again, for inputs that are zeros.
    rows = [jnp.minimum((step * blocks + i) * shared // group, groups - 1) for i in range(blocks)]
    return _join([jnp.broadcast_to(_load_row(ref, r), (shared, ref.shape[1])) for r in rows])


def _load_row(ref: Any, row: Any) -> jax.Array:
    return ref[pl.ds(row, 1), :].astype(jnp.float32)


def _join(arrays: list[jax.Array]) -> jax.Array:
    """Stacks a power of two of arrays; Triton joins no more than two."""
    while len(arrays) > 1:
        arrays = [jnp.concatenate(arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
    return arrays[0]


def _check_groups(numbers: jax.Array, group: int, unit: int) -> None:
    shared = math.gcd(group, unit)
    if numbers.shape[-2] > 1 and shared < SMALLEST_SHARE:
        raise NotImplementedError(
            f"groups of {group} rows and units of {unit} share blocks of {shared}; the Pallas "
            f"kernel needs {SMALLEST_SHARE} or more; 'xla' takes all"
        )


READERS: dict[type, Callable[[Any, tuple], Blocks]] = {
    PlanesLayout: _read_planes,
    LevelPlanesLayout: _read_level_planes,
    SparsePlanesLayout: _read_sparse_planes,
}
