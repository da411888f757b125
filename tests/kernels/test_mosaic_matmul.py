"""The Mosaic kernel: interpreted it equals the reference; for Hopper it lowers, and compiles.

The last test needs jax's CUDA plugin (`pip install 'jax[cuda12]'`), no GPU: pytest -m gpu_compiler.
"""

import os
import re
import subprocess
import sys
from functools import cache, partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from lqec_kernels import LowRank, packed_matmul, repack_for_kernels
from lqec_kernels.mosaic_matmul import choose_config, mosaic_matmul
from lqec_kernels.planes import Planes
from lqec_kernels.tuning import Config
from tests.kernels import hopper_compiler
from tests.kernels.products import (
    assert_near,
    draw,
    draw_adapter,
    draw_affine,
    multiply_densely,
)
from tests.sources import ROOT

TOLERANCE = {"bfloat16": 1e-2, "float16": 1e-3}
ONE_TILE = Config(16, 128, num_stages=2)


@cache
def draw_base(bits: int, d_in: int, d_out: int, *, group: int, kind="packed", lead=()):
    return repack_for_kernels(draw_affine(bits, d_in, d_out, group=group, kind=kind, lead=lead))


# bits, kind, d_in, group, d_out, m, dtype, rank, config. What is not whole tiles: 600 inputs of
# two splits, 136 columns, 17 and 18 rows, a rank of 72.
CASES = {
    "2 bits": (2, "symmetric", 256, 64, 128, 16, "bfloat16", 0, ONE_TILE),
    "3 bits and an adapter": (3, "packed", 256, 32, 128, 16, "float16", 8, ONE_TILE),
    "4 bits, split": (4, "floating", 600, 600, 136, 18, "bfloat16", 72, Config(24, 256, 2)),
    "8 bits, groups of two units": (8, "packed", 512, 512, 64, 17, "float16", 0, None),
    "8 bits, groups of half a chunk": (8, "packed", 256, 32, 64, 3, "bfloat16", 0, None),
}


# Each takes the interpreter seconds to compile.
QUICK = {"3 bits and an adapter", "4 bits, split"}


@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.thorough) for c in CASES]
)
def test_interpreted_it_equals_the_reference(case):
    bits, kind, d_in, group, d_out, m, dtype, rank, config = CASES[case]
    base = draw_base(bits, d_in, d_out, group=group, kind=kind)
    x = jnp.asarray(draw(m, d_in), dtype)
    adapter = draw_adapter(d_in, d_out, rank) if rank else None
    low_rank = adapter and (adapter.a, adapter.b)
    run = jax.jit(partial(mosaic_matmul, config=config, interpret=True))
    wanted = multiply_densely(x, base, (adapter,) if rank else ())
    assert_near(run(x, base, low_rank), wanted, TOLERANCE[dtype])


def test_a_layer_of_a_stack_is_read_where_it_lies():
    stack = draw_base(2, 512, 128, group=128, lead=(2,))
    # Of x's dtype, so that b too is read in place.
    a, b = (jnp.asarray(draw(2, *shape) / 8, "bfloat16") for shape in ((512, 64), (64, 128)))
    x = jnp.asarray(draw(9, 512), "bfloat16")
    run = jax.jit(partial(mosaic_matmul, interpret=True))
    one = jax.tree.map(lambda array: array[1], stack)
    wanted = multiply_densely(x, one, (LowRank(a[1], b[1]),))
    assert_near(run(x, stack, (a, b), layer=jnp.int32(1)), wanted, 1e-2)
    assert run(x[:0], one).shape == (0, 128)


def test_its_fetches_and_writes_do_not_race(monkeypatch):
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    monkeypatch.setattr("lqec_kernels.mosaic_steps._interpreter", lambda: params(detect_races=True))
    base, adapter = draw_base(2, 768, 128, group=256), draw_adapter(768, 128, 72)
    x = jnp.asarray(draw(8, 768), "bfloat16")
    config = Config(8, 128, num_stages=2)
    y = mosaic_matmul(x, base, (adapter.a, adapter.b), config=config, interpret=True)
    assert_near(y, multiply_densely(x, base, (adapter,)), 1e-2)
    assert not interpreter.get_races().races_found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lowers_for_a_gpu_without_one(bits, monkeypatch):
    monkeypatch.setattr("lqec_kernels.capability._why_not_here", lambda *arguments: "")
    stack = draw_base(bits, 512, 256, group=64, kind="floating", lead=(2,))
    a, b = jnp.ones((2, 512, 20), "bfloat16"), jnp.ones((2, 20, 256), "bfloat16")

    @jax.jit
    @partial(jax.grad, argnums=(0, 2), allow_int=True)
    def run(x, stack, adapter, layer):
        y = packed_matmul(x, stack, corrections=(adapter,), layer=layer, implementation="mosaic")
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    arguments = jnp.ones((2, 20, 512), "bfloat16"), stack, LowRank(a, b), jnp.int32(1)
    text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # The kernel is given the whole stack, and every row at once.
    call = re.search(r"custom_call @mosaic_gpu_v2.*", text)[0]
    words = "x".join(map(str, stack.planes[0].shape))
    assert f"tensor<{words}xui32>" in call and "tensor<40x512xbf16>" in call


def test_rows_of_a_batch_are_rows():
    base = draw_base(2, 512, 256, group=64)
    run = jax.vmap(lambda x: mosaic_matmul(x, base))
    jaxpr = str(jax.make_jaxpr(run)(jnp.ones((3, 8, 512), "float16")))
    assert "f16[24,512]" in jaxpr


def test_tiles_are_chosen_by_size():
    def choose(m: int, d_in: int, d_out: int, bits=2, rank=64):
        words = jax.ShapeDtypeStruct((d_in // 32 * bits, d_out), "uint32")
        scales = jax.ShapeDtypeStruct((d_in // 64, d_out), "float16")
        return choose_config(m, Planes((words,), scales, None, bits, 64, d_in, 256), rank)

    # As few rows as wgmma allows, as many programs as there are multiprocessors.
    assert choose(17, 4096, 4096) == Config(24, 128, 4, num_stages=4)
    assert choose(64, 4096, 11008) == Config(64, 256, 3, num_stages=3)
    # Rows of 130 are two tiles of 72, not one of 128 and one of 8.
    assert choose(130, 4096, 11008).block_m == 72
    assert choose(1024, 4096, 4096) == Config(128, 256, 1, num_stages=2)
    # Two units of 8 bits are too much beside as many rows.
    assert choose(1024, 4096, 4096, bits=8) == Config(64, 128, 1, num_stages=3)


def refusal(x, base) -> str:
    with pytest.raises(NotImplementedError) as refused:
        mosaic_matmul(x, base)
    return str(refused.value)


def test_refuses_what_no_kernel_is_written_for():
    base = draw_base(2, 512, 128, group=64)
    x = jnp.ones((1, 512), "bfloat16")
    assert "not float32; 'triton' takes it" in refusal(x.astype("float32"), base)
    assert "not 16; 'triton' and 'xla' take all" in refusal(x, draw_base(2, 512, 8, group=16))
    assert "not 384" in refusal(jnp.ones((1, 768), "float16"), draw_base(4, 768, 8, group=384))
    assert "40 inputs has one of 64" in refusal(x[:, :40], draw_base(2, 40, 8, group=8))
    affine = draw_affine(2, 512, 128, group=64)
    assert "not Affine; call lqec_kernels.repack" in refusal(x, affine)


@pytest.mark.gpu_compiler
@pytest.mark.skipif(
    not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="jax's CUDA plugin is not installed: pip install 'jax[cuda12]'",
)
def test_compiles_for_hopper_and_keeps_to_registers(tmp_path):
    if not hopper_compiler.TARGETS.is_file():
        pytest.skip("benchmarks are not here: an installed package has none")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("XLA_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "tests.kernels.hopper_compiler", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, case in enumerate(hopper_compiler.CASES):
        ptx = (tmp_path / f"packed_matmul_{number}.ptx").read_text()
        said = (tmp_path / f"packed_matmul_{number}.ptxas").read_text()
        assert ".target sm_90a" in ptx
        # The weight is the left operand, four registers of it: 16 inputs of 64 columns.
        products = re.findall(r"wgmma\.mma_async\S*m64n(\d+)k16\S* \{[^}]*\}, \{([^}]*)\}", ptx)
        assert products and all(left.count(",") == 3 for _, left in products)
        assert {int(rows) for rows, _ in products} == {-(-case.m // 8) * 8 // -(-case.m // 128)}
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        assert "serializ" not in said  # of wgmma, where registers are not ready
        assert "cp.async.bulk.tensor" in ptx and "st.local" not in ptx
