"""x @ weight + (x a) b in one Pallas kernel, from packed words: interpreter, TPU, and Triton's.

One program of the grid makes a tile of the product: it walks the units of its columns, unpacks each
in registers, and multiplies by it; sums are float32. The adapter reads the same block of x, so that
it costs no pass of its own. `pallas_tiles` knows what the words of a format mean.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from lqec_kernels.formats import Base
from lqec_kernels.pallas_tiles import Blocks, read_blocks
from lqec_kernels.tuning import Config

LANES = 128  # columns are walked in multiples of it; fewer are padded, which copies the words
LEAST_ROWS = 16  # of x in a tile: what a bfloat16 register of a TPU holds, and Triton's least
LEAST_RANK = 16
# Words of a column block, and rows of x, that a program keeps at hand; a TPU core's VMEM is 16 MB
# or more, and both are there twice.
BLOCK_BYTES = 2 * 2**20


def choose_config(m: int, d_in: int, d_out: int, bits: float, *, on_gpu: bool = False) -> Config:
    """Chooses tiles from sizes alone: as large as fits beside one another.

    Rows: all, up to 128; columns: a power of two that divides the padded width, up to 512, and 64
    on a GPU, whose registers hold the unpacked unit.
    """
    rows = min(LANES, max(LEAST_ROWS, 1 << (m - 1).bit_length()))
    while rows > LEAST_ROWS and rows * d_in * 4 > BLOCK_BYTES:
        rows //= 2
    if on_gpu:
        return Config(min(rows, 64), 64, num_stages=2)
    columns, width = LANES, -(-d_out // LANES) * LANES
    while columns < 512 and width % (2 * columns) == 0 and d_in * bits * columns < 4 * BLOCK_BYTES:
        columns *= 2
    return Config(rows, columns)


def pallas_matmul(
    x: jax.Array,
    base: Base,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    *,
    config: Config | None = None,
    on_gpu: bool = False,
) -> jax.Array:
    """Multiplies by a prepared weight: y = x @ base.dense() + (x @ a) @ b.

    On a CPU the kernel is interpreted, which is slow and exact; on a TPU it is Mosaic's.

    Args:
      x: float32, bfloat16 or float16 [..., d_in]; no float16 on a TPU.
      base: Planes or another format of `pallas_tiles`, unstacked.
      low_rank: a [d_in, r] and b [r, d_out].
      config: block_m and block_n, which divides a multiple of 128; None chooses by the sizes.
      on_gpu: lower for NVIDIA GPUs through Pallas' Triton, which jax 0.11 deprecated.
    Returns:
      [..., d_out] of x.dtype. It has no gradient of its own; `packed_matmul` gives it one.
    Raises:
      NotImplementedError: a format or groups that the kernel cannot read; interpreted under
        `shard_map` with check_vma.
    Cost: the packed words once for every block_m rows of x. A width that is no multiple of 128 is
      padded first, in a copy of the words.
    """
    if jax.default_backend() == "cpu" and jax.typeof(x).manual_axis_type.varying:
        raise NotImplementedError(
            "Pallas' interpreter cannot follow what varies over a mesh; on a CPU pass "
            "check_vma=False to jax.shard_map"
        )
    blocks = read_blocks(base)
    *lead, d_in = x.shape
    if not x.size:
        return jnp.zeros((*lead, base.d_out), x.dtype)
    rows = x.reshape(-1, d_in)  # [m, d_in]
    bits = 32 * sum(a.shape[0] * a.shape[1] for a in blocks.arrays) / d_in
    config = config or choose_config(rows.shape[0], d_in, base.d_out, bits, on_gpu=on_gpu)
    operands = [_pad(blocks.cut(rows), -2, config.block_m)]
    operands += [_pad(array, -1, max(LANES, config.block_n)) for array in blocks.arrays]
    if low_rank is not None:
        operands += _pad_factors(*low_rank, blocks, max(LANES, config.block_n))
    y = _dispatch(operands, blocks, config, on_gpu=on_gpu)
    return y[: rows.shape[0], : base.d_out].reshape(*lead, base.d_out)  # [..., d_out]


def _pad(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths)


def _pad_factors(a: jax.Array, b: jax.Array, blocks: Blocks, multiple: int) -> list[jax.Array]:
    """Returns a [steps, parts, size, r] and b [r, d_out], r a power of two and d_out padded."""
    rank = max(LEAST_RANK, 1 << (a.shape[1] - 1).bit_length())
    a = _pad(blocks.cut(a.T).mT, -1, rank)
    return [a, _pad(_pad(b, -1, multiple), 0, rank)]


def _dispatch(operands: list, blocks: Blocks, config: Config, *, on_gpu: bool) -> jax.Array:
    """Calls the kernel for the platform that the program is compiled for."""

    def call(**options: Any) -> Any:
        return lambda *operands: _call(operands, blocks, config, options)

    platforms = {"cpu": call(interpret=True), "tpu": call()}
    if on_gpu:
        from jax.experimental.pallas import triton  # warns since jax 0.11

        parameters = triton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages)
        platforms["cuda"] = call(compiler_params=parameters)
    return lax.platform_dependent(*operands, **platforms)


def _call(operands: tuple, blocks: Blocks, config: Config, options: dict) -> jax.Array:
    x, *weight = operands
    words, factors = weight[: len(blocks.arrays)], weight[len(blocks.arrays) :]
    m, n, width = x.shape[2], words[0].shape[-1], config.block_n
    specs = [pl.BlockSpec((*x.shape[:2], config.block_m, blocks.size), lambda i, j: (0, 0, i, 0))]
    specs += [pl.BlockSpec((*a.shape[:2], width), lambda i, j: (0, 0, j)) for a in words]
    if factors:
        a, b = factors
        specs += [
            pl.BlockSpec(a.shape, lambda i, j: (0, 0, 0, 0)),
            pl.BlockSpec((b.shape[0], width), lambda i, j: (0, j)),
        ]
    varying = jax.typeof(x).manual_axis_type  # over a mesh's axes; operands vary alike
    return pl.pallas_call(
        partial(_multiply_tile, blocks=blocks),
        grid=(m // config.block_m, n // width),
        in_specs=specs,
        out_specs=pl.BlockSpec((config.block_m, width), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype, manual_axis_type=varying),
        name="packed_matmul",
        **options,
    )(*operands)


def _multiply_tile(x_ref: Any, *refs: Any, blocks: Blocks) -> None:
    """The kernel: one tile of the product, all of d_in.

    Refs: x [steps, parts, block_m, size], the format's arrays, where there is an adapter a [steps,
    parts, size, r] and b [r, block_n], and the tile of y [block_m, block_n].
    """
    words, factors, y_ref = refs[: len(blocks.arrays)], refs[len(blocks.arrays) : -1], refs[-1]
    # Mosaic and Triton would round float32 to fewer digits by themselves.
    exact = "highest" if x_ref.dtype == jnp.float32 else None

    def dot(left: jax.Array, right: jax.Array) -> jax.Array:
        return jnp.dot(left, right, precision=exact, preferred_element_type=jnp.float32)

    def multiply(step: jax.Array, sums: tuple) -> tuple:
        y, down = sums
        for part, w in enumerate(blocks.open(words, step)):
            x = x_ref[step, part]
            y = y + dot(x, w.astype(x.dtype))
            if factors:
                down = down + dot(x, factors[0][step, part])
        return y, down

    rank = factors[0].shape[-1] if factors else LEAST_RANK
    sums = jnp.zeros(y_ref.shape, jnp.float32), jnp.zeros((y_ref.shape[0], rank), jnp.float32)
    y, down = lax.fori_loop(0, blocks.steps, multiply, sums)
    if factors:
        b = factors[1][...].astype(jnp.float32)
        y = y + jnp.dot(down, b, precision="highest", preferred_element_type=jnp.float32)
    y_ref[...] = y.astype(y_ref.dtype)
