"""x @ weight + (x a) b by the Triton kernels, called through jax-triton.

    up to 16 rows     `multiply_rows`: every word is read once, sums are split over the inputs
    up to 512 rows    `multiply_tiles`: a tile of the weight is dequantized in registers
    more              panels of the weight are dequantized once each, and XLA multiplies by them

float32 x takes the first, as three bfloat16 pieces, or the last. Neither triton nor jax-triton is
imported before a kernel is called.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lqec_kernels import tuning
from lqec_kernels.batching import join_rows
from lqec_kernels.formats import Base
from lqec_kernels.layers import take_layer
from lqec_kernels.planes import LARGEST_UNIT, WIDTHS, Planes
from lqec_kernels.reference import vary_alike
from lqec_kernels.tuning import Config, Problem

FEW_ROWS, MANY_ROWS = 16, 512
PIECES = 3  # bfloat16 numbers of 8 digits that make a float32 of 24
# Weights of a panel: in 16 bits about the level-2 cache of a large GPU, whose matrix units are then
# still all at work.
PANEL = 16 * 2**20
PANEL_COLUMNS = 128
LARGEST_RANK_BLOCK, SMALLEST_RANK_BLOCK = 64, 16


def triton_matmul(
    x: jax.Array,
    base: Base,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    *,
    layer: jax.Array | None = None,
    config: Config | None = None,
) -> jax.Array:
    """Multiplies by a repacked weight on an NVIDIA GPU: y = x @ base.dense() + (x @ a) @ b.

    Args:
      x: float32, bfloat16 or float16 [..., d_in].
      base: Planes, unstacked, of units of 256 inputs.
      low_rank: a [d_in, r] and b [r, d_out]; taken in x's dtype.
      layer: int32 []; base and low_rank are stacks of layers, of which this one is read in place.
      config: None is what `tuning.choose` says.
    Returns:
      [..., d_out] of x.dtype, sums in float32. Works under jit, scan and vmap, whose rows join x's;
      it has no gradient of its own, `packed_matmul` gives it one.
    Raises:
      NotImplementedError: what the kernels cannot do, or do not find here; says why.
    Cost: the packed words once for up to 16 rows. With more than 512, one panel of the dense weight
      is held.
    """
    check(x, base)
    *lead, d_in = x.shape
    multiply = join_rows(partial(_multiply, config=config))
    y = multiply(x.reshape(-1, d_in), base, low_rank, layer)  # [m, d_out]
    return y.reshape(*lead, base.d_out)  # [..., d_out]


def check(x: jax.Array, base: Base) -> None:
    """Refuses what no kernel is written for.

    Raises:
      NotImplementedError: says what came and what would do.
    """
    if not isinstance(base, Planes):
        raise NotImplementedError(
            f"the Triton kernels read Planes, not {type(base).__name__}; call lqec_kernels.repack"
        )
    if base.unit_size != LARGEST_UNIT:
        raise NotImplementedError(
            f"the Triton kernels read units of {LARGEST_UNIT} inputs; a weight of {base.d_in} "
            f"inputs has one of {base.unit_size}, and is too small to gain: take 'xla'"
        )
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the Triton kernels take float32, bfloat16 or float16 x, not {x.dtype.name}"
        )


def tune(
    x: jax.Array, base: Planes, low_rank: tuple[jax.Array, jax.Array] | None = None, **options: Any
) -> Config | None:
    """Times the configurations for such a product, and remembers the best for this user.

    Args:
      x, base, low_rank: as in `triton_matmul`, with numbers in them.
      options: `candidates`, `measure` and `folder` of `tuning.autotune`.
    Returns:
      The fastest; None for so many rows that XLA multiplies.
    """
    check(x, base)
    rows = x.reshape(-1, base.d_in)  # [m, d_in]
    problem = describe(rows, base)
    if problem.kind == "panels":
        return None

    def make_run(config: Config) -> Callable[[], jax.Array]:
        run = jax.jit(lambda *given: triton_matmul(*given, config=config))
        return lambda: run(rows, base, low_rank)

    return tuning.autotune(problem, make_run, **options)


def describe(rows: jax.Array, base: Planes) -> Problem:
    """Says which kernel multiplies rows [m, d_in], and for what it is configured."""
    m, d_in = rows.shape
    pieces = PIECES if rows.dtype == jnp.float32 else 1
    if m <= FEW_ROWS:
        kind = "rows"
    else:
        kind = "tiles" if m <= MANY_ROWS and pieces == 1 else "panels"
    device = jax.devices()[0].device_kind
    return Problem(kind, m * pieces, d_in, base.d_out, base.bits, device)


def _multiply(rows: jax.Array, base: Planes, low_rank, layer, *, config: Config | None):
    if not rows.shape[0]:
        return jnp.zeros((0, base.d_out), rows.dtype)
    problem = describe(rows, base)
    if problem.kind == "panels":
        base, low_rank = take_layer((base, low_rank), layer)
        return _add(multiply_panels(rows, base), rows, low_rank)
    weight = _Weight(base, low_rank, layer)
    config = config or tuning.choose(problem)
    if problem.kind == "tiles":
        return _multiply_tiles(rows, weight, config)
    if rows.dtype == jnp.float32:
        pieces = jnp.concatenate(split_pieces(rows))  # [3 m, d_in]
        y = _multiply_rows(pieces, weight._replace(low_rank=None), config, jnp.float32)
        y = y.reshape(PIECES, rows.shape[0], base.d_out)  # [3, m, d_out]
        return _add(jnp.sum(y, axis=0), rows, take_layer(low_rank, layer))
    return _multiply_rows(rows, weight, config, rows.dtype)


def split_pieces(x: jax.Array) -> list[jax.Array]:
    """Splits float32 into three bfloat16 whose sum is x, but for what is below 2^-24 of it."""
    pieces = []
    for _ in range(PIECES):
        # A cast there and back is what XLA takes the liberty to leave out.
        piece = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        pieces.append(piece.astype(jnp.bfloat16))
        x = x - piece
    return pieces


def _add(y: jax.Array, rows: jax.Array, low_rank) -> jax.Array:
    """Adds a correction as products of its own."""
    if low_rank is None:
        return y
    a, b = (factor.astype(rows.dtype) for factor in low_rank)
    down = jnp.matmul(rows, a, precision=_precision(rows))
    return y + jnp.matmul(down, b, precision=_precision(rows))


def _precision(x: jax.Array) -> str | None:
    # A GPU's own float32 product keeps 10 digits.
    return "highest" if x.dtype == jnp.float32 else None


def multiply_panels(rows: jax.Array, base: Base) -> jax.Array:
    """Makes x @ weight with one panel of columns after the other made dense, once.

    Returns:
      [m, d_out] of x.dtype.
    Cost: dense 16-bit weights are written and read once, whatever the rows: with 2048 of them a
      tenth of the product's time, where both run at an H200's full rates.
    """
    count = -(-base.d_in * base.d_out // PANEL)
    # Whole tiles of the matrix units, at addresses from which many numbers are read at once.
    width = min(base.d_out, -(-base.d_out // count // PANEL_COLUMNS) * PANEL_COLUMNS)
    count = -(-base.d_out // width)

    def multiply(number: jax.Array, y: jax.Array) -> jax.Array:
        # The last panel begins so early that it is whole, and makes some columns again.
        start = jnp.minimum(number * width, base.d_out - width)
        columns = jax.tree.map(
            lambda array: lax.dynamic_slice_in_dim(array, start, width, axis=-1), base.columns()
        )
        w = base.layout.dense(columns, rows.dtype)
        panel = jnp.matmul(
            rows, w, precision=_precision(rows), preferred_element_type=jnp.float32
        ).astype(rows.dtype)
        return lax.dynamic_update_slice_in_dim(y, panel, start, axis=-1)

    y = jnp.zeros((rows.shape[0], base.d_out), rows.dtype)
    y, rows = vary_alike((y, rows))
    return lax.fori_loop(0, count, multiply, y)


def cut_groups(bits: int, group_size: int) -> tuple[int, int, bool]:
    """Says how groups lie in a unit of 256 inputs.

    Returns:
      (words that are read at once, how many of their sub-blocks share a scale, whether groups lie
      anyhow, so that each weight has to find its scale).
    """
    rows = LARGEST_UNIT * WIDTHS[bits][0] // 32
    if group_size % LARGEST_UNIT == 0:
        return rows, LARGEST_UNIT // rows, False
    if LARGEST_UNIT % group_size or group_size < 16:
        return rows, 1, True
    return min(rows, group_size), max(1, group_size // rows), False


class _Weight(NamedTuple):
    """What a kernel multiplies by: with a layer, that one of stacks."""

    base: Planes
    low_rank: tuple[jax.Array, jax.Array] | None
    layer: jax.Array | None

    @property
    def rank(self) -> int:
        return 0 if self.low_rank is None else self.low_rank[0].shape[-1]

    @property
    def arrays(self) -> tuple:
        """Returns low and high words, scales, offsets; what is not read is said twice."""
        base = self.base
        offsets = base.scales if base.offsets is None else base.offsets
        return base.planes[0], base.planes[-1], base.scales, offsets

    @property
    def index(self) -> jax.Array:
        return jnp.int32(0) if self.layer is None else self.layer.astype(jnp.int32)


def _multiply_rows(rows: jax.Array, weight: _Weight, config: Config, dtype: Any) -> jax.Array:
    """Calls `multiply_rows` and sums its splits: [m, d_out] of dtype."""
    base, m, rank = weight.base, rows.shape[0], weight.rank
    units = -(-base.d_in // LARGEST_UNIT)
    per_split = -(-units // config.splits)
    splits = -(-units // per_split)
    size, subs, spread = cut_groups(base.bits, base.group_size)
    # What nothing is added to is written in its own dtype, and pieces are still to be summed.
    alone = splits == 1 and not rank
    parts, down = call_kernel(
        "multiply_rows",
        (rows, *weight.arrays, weight.low_rank[0] if rank else rows, weight.index),
        [
            jax.ShapeDtypeStruct((splits, m, base.d_out), dtype if alone else jnp.float32),
            jax.ShapeDtypeStruct((splits, m, rank) if rank else (1,), jnp.float32),
        ],
        (-(-rank // _rank_block(rank)) + -(-base.d_out // config.block_n), splits),
        config,
        **_constants(rows, weight, config),
        SIZE=size, SUBS=subs, SPREAD=spread, UNITS=per_split,
    )  # fmt: skip
    if alone:
        return parts[0]
    if not rank:
        return jnp.sum(parts, axis=0).astype(dtype)
    return _sum_parts(parts, down, weight, dtype, config)


def _sum_parts(parts, down, weight: _Weight, dtype: Any, config: Config) -> jax.Array:
    splits, m, d_out = parts.shape
    columns = 64
    (y,) = call_kernel(
        "sum_parts",
        (parts, down, weight.low_rank[1], weight.index),
        [jax.ShapeDtypeStruct((m, d_out), dtype)],
        (-(-d_out // columns),),
        config,
        ROWS_X=m, D_OUT=d_out, RANK=weight.rank, SPLITS=splits, STACKED=weight.layer is not None,
        BLOCK_N=columns, BLOCK_M=config.block_m, BLOCK_R=_rank_block(weight.rank),
    )  # fmt: skip
    return y


def _multiply_tiles(rows: jax.Array, weight: _Weight, config: Config) -> jax.Array:
    base, m = weight.base, rows.shape[0]
    down, b = rows, rows  # not read
    if weight.rank:
        a, b = weight.low_rank
        a = take_layer(a, weight.layer).astype(rows.dtype)
        down = jnp.matmul(rows, a, preferred_element_type=jnp.float32)
    size, _, spread = cut_groups(base.bits, base.group_size)
    (y,) = call_kernel(
        "multiply_tiles",
        (rows, *weight.arrays, down, b, weight.index),
        [jax.ShapeDtypeStruct((m, base.d_out), rows.dtype)],
        (-(-base.d_out // config.block_n), -(-m // config.block_m)),
        config,
        **_constants(rows, weight, config),
        SIZE=size, SPREAD=spread,
    )  # fmt: skip
    return y


def _constants(rows: jax.Array, weight: _Weight, config: Config) -> dict[str, Any]:
    base = weight.base
    return {
        "ROWS_X": rows.shape[0], "D_IN": base.d_in, "D_OUT": base.d_out, "RANK": weight.rank,
        "BITS": base.bits, "GROUP": base.group_size, "SYMMETRIC": base.offsets is None,
        "STACKED": weight.layer is not None, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
        "BLOCK_R": _rank_block(weight.rank), "STAGES": config.num_stages, "PTX": True,
    }  # fmt: skip


def _rank_block(rank: int) -> int:
    power = 1 << (max(rank, 1) - 1).bit_length()
    return min(LARGEST_RANK_BLOCK, max(SMALLEST_RANK_BLOCK, power))


def call_kernel(
    name: str, arrays: tuple, outputs: list, grid: tuple, config: Config, **constants: Any
) -> list[jax.Array]:
    """Calls a kernel of `triton_source`; the one place that knows jax-triton's versions.

    0.3 names the outputs `out_shape`, 0.4 `out_type`, and warns of the other.

    Raises:
      NotImplementedError: jax-triton or triton is missing, or finds no GPU.
    """
    try:
        from jax_triton import triton_call

        from lqec_kernels import triton_source
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise NotImplementedError(
            f"{error}; pip install 'lqec-jax[triton]'" if missing else str(error).partition(". ")[0]
        ) from error
    named = "out_type" if "out_type" in inspect.signature(triton_call).parameters else "out_shape"
    called = triton_call(
        *arrays,
        kernel=getattr(triton_source, name),
        grid=grid,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **{named: outputs},
        **constants,
    )
    # jax-triton knows nothing of `shard_map`'s axes; what comes varies as x does.
    axes = tuple(jax.typeof(arrays[0]).manual_axis_type.varying)
    return [lax.pcast(array, axes, to="varying") if axes else array for array in called]
