"""x @ weight + (x a) b in one Pallas kernel, from packed words: interpreter, TPU, and Triton's.

One program of the grid makes a tile of the product: it walks the units of its columns, unpacks each
in registers, and multiplies by it; sums are float32. The adapter reads the same block of x, so that
it costs no pass of its own. `pallas_tiles` knows what the words of a format mean.

On a TPU arrays are read where they lie, in a stack of layers too: which layer is a scalar that is
known before the blocks are fetched. There the last tile may hang over the edge of the product.
Triton has neither; for it a layer is cut out first, and arrays are padded. Few rows of bfloat16 are
multiplied by the words in another way, see `pallas_pairs`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lqec_kernels.formats import Base
from lqec_kernels.layers import take_layer
from lqec_kernels.pallas_pairs import can_pair, interleave, multiply_pairs
from lqec_kernels.pallas_tiles import Blocks, read_blocks
from lqec_kernels.tuning import Config

LANES = 128  # of a TPU's registers, and the fewest columns of a tile unless the weight has fewer
LEAST_ROWS = 16  # of x in a tile: what a bfloat16 register of a TPU holds, and Triton's least
MOST_ROWS, MOST_COLUMNS = 256, 512
MOST_SUMS = 2**16  # of a tile: with more of them in float32, they leave the registers too often
LEAST_RANK = 16  # Triton's
# What a program may hold in a TPU core's VMEM; the compiler grants 16 MB unless asked for more.
VMEM_BYTES = 14 * 2**20
NUMBERS = (jnp.float32, jnp.bfloat16)  # what a kernel for TPUs can be given


def choose_config(
    m: int, d_in: int, d_out: int, *, column_bytes: float, row_bytes: int, rank: int = 0
) -> Config:
    """Chooses a TPU's tiles: as many rows as fit, up to 256, then columns, up to 512.

    Args:
      m, d_in, d_out: of the product.
      column_bytes: of one column of the weight's arrays.
      row_bytes: of one row of x.
      rank: of the adapter.
    Raises:
      NotImplementedError: not even the smallest tile fits.
    """
    most = min(MOST_ROWS, -(-m // LEAST_ROWS) * LEAST_ROWS)
    widest = MOST_COLUMNS
    while widest > LANES and -d_out % widest * 8 > d_out:  # more than an eighth hangs over
        widest //= 2
    for rows in (r for r in (256, 128, 64, 32, 16) if r <= most or r == LEAST_ROWS):
        for columns in (c for c in (512, 256, 128) if c <= min(widest, MOST_SUMS // rows)):
            # Words are fetched for the next tile while this one is made.
            x = min(rows, m) * row_bytes * (1 if m <= rows else 2)
            tile = columns * (2 * column_bytes + 4 * (4 * MOST_ROWS + 4 * rows))
            if x + tile + rank * row_bytes <= VMEM_BYTES:
                return Config(rows, columns)
    raise NotImplementedError(
        f"{LANES} columns of {d_in} inputs do not fit into {VMEM_BYTES >> 20} MB of VMEM beside "
        f"x and an adapter of rank {rank}; 'xla' takes all"
    )


def choose_gpu_config(m: int) -> Config:
    """Chooses tiles for Pallas' Triton: 64 columns, for its registers hold the unpacked unit."""
    return Config(min(64, max(LEAST_ROWS, 1 << (m - 1).bit_length())), 64, num_stages=2)


def pallas_matmul(
    x: jax.Array,
    base: Base,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    *,
    layer: jax.Array | None = None,
    config: Config | None = None,
    on_gpu: bool = False,
) -> jax.Array:
    """Multiplies by a repacked weight: y = x @ base.dense() + (x @ a) @ b.

    On a CPU the kernel is interpreted, which is slow and exact; on a TPU it is Mosaic's.

    Args:
      x: float32, bfloat16 or float16 [..., d_in]; no float16 on a TPU.
      base: Planes or another format of `pallas_tiles`, unstacked unless there is a layer.
      low_rank: floating a [d_in, r] and b [r, d_out], which the kernel casts.
      layer: integer scalar; base and low_rank are then stacks of layers, [layers, ...], of which
        this one is read in place. Numbers of float16 and DoubleScales, which a TPU's kernel cannot
        be given, are cut out and cast first.
      config: block_m and block_n; None chooses by the sizes.
      on_gpu: lower for NVIDIA GPUs through Pallas' Triton, which jax 0.11 deprecated.
    Returns:
      [..., d_out] of x.dtype. It has no gradient of its own; `packed_matmul` gives it one.
    Raises:
      NotImplementedError: a format or groups that the kernel cannot read; too long a d_in;
        interpreted under `shard_map` with check_vma. Compiled for several TPUs, where jax itself
        asks for a `shard_map` around it.
    Cost: the packed words once for every block_m rows of x.
    """
    if jax.default_backend() == "cpu" and jax.typeof(x).manual_axis_type.varying:
        raise NotImplementedError(
            "Pallas' interpreter cannot follow what varies over a mesh; on a CPU pass "
            "check_vma=False to jax.shard_map"
        )
    *lead, d_in = x.shape
    if not x.size:
        return jnp.zeros((*lead, base.d_out), x.dtype)
    rows = x.reshape(-1, d_in)  # [m, d_in]
    if on_gpu:
        y = _multiply_on_gpu(rows, *take_layer((base, low_rank), layer), config)
    else:
        y = _multiply_in_place(rows, base, low_rank, layer, config)
    return y.reshape(*lead, base.d_out)  # [..., d_out]


def _multiply_in_place(x: jax.Array, base: Base, low_rank, layer, config) -> jax.Array:
    """Calls the kernel for TPUs and the interpreter."""
    m, d_in = x.shape
    blocks = read_blocks(take_layer(base, layer))
    blocks = blocks._replace(arrays=_choose_arrays(base, blocks, layer))
    rank = 0 if low_rank is None else low_rank[0].shape[-1]
    pairs = can_pair(base, m, x.dtype)
    config = config or choose_config(
        m,
        d_in,
        base.d_out,
        column_bytes=sum(a.shape[-2] * a.dtype.itemsize for a in blocks.arrays),
        row_bytes=d_in * x.dtype.itemsize * (1 + pairs),
        rank=rank,
    )
    # A tile as large as an array's side needs to be no multiple of anything.
    config = Config(min(config.block_m, m), min(config.block_n, base.d_out))
    x_cut = blocks.cut(x)
    if pairs:
        x_cut = jnp.concatenate([x_cut, interleave(x_cut)])
    operands = [x_cut, *blocks.arrays]
    if low_rank is not None:
        operands += _choose_factors(*low_rank, blocks, layer, x.dtype)
    tile = (
        partial(multiply_pairs, layout=base.layout) if pairs else partial(_multiply, blocks=blocks)
    )
    call = partial(_call, blocks=blocks, config=config, d_out=base.d_out, tile=tile)
    prefetched = () if layer is None else (jnp.asarray(layer, jnp.int32).reshape(1),)
    return lax.platform_dependent(
        *prefetched, *operands, cpu=partial(call, interpret=True), tpu=call
    )


def _choose_arrays(base: Base, blocks: Blocks, layer) -> tuple[jax.Array, ...]:
    """Returns stacks where a TPU's kernel can be given them, else one layer's float32."""
    stored = jax.tree.leaves(base)

    def choose(whole: jax.Array, one: jax.Array) -> jax.Array:
        if one.dtype not in (jnp.uint32, jnp.float32):
            return one.astype(jnp.float32)  # of fewer bits no single row can be loaded
        return whole if any(whole is array for array in stored) else one

    return tuple(map(choose, read_blocks(base).arrays, blocks.arrays))


def _choose_factors(a: jax.Array, b: jax.Array, blocks: Blocks, layer, dtype) -> list[jax.Array]:
    """Returns a [..., parts, r, rows] and b [..., r, d_out], stacks where they can be given."""
    in_order = blocks.parts == 1 and blocks.steps * blocks.size == a.shape[-2]
    if a.dtype not in NUMBERS or not in_order:
        a = take_layer(a, layer).astype(dtype)
    if b.dtype not in NUMBERS:
        b = take_layer(b, layer).astype(jnp.float32)
    if a.shape[-1] == 1:  # Mosaic makes no product of bfloat16 with a single column
        a, b = _pad(a, -1, 2), _pad(b, -2, 2)
    return [blocks.cut(a.mT), b]


def _call(*operands: jax.Array, blocks: Blocks, config: Config, d_out: int, tile, interpret=False):
    layer = operands[:1] if operands[0].ndim == 1 else ()
    x, *weight = operands[len(layer) :]
    m, width = x.shape[1], config.block_n
    grid = (pl.cdiv(m, config.block_m), pl.cdiv(d_out, width))
    ranked = len(weight) > len(blocks.arrays)
    shapes = _list_blocks(x, weight, blocks, config)
    specs = [_place(a, *shape) for a, shape in zip((x, *weight), shapes, strict=True)]
    scratch = [pltpu.VMEM((config.block_m, weight[-1].shape[-2]), jnp.float32)] if ranked else []
    kernel = partial(_multiply_tile, blocks=blocks, ranked=ranked, kept=ranked, tile=tile)
    varying = jax.typeof(x).manual_axis_type  # over a mesh's axes; operands vary alike
    return pl.pallas_call(
        (lambda layer, *refs: kernel(*refs)) if layer else kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(layer),
            grid=grid,
            in_specs=specs,
            out_specs=pl.BlockSpec((config.block_m, width), lambda i, j, *layer: (i, j)),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((m, d_out), x.dtype, manual_axis_type=varying),
        name="packed_matmul",
        interpret=interpret,
    )(*layer, *operands[len(layer) :])


def _list_blocks(x: jax.Array, weight: list, blocks: Blocks, config: Config) -> list[tuple]:
    """Returns for x, the arrays, a and b: the shape of a block, and grid -> which block."""
    arrays, factors = weight[: len(blocks.arrays)], weight[len(blocks.arrays) :]
    shapes: list[tuple] = [((x.shape[0], config.block_m, x.shape[2]), lambda i, j: (0, i, 0))]
    shapes += [((a.shape[-2], config.block_n), lambda i, j: (0, j)) for a in arrays]
    if factors:
        a, b = factors
        shapes += [(a.shape[-3:], lambda i, j: (0, 0, 0))]
        shapes += [((b.shape[-2], config.block_n), lambda i, j: (0, j))]
    return shapes


def _place(array: jax.Array, block: tuple, index: Callable) -> pl.BlockSpec:
    """Says which block of an array a program reads; of a stack, the layer's."""
    if array.ndim == len(block):
        return pl.BlockSpec(block, lambda i, j, *layer: index(i, j))
    return pl.BlockSpec((None, *block), lambda i, j, layer: (layer[0], *index(i, j)))


def _multiply_on_gpu(x: jax.Array, base: Base, low_rank, config: Config | None) -> jax.Array:
    """Calls the kernel for Pallas' Triton: sizes of powers of two, arrays padded to whole tiles."""
    from jax.experimental.pallas import triton  # warns since jax 0.11

    blocks, m = read_blocks(base, on_gpu=True), x.shape[0]
    config = config or choose_gpu_config(m)
    x = _pad(blocks.cut(x), -2, config.block_m)
    weight = [_pad(array, -1, config.block_n) for array in blocks.arrays]
    if low_rank is not None:
        a, b = low_rank
        rank = max(LEAST_RANK, 1 << (a.shape[1] - 1).bit_length())
        weight += [_pad(blocks.cut(a.mT), -2, rank), _pad(_pad(b, -1, config.block_n), -2, rank)]
    ranked = low_rank is not None
    shapes = _list_blocks(x, weight, blocks, config)
    call = partial(
        pl.pallas_call,
        partial(
            _multiply_tile,
            blocks=blocks,
            ranked=ranked,
            kept=False,
            tile=partial(_multiply, blocks=blocks),
        ),
        grid=(x.shape[1] // config.block_m, weight[0].shape[-1] // config.block_n),
        in_specs=[pl.BlockSpec(*shape) for shape in shapes],
        out_specs=pl.BlockSpec((config.block_m, config.block_n), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[1], weight[0].shape[-1]), x.dtype),
        name="packed_matmul",
    )
    parameters = triton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages)
    cuda = call(compiler_params=parameters)
    y = lax.platform_dependent(x, *weight, cpu=call(interpret=True), cuda=cuda)
    return y[:m, : base.d_out]


def _pad(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def _multiply_tile(
    x_ref: Any, *refs: Any, blocks: Blocks, ranked: bool, kept: bool, tile: Callable
) -> None:
    """The kernel: one tile of the product, all of d_in.

    Refs: x [parts, block_m, rows], the format's arrays [rows, block_n], where there is an adapter a
    [parts, r, rows] and b [r, block_n], the tile of y [block_m, block_n], and, where programs run
    one after the other, room for x a [block_m, r], which the first of a row of tiles fills.
    """
    count = len(blocks.arrays)
    y, y_ref = tile(x_ref, refs[:count]), refs[count + 2 * ranked]
    if ranked:
        a_ref, b_ref = refs[count : count + 2]
        down = _keep_down(x_ref, a_ref, refs[-1], blocks) if kept else _down(x_ref, a_ref, blocks)
        y = y + _dot(down.astype(x_ref.dtype), b_ref[...].astype(x_ref.dtype), 0)
    y_ref[...] = y.astype(y_ref.dtype)


def _multiply(x_ref: Any, refs: tuple, blocks: Blocks) -> jax.Array:
    """Returns x w, float32 [block_m, block_n]."""

    def add(step: jax.Array, y: jax.Array) -> jax.Array:
        for part, w in enumerate(blocks.open(refs, step)):
            x = _take(x_ref, part, step, blocks)
            y = y + _dot(x, w.astype(x.dtype), 0)
        return y

    zeros = jnp.zeros((x_ref.shape[1], refs[0].shape[1]), jnp.float32)
    return lax.fori_loop(0, blocks.steps, add, zeros)


def _keep_down(x_ref: Any, a_ref: Any, room_ref: Any, blocks: Blocks) -> jax.Array:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        room_ref[...] = _down(x_ref, a_ref, blocks)

    return room_ref[...]


def _down(x_ref: Any, a_ref: Any, blocks: Blocks) -> jax.Array:
    """Returns x a, float32 [block_m, r]."""

    def add(step: jax.Array, down: jax.Array) -> jax.Array:
        for part in range(blocks.parts):
            x = _take(x_ref, part, step, blocks)
            down = down + _dot(x, _take(a_ref, part, step, blocks).astype(x.dtype), 1)
        return down

    zeros = jnp.zeros((x_ref.shape[1], a_ref.shape[1]), jnp.float32)
    return lax.fori_loop(0, blocks.steps, add, zeros)


def _take(ref: Any, part: int, step: jax.Array, blocks: Blocks) -> jax.Array:
    """Returns the inputs of one block: [parts, n, rows] -> [n, size]."""
    if blocks.steps == 1:
        return ref[part]
    start = pl.multiple_of(step * blocks.size, blocks.size)  # Mosaic wants to know
    return ref[part, :, pl.ds(start, blocks.size)]


def _dot(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Sums over the last axis of left and an axis of right."""
    # Mosaic and Triton would round float32 to fewer digits by themselves.
    exact = "highest" if left.dtype == jnp.float32 else None
    over = (((1,), (axis,)), ((), ()))
    return lax.dot_general(left, right, over, precision=exact, preferred_element_type=jnp.float32)
