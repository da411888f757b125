"""x @ weight + (x a) b on NVIDIA GPUs of Hopper's kind, by the Mosaic kernel of `mosaic_kernel`.

For the rows between decode and prefill, where the matrix units and the unpacking both count.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from lqec_kernels.batching import join_rows
from lqec_kernels.formats import Base
from lqec_kernels.layers import take_layer
from lqec_kernels.mosaic_kernel import (
    CHUNK,
    EIGHT,
    PART_ROWS,
    UNIT,
    Plan,
    call_kernel,
    count_groups,
)
from lqec_kernels.mosaic_steps import Interpreted, OnChip
from lqec_kernels.planes import Planes
from lqec_kernels.tuning import Config

LEAST_GROUP = 32
MOST_STAGES = 4
MULTIPROCESSORS = 132  # of an H100 or H200
LEAST_UNITS = 4  # of a split, so that fetching ahead has something to gain
# Shared memory of a program on Hopper, less what barriers and alignment may take.
SHARED_BYTES = 225 * 1024


def choose_config(m: int, base: Planes, rank: int = 0) -> Config:
    """Chooses tiles by the sizes, and into how many parts inputs are split.

    Up to 128 rows and 256 columns, if two units of them fit and make programs for most
    multiprocessors; else 128 columns, and 64 rows where even those do not fit.

    Raises:
      NotImplementedError: not even the smallest fit.
    """
    best = None
    for most, columns in ((128, 256), (128, 128), (64, 128)):
        tiles = -(-m // most)
        rows = -(-m // (EIGHT * tiles)) * EIGHT
        programs = tiles * -(-base.d_out // columns)
        splits = max(1, min(base.d_in // UNIT // LEAST_UNITS, MULTIPROCESSORS // programs))
        config = Config(rows, columns, splits)
        stages = _count_stages(config, base, rank)
        if stages < 2 or (best and columns == best.block_n):
            continue
        best = replace(config, num_stages=stages)
        if programs * splits >= MULTIPROCESSORS * 3 // 4:
            break
    if best is None:
        raise NotImplementedError("two units do not fit into shared memory; 'xla' takes all")
    return best


def _count_stages(config: Config, base: Planes, rank: int) -> int:
    """Returns how many units fit into shared memory, up to 4."""
    rows, columns = config.block_m, config.block_n
    numbers = [array.dtype.itemsize for array in (base.scales, base.offsets) if array is not None]
    numbers = count_groups(base.group_size) * sum(numbers)
    unit = rows * UNIT * 2 + columns * (UNIT * base.bits // 8 + numbers)
    kept = CHUNK * columns * 2 * (bool(rank) or config.splits == 1)
    kept += rows * CHUNK * 2 * bool(rank)
    kept += PART_ROWS * columns * 4 * (config.splits > 1)
    return min(MOST_STAGES, (SHARED_BYTES - kept) // unit)


def mosaic_matmul(
    x: jax.Array,
    base: Base,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    *,
    layer: jax.Array | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies by a repacked weight on a Hopper GPU: y = x @ base.dense() + (x @ a) @ b.

    Args:
      x: bfloat16 or float16 [..., d_in].
      base: Planes of units of 256 inputs; groups of 32, 64, 128, multiples of 256 or all inputs.
      low_rank: a [d_in, r] and b [r, d_out]; taken in x's dtype. b is read in place if it has it.
      layer: int32 []; base and low_rank are stacks of layers, of which this one is read in place.
      config: block_m, a multiple of 8 up to 256; block_n, a multiple of 128; num_stages, units
        that are fetched ahead; splits, of the inputs. None chooses by the sizes.
      interpret: on a CPU, slowly; see `mosaic_steps` for what is another there.
    Returns:
      [..., d_out] of x.dtype, sums in float32. Works under jit, scan and vmap, whose rows join x's;
      it has no gradient of its own, `packed_matmul` gives it one.
    Raises:
      NotImplementedError: what the kernel cannot do; says why.
    Cost: the packed words once for every block_m rows of x.
    """
    check(x, base)
    *lead, d_in = x.shape
    if not x.size:
        return jnp.zeros((*lead, base.d_out), x.dtype)
    multiply = join_rows(partial(_multiply, config=config, interpret=interpret))
    y = multiply(x.reshape(-1, d_in), base, low_rank, layer)  # [m, d_out]
    return y.reshape(*lead, base.d_out)  # [..., d_out]


def check(x: jax.Array, base: Base) -> None:
    """Refuses what the kernel is not written for.

    Raises:
      NotImplementedError: says what came and what would do.
    """
    if not isinstance(base, Planes):
        raise NotImplementedError(
            f"the Mosaic kernel reads Planes, not {type(base).__name__}; call lqec_kernels.repack"
        )
    if base.unit_size != UNIT:
        raise NotImplementedError(
            f"the Mosaic kernel reads units of {UNIT} inputs; a weight of {base.d_in} inputs has "
            f"one of {base.unit_size}, and is too small to gain: take 'xla'"
        )
    group = base.group_size
    divides = LEAST_GROUP <= group and UNIT % group == 0
    if not divides and group % UNIT and group != base.d_in:
        raise NotImplementedError(
            f"the Mosaic kernel reads groups of 32, 64, 128, multiples of {UNIT} or all inputs, "
            f"not {group}; 'triton' and 'xla' take all"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the Mosaic kernel takes bfloat16 or float16 x, not {x.dtype.name}; 'triton' takes it"
        )


def _multiply(rows: jax.Array, base: Planes, low_rank, layer, *, config, interpret: bool):
    rank = 0 if low_rank is None else low_rank[0].shape[-1]
    config = config or choose_config(rows.shape[0], base, rank)
    factors = ()
    if low_rank is not None:
        a, b = low_rank
        a = take_layer(a, layer).astype(rows.dtype)
        down = jnp.matmul(rows, a, preferred_element_type=jnp.float32).astype(rows.dtype)
        if b.dtype != rows.dtype:
            b = take_layer(b, layer).astype(rows.dtype)
        factors = (_align(down, EIGHT), _align(b, EIGHT))
    numbers = [base.scales] if base.offsets is None else [base.scales, base.offsets]
    weight = [_align(array) for array in (*base.planes, *numbers)]
    plan = Plan(
        *rows.shape, base.d_out, rank, base.bits, base.group_size, base.offsets is None,
        layer is not None, rows.dtype, config,
    )  # fmt: skip
    index = jnp.zeros(1, jnp.int32) if layer is None else layer.astype(jnp.int32).reshape(1)
    operands = (index, jnp.zeros(1, jnp.uint32), _align(rows, EIGHT), *weight, *factors)
    y = call_kernel(*operands, plan=plan, machine=Interpreted if interpret else OnChip)
    y = y[..., : plan.m, : plan.d_out]
    return y if plan.splits == 1 else jnp.sum(y, axis=0).astype(rows.dtype)


def _align(array: jax.Array, rows: int = 1) -> jax.Array:
    """Pads to whole tiles of the copy engine, which nearly all arrays are made of."""
    missing = [-array.shape[-2] % rows, -array.shape[-1] % CHUNK]
    if not any(missing):
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, n) for n in missing])
