"""What the Mosaic kernel does on the chip itself, and what stands for it in jax's interpreter.

The interpreter knows the kernel's threads, copies and barriers, but no refs that are turned over,
no left operand of wgmma in registers, and no copy that reaches past the end of an array. Those few
steps are written twice, here; the kernel is written once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # inputs; in 16 bits the widest rows that wgmma reads, 128 bytes
ROW_BYTES = 128
MOST = 256  # rows and columns of a tile


def tile(dtype: Any) -> tuple:
    """Returns how wgmma wants a matrix in shared memory: tiles of 8 rows of 128 bytes, swizzled."""
    return (
        plgpu.TilingTransform((8, ROW_BYTES // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(ROW_BYTES),
    )


class OnChip:
    """Mosaic's own steps. Sums are float32 [columns, rows of x], in registers."""

    @staticmethod
    def run(kernel: Callable, operands: tuple, out: Any, reach: int, **options: Any) -> jax.Array:
        """Calls the kernel, whose tiles reach past the ends of arrays, by `reach` inputs."""
        # jax 0.12 would work out the layouts in registers by itself, 0.10 takes those it is told.
        params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)
        return plgpu.kernel(kernel, out_type=out, compiler_params=params, **options)(*operands)

    @staticmethod
    def hold(shape: tuple, sum_up: Callable) -> None:
        """Calls with sums of zeros."""
        pl.run_scoped(sum_up, plgpu.ACC(shape))

    @staticmethod
    def read(sums: Any) -> jax.Array:
        return sums[...]

    @staticmethod
    def read_turned(ref: Any) -> jax.Array:
        """Loads [n, columns] of shared memory as [columns, n]."""
        turned = ref.transpose((1, 0))[...]
        turned = plgpu.layout_cast(turned, plgpu.Layout.WGMMA_TRANSPOSED)
        return plgpu.layout_cast(turned, plgpu.Layout.WGMMA)

    @staticmethod
    def read_column(ref: Any, row: int, columns: Any) -> jax.Array:
        """Loads a row of shared memory, a number for each of the columns."""
        return plgpu.layout_cast(ref[row, columns], plgpu.Layout.WGMMA.reduce(1))

    @staticmethod
    def join(pieces: list[jax.Array]) -> jax.Array:
        """Joins [columns, n] along n: a matter of names, not of instructions."""
        if len(pieces) == 1:
            return pieces[0]
        layout = plgpu.Layout.WGMMA
        shape = (pieces[0].shape[0], sum(piece.shape[1] for piece in pieces))
        out = plgpu.ShapeDtypeStruct(shape, pieces[0].dtype, layout=layout)
        inline = plgpu.inline_mgpu(arg_types=(layout,) * len(pieces), return_type=out)
        return inline(_join_registers)(*pieces)

    @staticmethod
    def multiply(sums: Any, w: jax.Array, x_ref: Any) -> Any:
        """Adds w [columns, n] x_ref [rows, n]ᵀ, and returns before it is added."""
        plgpu.wgmma(sums, w, x_ref.transpose((1, 0)))
        plgpu.wgmma_wait(1)  # for the one before, whose registers are written next
        return sums

    @staticmethod
    def finish(sums: Any) -> Any:
        """Waits for what is being added."""
        plgpu.wgmma_wait(0)
        return sums

    @staticmethod
    def write_turned(ref: Any, y: jax.Array) -> None:
        """Stores [columns, rows] as [rows, columns]."""
        turned = ref.transpose((1, 0))
        turned[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)


def _join_registers(context: Any, *arrays: Any) -> Any:
    first = arrays[0]
    registers = np.concatenate([array.registers for array in arrays], axis=1)
    return type(first)(_registers=registers, _layout=first.layout, _is_signed=first.is_signed)


class Interpreted(OnChip):
    """The same in plain jax, for a CPU. Sums are a value."""

    @staticmethod
    def run(kernel, operands, out, reach, **options):
        index, zero, *arrays = operands
        pad = partial(_pad, by=max(reach, MOST))
        call = plgpu.kernel(
            kernel,
            out_type=jax.eval_shape(pad, out),
            interpret=_interpreter(),
            **options,
        )
        return call(index, zero, *map(pad, arrays))[..., : out.shape[-2], : out.shape[-1]]

    @staticmethod
    def hold(shape, sum_up):
        sum_up(jnp.zeros(shape, jnp.float32))

    @staticmethod
    def read(sums):
        return sums

    @staticmethod
    def read_turned(ref):
        return ref[...].T

    @staticmethod
    def read_column(ref, row, columns):
        return ref[row, columns]

    @staticmethod
    def join(pieces):
        return jnp.concatenate(pieces, axis=1)

    @staticmethod
    def multiply(sums, w, x_ref):
        over = (((1,), (1,)), ((), ()))
        return sums + lax.dot_general(w, x_ref[...], over, preferred_element_type=jnp.float32)

    @staticmethod
    def finish(sums):
        return sums

    @staticmethod
    def write_turned(ref, y):
        ref[...] = y.T


def _pad(array: jax.Array, by: int) -> jax.Array:
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, by)] * 2)


def _interpreter() -> Any:
    """Returns what `interpret` takes: public in jax 0.12, not yet in 0.10."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams()
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()
