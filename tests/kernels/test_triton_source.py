"""The Triton kernels without a GPU: assembled for two, and their numbers in Triton's interpreter.

All but the first test need triton (`pip install triton`; torch too for the interpreter, which holds
its arrays): pytest -m triton.
"""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lqec_kernels.triton_matmul import cut_groups
from lqec_kernels.tuning import Config, Problem, choose_by_rule
from tests.sources import ROOT, imported, parse

SOURCES = [ROOT / "kernels" / "lqec_kernels" / f"triton_{part}.py" for part in ("source", "codes")]
needs_triton = pytest.mark.triton
TYPES = {"low": "u32", "high": "u32", "layer": "i32", "scales": "fp16", "offsets": "fp16",
         "parts": "fp32", "down": "fp32"}  # fmt: skip
# Bytes that a program may have on an A100 and on an H100, by compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


def test_the_sources_need_triton_only():
    # jax-triton below 0.4 cannot be imported without a GPU; the kernels must be.
    modules = {module for source in SOURCES for module in imported(parse(source))}
    ours = {module for module in modules if module.startswith("lqec_kernels.triton_codes")}
    assert {module.partition(".")[0] for module in modules - ours} == {"triton"}


def configure(kernel: str, bits: int, rows: int) -> Config:
    kind = "tiles" if kernel == "multiply_tiles" else "rows"
    return choose_by_rule(Problem(kind, rows, 4096, 11008, bits, "any"))


def constants_of(kernel: str, bits: int, rows: int, *, offsets: bool) -> dict:
    size, subs, spread = cut_groups(bits, 64)
    config = configure(kernel, bits, rows)
    return {
        "ROWS_X": rows, "D_IN": 4096, "D_OUT": 11008, "RANK": 64, "BITS": bits, "GROUP": 64,
        "SYMMETRIC": not offsets, "STACKED": offsets, "SIZE": size, "SUBS": subs, "SPREAD": spread,
        "UNITS": 4, "SPLITS": 4, "BLOCK_N": config.block_n, "BLOCK_M": config.block_m,
        "BLOCK_R": 64, "STAGES": config.num_stages, "PTX": True,
    }  # fmt: skip


@cache
def assemble(kernel: str, bits: int, kind: str, capability: int, *, rows: int, offsets: bool):
    """Compiles a kernel, cut by the rule, for a GPU that need not be here; returns its PTX."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lqec_kernels import triton_source

    function = getattr(triton_source, kernel)
    names = function.arg_names
    constants = constants_of(kernel, bits, rows, offsets=offsets)
    constants = {name: size for name, size in constants.items() if name in names}
    arrays = [name for name in names if name not in constants]
    types = {name: "*" + TYPES.get(name, kind) for name in arrays}
    if kernel == "multiply_rows":
        types["y"] = "*fp32"
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in arrays}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    config = configure(kernel, bits, rows)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    ptx = compiled.asm["ptx"]
    assert re.search(rf"\.target sm_{capability}", ptx)
    assert "atom." not in ptx
    return ptx


@needs_triton
@pytest.mark.filterwarnings("ignore")  # triton's own
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("bits", "kind"), [(2, "bf16"), (3, "fp16"), (4, "bf16"), (8, "bf16")])
def test_rows_are_multiplied_from_registers(bits, kind, capability):
    ptx = assemble("multiply_rows", bits, kind, capability, rows=3, offsets=bits != 4)
    assert "mma.sync" in ptx
    # Two codes an instruction, and nothing but it: 256 inputs of so many columns for 64 threads.
    pairs = len(re.findall(r"lop3\.b32 [^;]*0xea;", ptx))
    assert pairs == (0 if bits == 8 else configure("multiply_rows", bits, 3).block_n * 256 // 128)
    assert not re.search(r"fma\.rn\.(?:bf16x2|f16x2)", ptx)
    # All that a turn reads is asked for ahead of it, words by 16 bytes; plain loads are of a layer.
    assert re.search(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", ptx)
    assert len(re.findall(r"ld\.global", ptx)) <= 2
    # Words and codes stay in registers.
    assert len(re.findall(r"st\.shared", ptx)) < 64


@needs_triton
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("bits", "kind"), [(2, "bf16"), (3, "bf16"), (4, "fp16"), (8, "bf16")])
def test_tiles_are_multiplied_by_the_matrix_units(bits, kind, capability):
    ptx = assemble("multiply_tiles", bits, kind, capability, rows=200, offsets=bits != 4)
    assert "wgmma" in ptx if capability == 90 else "mma.sync" in ptx


@needs_triton
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_second_launch_and_the_pieces_of_float32(capability):
    assert "mma.sync" in assemble("sum_parts", 2, "bf16", capability, rows=3, offsets=True)
    ptx = assemble("multiply_rows", 4, "bf16", capability, rows=48, offsets=False)
    assert "wgmma" in ptx if capability == 90 else "mma.sync" in ptx


@needs_triton
def test_numbers_in_the_interpreter_are_the_equations():
    pytest.importorskip("triton")
    pytest.importorskip("torch", reason="the interpreter holds its arrays in torch's")
    program = Path(__file__).with_name("triton_interpreter.py")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(program)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 58

    def allowed(case: str) -> float:
        # Tiles round the weight to x's dtype; an adapter rounds x a to it.
        if "tiles=True" in case or "rank=0" not in case:
            return 1e-2 if "bfloat16" in case else 1e-3
        # Float16 codes are unpacked with up to 2^10 added, bfloat16 with 2^7.
        if "pieces=True" in case or "kind='bfloat16'" in case:
            return 1e-5
        return 2e-4 if "ptx=True" in case else 1e-6

    wrong = {case: error for case, error in errors.items()
             if error is None or error > allowed(case)}  # fmt: skip
    assert not wrong
