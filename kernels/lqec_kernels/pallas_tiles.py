"""How the Pallas kernel reads each format: its arrays cut into blocks, and a block made a weight.

Written in what Mosaic (TPU), Pallas' Triton and the interpreter all lower: 32-bit words, shifts
that are broadcast, `jnp.repeat`, sizes that are powers of two, no gather.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lqec_kernels.formats import Base
from lqec_kernels.level_planes import LevelPlanesLayout
from lqec_kernels.packing import RUN
from lqec_kernels.planes import WIDTHS, PlanesLayout
from lqec_kernels.sparse import KEPT, PLACE_BITS, QUAD
from lqec_kernels.sparse_planes import SparsePlanesLayout
from lqec_kernels.tables import find_points

MOST_LEVEL_BITS = 4  # 16 levels are 16 comparisons a weight
SMALLEST_REPEAT = 8  # inputs; a scale that fewer share would be a large part of the weight


class Blocks(NamedTuple):
    """A weight as a kernel walks it: `steps` blocks, each of `parts` matrices of `size` inputs.

    Attributes:
      arrays: words int32 and numbers float32, [steps, rows, d_out]; [1, rows, d_out] where all
        steps read the same.
      parts: 1 where a block's inputs are consecutive; 4 where part k has input k of every four.
      open: (refs of the arrays, step) -> for each part float32 [size, columns].
    """

    arrays: tuple[jax.Array, ...]
    steps: int
    parts: int
    size: int
    open: Callable[[Sequence[Any], Any], list[jax.Array]]

    def cut(self, x: jax.Array) -> jax.Array:
        """Gives each block its inputs: [m, d_in] -> [steps, parts, m, size], zeros past d_in."""
        m, d_in = x.shape
        x = jnp.moveaxis(x.reshape(m, d_in // self.parts, self.parts), -1, 0)  # [parts, m, rows]
        missing = self.steps * self.size - d_in // self.parts
        x = jnp.pad(x, ((0, 0), (0, 0), (0, missing)))
        x = x.reshape(self.parts, m, self.steps, self.size)
        return jnp.moveaxis(x, 2, 0)  # [steps, parts, m, size]


def read_blocks(base: Base) -> Blocks:
    """Cuts a base into the blocks of its format.

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
    words = _cut_words(planes, steps)
    numbers = [
        _cut_groups(a, layout.group_size, unit, steps) for a in (scales, offsets) if a is not None
    ]

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        codes = open_codes(refs[: len(words)], step, layout.bits, unit)
        return [_open_grid(codes, refs[len(words) :], step, layout)]

    return Blocks((*words, *numbers), steps, 1, unit, open_block)


def _read_level_planes(layout: LevelPlanesLayout, columns: tuple) -> Blocks:
    """Codes become levels by a chain of choices: a gather is not lowered."""
    *planes, scales, levels = columns
    unit, steps = layout.unit_size, -(-layout.d_in // layout.unit_size)
    if layout.bits > MOST_LEVEL_BITS:
        raise NotImplementedError(
            f"the Pallas kernel chooses among {2**MOST_LEVEL_BITS} levels, not {2**layout.bits}; "
            "'xla' takes all"
        )
    words = _cut_words(planes, steps)
    numbers = [] if levels is None else [levels.astype(jnp.float32)[None]]
    if scales is not None:
        numbers.append(_cut_groups(scales, layout.group_size, unit, steps))

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        codes = open_codes(refs[: len(words)], step, layout.bits, unit)
        rest = list(refs[len(words) :])
        if levels is None:
            known = [float(point) for point in find_points(layout.table)[:, 0]]
        else:
            table = rest.pop(0)
            known = [table[0, code : code + 1, :] for code in range(2**layout.bits)]
        w = jnp.zeros(codes.shape, jnp.float32)
        for code, level in enumerate(known):
            w = jnp.where(codes == code, level, w)
        return [w * open_groups(rest[0], step, unit) if rest else w]

    return Blocks((*words, *numbers), steps, 1, unit, open_block)


def _read_sparse_planes(layout: SparsePlanesLayout, columns: tuple) -> Blocks:
    """Part k has input k of every four: whichever of the two kept weights lies there, or 0."""
    *words, scales, offsets = columns
    unit, steps = layout.unit_size, -(-layout.d_in // QUAD // layout.unit_size)
    count = len(WIDTHS[layout.bits])
    words = _cut_words(words, steps)
    numbers = [
        _cut_groups(a, layout.group_size // KEPT, unit, steps)
        for a in (scales, offsets)
        if a is not None
    ]

    def open_block(refs: Sequence[Any], step: Any) -> list[jax.Array]:
        kept = []
        for k in range(KEPT):
            codes = open_codes(refs[k * count : (k + 1) * count], step, layout.bits, unit)
            places = open_codes(refs[KEPT * count + k :][:1], step, PLACE_BITS, unit)
            kept.append((places, _open_grid(codes, refs[len(words) :], step, layout)))
        return [
            sum(jnp.where(places == k, values, 0.0) for places, values in kept) for k in range(QUAD)
        ]

    return Blocks((*words, *numbers), steps, QUAD, unit, open_block)


def _open_grid(codes: jax.Array, numbers: Sequence[Any], step: Any, layout: Any) -> jax.Array:
    """Returns (codes - offsets) · scales of one unit; numbers are refs of scales and offsets."""
    unit = layout.unit_size
    scales, *offsets = numbers
    offset = open_groups(offsets[0], step, unit) if offsets else 2.0 ** (layout.bits - 1)
    return (codes.astype(jnp.float32) - offset) * open_groups(scales, step, unit)


def open_codes(planes: Sequence[Any], step: Any, bits: int, unit: int) -> jax.Array:
    """Unpacks one unit of every plane and unites them, int32 [unit, columns]."""
    codes, below = None, 0
    for width, ref in zip(WIDTHS[bits], planes, strict=True):
        words = ref[step]  # [rows, columns]
        shifts = lax.broadcasted_iota(jnp.int32, (RUN // width, 1, 1), 0) * width
        words, shifts = jnp.broadcast_arrays(words[None], shifts)
        part = lax.shift_right_logical(words, shifts) & (2**width - 1)
        part = part.reshape(unit, part.shape[-1])  # [unit, columns]
        codes = part if codes is None else codes | (part << below)
        below += width
    return codes


def open_groups(ref: Any, step: Any, unit: int) -> jax.Array:
    """Says groups' numbers once an input, float32 [unit, columns]; [1, columns] if one is all."""
    rows = ref[step if ref.shape[0] > 1 else 0]
    return rows if rows.shape[0] == 1 else jnp.repeat(rows, unit // rows.shape[0], axis=0)


def _cut_words(planes: Sequence[jax.Array], steps: int) -> list[jax.Array]:
    """Returns planes as int32 [steps, words of a unit, d_out]."""
    words = [lax.bitcast_convert_type(plane, jnp.int32) for plane in planes]
    return [plane.reshape(steps, -1, plane.shape[-1]) for plane in words]


def _cut_groups(numbers: jax.Array, group: int, unit: int, steps: int) -> jax.Array:
    """Returns numbers of groups by unit, float32 [steps, rows, d_out], or [1, 1, d_out] of a whole.

    A group that is no power of two, or larger than a unit, is said once for each block that it has
    in common with units.
    """
    groups, d_out = numbers.shape
    numbers = numbers.astype(jnp.float32)
    if groups == 1:
        return numbers[None]
    shared = math.gcd(group, unit)
    if shared < SMALLEST_REPEAT:
        raise NotImplementedError(
            f"groups of {group} rows and units of {unit} share blocks of {shared}; the Pallas "
            f"kernel needs {SMALLEST_REPEAT} or more; 'xla' takes all"
        )
    rows = unit // shared
    numbers = jnp.repeat(numbers, group // shared, axis=0)
    numbers = jnp.pad(numbers, ((0, steps * rows - numbers.shape[0]), (0, 0)))
    return numbers.reshape(steps, rows, d_out)  # [steps, rows, d_out]


READERS: dict[type, Callable[[Any, tuple], Blocks]] = {
    PlanesLayout: _read_planes,
    LevelPlanesLayout: _read_level_planes,
    SparsePlanesLayout: _read_sparse_planes,
}
