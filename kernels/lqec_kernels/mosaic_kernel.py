"""The Pallas kernel for Hopper GPUs: a tile of the product by a packed weight.

The product is made turned over, yᵀ = wᵀ xᵀ, so that the weight is wgmma's left operand. That one
may lie in registers, where it is unpacked, and is never written to shared memory; x is the right.

    one warpgroup   fetches units of x, words, scales and offsets, some units ahead of
    two of them     each with half of the columns. Of every unit of 256 inputs they load the words,
                    turned, and dequantize 64 inputs, rounded once, while x is being multiplied by
                    the 64 before; sums are float32

Fetching is the copy engine's. It reads a layer of a stack where it lies, gives zeros past the ends
of an array and writes nothing there. x a is made before; b is multiplied by it as x is by the
weight, 64 of its rank at a time. Where the tiles are too few for the multiprocessors, inputs are
split too, and the sums of splits are added by XLA.

A code becomes a float without a conversion: with its bits at place p of a float's fraction and the
exponent of 2^(23-p) above them, the float is 2^(23-p) + code, exactly.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lqec_kernels.mosaic_steps import CHUNK, OnChip, tile
from lqec_kernels.planes import LARGEST_UNIT, WIDTHS
from lqec_kernels.tuning import Config

UNIT = LARGEST_UNIT
FRACTION = 23  # bits of a float32
WARPGROUPS = 2  # that multiply
EIGHT = 8  # rows of x that wgmma's right operand is a multiple of
FETCHING_REGISTERS = 40  # a thread of the warpgroup that fetches; the others share the rest
PART_ROWS = 32  # of x, whose float32 sums are written at once where inputs are split


def count_groups(group: int) -> int:
    """Returns how many groups a unit has."""
    return UNIT // group if UNIT % group == 0 else 1


class Plan(NamedTuple):
    """The sizes of a call, all known when it is compiled."""

    m: int
    d_in: int
    d_out: int
    rank: int
    bits: int
    group: int
    symmetric: bool
    stacked: bool
    dtype: Any
    config: Config

    @property
    def width(self) -> int:
        """Columns of one warpgroup."""
        return self.config.block_n // WARPGROUPS

    @property
    def units(self) -> int:
        """Units of one split; the last may reach past the end, where all is zeros."""
        return -(-self.d_in // (UNIT * self.config.splits))

    @property
    def splits(self) -> int:
        return -(-self.d_in // (UNIT * self.units))

    @property
    def out(self) -> jax.ShapeDtypeStruct:
        """The product; where inputs are split, their sums. Sides are whole tiles of a copy."""
        shape = (pl.cdiv(self.m, EIGHT) * EIGHT, pl.cdiv(self.d_out, CHUNK) * CHUNK)
        if self.splits == 1:
            return jax.ShapeDtypeStruct(shape, self.dtype)
        return jax.ShapeDtypeStruct((self.splits, *shape), jnp.float32)

    @property
    def reach(self) -> int:
        """Inputs past the end that are asked for, and a tile."""
        return self.units * self.splits * UNIT - self.d_in + UNIT


def call_kernel(*operands: jax.Array, plan: Plan, machine: type[OnChip]) -> jax.Array:
    """Makes `plan.out`.

    Args:
      operands: int32 [1], the layer; uint32 [1], a zero; x [m, d_in]; of the weight, the planes,
        scales, and offsets if there are; with an adapter x a [m, r] and b [r, d_out], of x's dtype.
        Rows of x, x a and b are a multiple of 8, columns of all one of 64, also those of stacks.
      plan: sizes.
      machine: the chip, or what stands for it.
    """
    config, width = plan.config, plan.width
    scratch = {}
    if plan.rank or plan.splits == 1:
        # A piece of b comes where later a piece of the product goes from.
        room = (WARPGROUPS, CHUNK, width)
        scratch["room"] = plgpu.SMEM(room, plan.dtype, transforms=tile(plan.dtype))
    if plan.splits > 1:
        parts = (WARPGROUPS, PART_ROWS, width)
        scratch["parts"] = plgpu.SMEM(parts, jnp.float32, transforms=tile(jnp.float32))
    if plan.rank:
        down = (config.block_m, CHUNK)
        scratch["down"] = plgpu.SMEM(down, plan.dtype, transforms=tile(plan.dtype))
        scratch["come"] = plgpu.Barrier(num_arrivals=WARPGROUPS + 1)
        scratch["gone"] = plgpu.Barrier(num_arrivals=WARPGROUPS)
    return machine.run(
        partial(_multiply_tile, plan=plan, machine=machine),
        operands,
        plan.out,
        plan.reach,
        # The last goes first: rows, for which the same words are wanted at the same time.
        grid=(
            pl.cdiv(plan.d_out, config.block_n),
            plan.splits,
            pl.cdiv(plan.m, config.block_m),
        ),
        grid_names=("columns", "split", "rows"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="packed_matmul",
        scratch_types=scratch,
    )


class _Place(NamedTuple):
    """Which tile of the product a program makes, from which share of the inputs."""

    rows: jax.Array
    columns: jax.Array
    split: jax.Array
    layer: jax.Array
    # Of which the compiler does not know that it is 0. What is added to it has to be in a register,
    # so that one instruction can take a word, a mask and an exponent.
    zero: jax.Array
    plan: Plan

    def rows_from(self, start: int, count: int) -> Any:
        return pl.ds(self.rows * self.plan.config.block_m + start, count)

    @property
    def warpgroup(self) -> jax.Array:
        return lax.axis_index("warpgroup")

    @property
    def own_columns(self) -> Any:
        """Returns the warpgroup's columns of the product."""
        plan = self.plan
        first = self.columns * plan.config.block_n + self.warpgroup * plan.width
        return pl.ds(first, plan.width)


def _multiply_tile(
    layer_ref, zero_ref, x_ref, *refs, plan: Plan, machine: type[OnChip], **scratch
) -> None:
    """The kernel: one tile of the product, all of d_in or a split of it.

    Refs: in global memory the layer [1] and a zero [1]; x [m, d_in], planes, scales, offsets, and
    with an adapter x a [m, r] and b [r, d_out]; y [m, d_out], or [splits, m, d_out].
    """
    *operands, y_ref = refs
    weight, factors = (operands[:-2], operands[-2:]) if plan.rank else (operands, ())
    axes = (lax.axis_index(name) for name in ("rows", "columns", "split"))
    place = _Place(*axes, layer_ref[0], zero_ref[0], plan)

    def compute(pipeline) -> None:
        def sum_up(sums) -> None:
            if factors:
                sums = _add_low_rank(sums, factors, place, machine, scratch)
            _write_out(machine.read(pipeline(sums)), y_ref, place, machine, scratch)

        machine.hold((plan.width, plan.config.block_m), sum_up)

    pipeline = plgpu.emit_pipeline_warp_specialized(
        partial(_add_unit, place=place, machine=machine),
        grid=(plan.units,),
        in_specs=_list_blocks(place),
        memory_registers=FETCHING_REGISTERS,
        max_concurrent_steps=plan.config.num_stages,
        wg_axis="warpgroup",
        num_compute_wgs=WARPGROUPS,
        compute_context=compute,
    )
    pipeline(x_ref, *weight)


def _list_blocks(place: _Place) -> list[plgpu.BlockSpec]:
    """Says what a unit needs of x, the planes, the scales and the offsets."""
    plan = place.plan
    rows, columns = plan.config.block_m, plan.config.block_n

    def unit(step) -> jax.Array:
        return place.split * plan.units + step

    def cut(height: int, find, transforms=()) -> plgpu.BlockSpec:
        if plan.stacked:
            shape, index = (
                (None, height, columns),
                lambda k: (place.layer, find(k), place.columns),
            )
        else:
            shape, index = (height, columns), lambda k: (find(k), place.columns)
        return plgpu.BlockSpec(shape, index, transforms=transforms)

    specs = [
        plgpu.BlockSpec((rows, UNIT), lambda k: (place.rows, unit(k)), transforms=tile(plan.dtype))
    ]
    for width in WIDTHS[plan.bits]:
        specs.append(cut(UNIT * width // 32, unit, tile(jnp.uint32)))
    groups = count_groups(plan.group)
    # Of a group larger than a unit every unit fetches the numbers again.
    first = unit if groups > 1 else lambda k: lax.div(unit(k) * UNIT, plan.group)
    return specs + [cut(groups, first)] * (1 if plan.symmetric else 2)


def _add_unit(_, x_ref, *refs, place: _Place, machine: type[OnChip]):
    """Adds a unit's share to the sums, the last of the arguments; returns them."""
    *refs, sums = refs
    plan = place.plan
    mine = pl.ds(place.warpgroup * plan.width, plan.width)
    count = len(WIDTHS[plan.bits])
    words = [machine.read_turned(ref.at[:, mine]) for ref in refs[:count]]
    unpack = _open_words(words, place, machine)
    size = min(UNIT * WIDTHS[plan.bits][0] // 32, plan.group, CHUNK)
    numbers: list = []
    for chunk in range(0, UNIT, CHUNK):
        pieces = []
        for start in range(chunk, chunk + CHUNK, size):
            if start % min(plan.group, UNIT) == 0:
                group = start // plan.group
                numbers = [machine.read_column(ref, group, mine) for ref in refs[count:]]
            w = _place_on_grid(unpack(start, size), numbers)
            pieces.append(w.astype(plan.dtype))
        sums = machine.multiply(sums, machine.join(pieces), x_ref.at[:, pl.ds(chunk, CHUNK)])
    sums = machine.finish(sums)
    plgpu.commit_smem()  # all is read, and the copy engine may write the next unit there
    return sums


def _place_on_grid(codes: jax.Array, numbers) -> jax.Array:
    """Returns (codes - offsets) · scales, float32 [columns, inputs]; numbers are [columns]."""
    scales, *offsets = (n.astype(jnp.float32) for n in numbers)
    spread = partial(lax.broadcast_in_dim, shape=codes.shape, broadcast_dimensions=(0,))
    if offsets:
        return codes * spread(scales) - spread(offsets[0] * scales)  # one multiply-add a weight
    return codes * spread(scales)


def _open_words(words: list[jax.Array], place: _Place, machine: type[OnChip]):
    """Returns (first input, how many) -> their codes, less the middle where there are no offsets.

    They are float32 [columns, how many].

    Args:
      words: uint32 [columns, rows] of each plane of one unit.
    """
    bits = place.plan.bits
    width, middle = WIDTHS[bits][0], 2 ** (bits - 1) if place.plan.symmetric else 0
    rows = UNIT * width // 32
    highest = (FRACTION - bits) // width * width  # place of a code in a fraction
    low = [words[0], words[0] >> np.uint32(highest + width)]
    high = None
    if bits == 3:
        # The second half of a unit of 16 words has its upper bits at odd places.
        upper = machine.join([words[1], words[1] >> np.uint32(1)])
        high = [upper << np.uint32(2), upper >> np.uint32(highest + width - 2)]

    def unpack(start: int, size: int) -> jax.Array:
        sub, first = divmod(start, rows)
        moved, bit = divmod(sub * width, highest + width)
        mask = np.uint32(2**width - 1 << bit)
        exponent = 127 + FRACTION - bit
        codes = low[moved][:, first : first + size] & mask
        codes = codes | (np.uint32(exponent << FRACTION) + place.zero)
        if high is not None:
            # Where this too were united, the compiler would do that first, with one more step.
            codes = codes ^ (high[moved] & np.uint32(4 << bit))
        known = 2 ** (FRACTION - bit) + middle
        return lax.bitcast_convert_type(codes, jnp.float32) - np.float32(known)

    return unpack


def _add_low_rank(sums, factors, place: _Place, machine: type[OnChip], scratch: dict):
    """Adds bᵀ (x a)ᵀ, 64 of the rank at a time, while the first units are fetched."""
    down_ref, b_ref = factors
    if len(b_ref.shape) == 3:
        b_ref = b_ref.at[place.layer]
    room, down, come = (
        scratch["room"].at[place.warpgroup],
        scratch["down"],
        scratch["come"],
    )

    def add(step, sums):
        @pl.when(step > 0)
        def _() -> None:
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch["gone"])
            plgpu.barrier_wait(scratch["gone"])

        piece = pl.ds(step * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(b_ref.at[piece, place.own_columns], room, come)

        @pl.when(place.warpgroup == 0)
        def _() -> None:
            rows = place.rows_from(0, place.plan.config.block_m)
            plgpu.copy_gmem_to_smem(down_ref.at[rows, piece], down, come)

        plgpu.barrier_wait(come)
        return machine.finish(machine.multiply(sums, machine.read_turned(room), down))

    pieces = pl.cdiv(place.plan.rank, CHUNK)
    if place.plan.splits > 1:
        pieces = jnp.where(place.split == 0, pieces, 0)
    return lax.fori_loop(0, pieces, add, sums)


def _write_out(sums, y_ref, place: _Place, machine: type[OnChip], scratch: dict) -> None:
    """Rounds the sums [columns, rows] and writes them, turned, some rows at a time."""
    plan = place.plan
    if plan.splits > 1:
        y_ref, room_ref = y_ref.at[place.split], scratch["parts"]
    else:
        room_ref = scratch["room"]
    for start in range(0, plan.config.block_m, room_ref.shape[1]):
        count = min(room_ref.shape[1], plan.config.block_m - start)
        room = room_ref.at[place.warpgroup, pl.ds(0, count)]
        machine.write_turned(room, sums[:, start : start + count].astype(y_ref.dtype))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(room, y_ref.at[place.rows_from(start, count), place.own_columns])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
