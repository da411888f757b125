"""Compiles products by the Mosaic kernel for an H200 that need not be here; a process of its own.

    python -m tests.kernels.hopper_compiler FOLDER

Leaves in FOLDER, of each of `CASES` in turn, packed_matmul_<n>.ptx and packed_matmul_<n>.ptxas.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = Path(__file__).parents[2] / "configs/studies/compiled_7b/targets.py"


class Case(NamedTuple):
    """A product by a layer of a stack, with an adapter."""

    bits: int
    dtype: str
    m: int
    d_in: int = 4096
    d_out: int = 4096
    group: int = 64
    offsets: str | None = "uint8"
    rank: int = 64


CASES = (
    Case(2, "bfloat16", 256, d_out=11008, offsets=None),
    Case(3, "float16", 64),
    Case(4, "bfloat16", 32, d_in=11008, group=11008, offsets="float16", rank=20),
    Case(8, "bfloat16", 17, d_in=600, group=600, d_out=136),
)


def compile_case(case: Case, device: Any) -> None:
    import jax
    import jax.numpy as jnp

    from lqec_kernels.mosaic_matmul import mosaic_matmul
    from lqec_kernels.planes import WIDTHS, Planes

    place = jax.sharding.SingleDeviceSharding(device)

    def shape(*sides: int, dtype: Any = case.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, dtype, sharding=place)

    words, groups = -(-case.d_in // 256) * 8, case.d_in // case.group
    planes = tuple(shape(2, words * p, case.d_out, dtype="uint32") for p in WIDTHS[case.bits])
    scales = shape(2, groups, case.d_out, dtype="float16")
    offsets = case.offsets and shape(2, groups, case.d_out, dtype=case.offsets)
    base = Planes(planes, scales, offsets, case.bits, case.group, case.d_in, 256)
    factors = shape(2, case.d_in, case.rank), shape(2, case.rank, case.d_out)

    @jax.jit
    def multiply(x, base, factors, layer):
        return mosaic_matmul(x, base, factors, layer=layer)

    layer = shape(dtype=jnp.int32)
    multiply.trace(shape(case.m, case.d_in), base, factors, layer).lower().compile()


def main(folder: str) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    os.environ |= {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS")}
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    spec = importlib.util.spec_from_file_location("targets", TARGETS)
    targets = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(targets)
    device = targets.describe("h200", 1).devices[0]
    for case in CASES:
        compile_case(case, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
