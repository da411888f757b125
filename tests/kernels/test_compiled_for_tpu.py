"""The Pallas kernel through the whole compiler of TPUs, without one: all it reads, and in place.

Needs libtpu (`pip install libtpu`): pytest -m tpu_compiler. Numbers are the interpreter's to check.
"""

import os
import re
from functools import cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lqec_kernels.level_planes import LevelPlanes
from lqec_kernels.pallas_matmul import pallas_matmul
from lqec_kernels.planes import WIDTHS, Planes, choose_unit
from lqec_kernels.sparse_planes import SparsePlanes

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed"),
    pytest.mark.usefixtures("optimized"),
]

# What libtpu would ask of the machine that it runs on, and that others use it too.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHIPS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v4": "v4:2x2x1", "v5p": "v5p:2x2x1"}
Shape = jax.ShapeDtypeStruct


@cache
def find_device(chip: str):
    os.environ.update(NO_TPU)  # read once, when libtpu is loaded
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices[0]


def compile_for(chip: str, run, *arguments):
    """Compiles for one TPU: where the arguments seem to lie."""
    place = NamedSharding(Mesh([find_device(chip)], ("one",)), PartitionSpec())
    arguments = jax.tree.map(lambda a: Shape(a.shape, a.dtype, sharding=place), arguments)
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def shape_words(bits: int, d_in: int, d_out: int, lead: tuple) -> tuple:
    unit = choose_unit(d_in)
    rows = -(-d_in // unit) * unit // 32
    return tuple(Shape((*lead, rows * width, d_out), jnp.uint32) for width in WIDTHS[bits])


def shape_planes(bits: int, d_in: int, d_out: int, group: int = 64, lead=(), dtype="float16"):
    scales = Shape((*lead, d_in // group, d_out), dtype)
    words = shape_words(bits, d_in, d_out, lead)
    offsets = None if group == d_in else Shape(scales.shape, "uint8" if bits == 4 else dtype)
    return Planes(words, scales, offsets, bits, group, d_in, choose_unit(d_in))


def shape_levels(bits: int, d_in: int, d_out: int, group: int = 0, lead=()):
    words, unit = shape_words(bits, d_in, d_out, lead), choose_unit(d_in)
    if group:
        scales = Shape((*lead, d_in // group, d_out), "bfloat16")
        return LevelPlanes(words, scales, None, f"nf{bits}", bits, group, d_in, unit)
    levels = Shape((*lead, 2**bits, d_out), "float32")
    return LevelPlanes(words, None, levels, "", bits, d_in, d_in, unit)


def shape_sparse(bits: int, d_in: int, d_out: int, group: int = 64, lead=()):
    words = [shape_words(width, d_in // 4, d_out, lead) for width in (bits, bits, 2, 2)]
    scales = Shape((*lead, d_in // 2 // group, d_out), "float32")
    return SparsePlanes(*words, scales, scales, bits, group, d_in, choose_unit(d_in // 4))


def shape_factors(base, rank: int, dtype: str, lead=()) -> tuple:
    return Shape((*lead, base.d_in, rank), dtype), Shape((*lead, rank, base.d_out), dtype)


# weight, rows of x, its dtype, the adapter's rank and dtype
CASES = {
    "2 bits, a token": (shape_planes(2, 4096, 4096), 1, "bfloat16", 64, "bfloat16"),
    "2 bits, 16 tokens": (shape_planes(2, 4096, 11008), 16, "bfloat16", 64, "float16"),
    "2 bits, a prompt": (shape_planes(2, 11008, 4096), 2048, "bfloat16", 64, "float32"),
    "3 bits, a token": (shape_planes(3, 8192, 28672, 128), 1, "bfloat16", 0, ""),
    "3 bits, a prompt in float32": (shape_planes(3, 4096, 4096), 128, "float32", 64, "float32"),
    "4 bits, one group": (shape_planes(4, 4096, 4096, 4096), 16, "bfloat16", 64, "bfloat16"),
    "4 bits, float32": (shape_planes(4, 11008, 4096), 1, "float32", 64, "bfloat16"),
    "8 bits": (shape_planes(8, 8192, 28672), 16, "bfloat16", 64, "bfloat16"),
    "levels of a table": (shape_levels(4, 4096, 11008, 64), 16, "bfloat16", 64, "bfloat16"),
    "levels of columns": (shape_levels(3, 4096, 4096), 1, "float32", 0, ""),
    "two of four": (shape_sparse(4, 4096, 11008), 1, "bfloat16", 64, "bfloat16"),
    # Sides that no register's size divides.
    "a rank of 1, groups of 48": (shape_planes(4, 96, 200, 48), 3, "bfloat16", 1, "float32"),
    "groups of 384": (shape_planes(3, 768, 33, 384), 5, "bfloat16", 20, "float16"),
    "half a unit too few": (shape_planes(2, 896, 4864, 32), 300, "float32", 5, "bfloat16"),
    "one column": (shape_planes(2, 512, 1), 1, "bfloat16", 2, "float32"),
    "small fours": (shape_sparse(3, 80, 9, 40), 17, "float32", 3, "float16"),
}


@pytest.mark.parametrize("case", CASES)
def test_compiles(case):
    base, m, dtype, rank, of_factors = CASES[case]
    factors = shape_factors(base, rank, of_factors) if rank else None
    program = compile_for("v5e", pallas_matmul, Shape((m, base.d_in), dtype), base, factors)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize("chip", CHIPS)
def test_no_layer_of_a_stack_is_copied(chip):
    base = shape_planes(3, 4096, 4096, lead=(4,), dtype="float32")
    factors = shape_factors(base, 64, "bfloat16", lead=(4,))

    def run(x, base, factors):
        def block(x, layer):
            return jnp.tanh(pallas_matmul(x, base, factors, layer=layer)).astype(x.dtype), None

        return jax.lax.scan(block, x, jnp.arange(4))[0]

    program = compile_for(chip, run, Shape((1, 4096), "bfloat16"), base, factors)
    stacks = r"(?:u32\[4,256|u32\[4,128|f32\[4,64|bf16\[4,64|bf16\[4,1,64|bf16\[4),4096"
    made_by = set(re.findall(rf"= {stacks}[^ ]* ([a-z-]+)\(", program.as_text()))
    # A bitcast is another name for the same bytes.
    assert made_by == {"parameter", "get-tuple-element", "bitcast"}
    # Nor is there one layer's array anywhere.
    assert not re.search(r"(u32|f32)\[(1,)?(256|128|64),4096\]", program.as_text())
    weight = 4 * (256 + 128 + 2 * 64) * 4096 * 4
    assert program.memory_analysis().temp_size_in_bytes < 0.05 * weight


def test_without_a_tile_that_fits_says_so():
    base = shape_planes(8, 28672, 8192)
    with pytest.raises(NotImplementedError, match="128 columns of 28672 inputs do not fit into"):
        compile_for("v5e", pallas_matmul, Shape((1, 28672), "float32"), base,
                    shape_factors(base, 64, "float32"))  # fmt: skip
