"""The Pallas kernel: interpreted it equals the reference; for TPUs and GPUs it lowers, here."""

import re
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

import lqec_jax as lqec
from lqec_jax.core.tree import get_at, set_at
from lqec_jax.models.stepping import step_fns
from lqec_kernels import CompressedLinear, LowRank, repack_for_kernels, use
from lqec_kernels.api import packed_matmul
from lqec_kernels.pallas_matmul import choose_config, choose_gpu_config, pallas_matmul
from lqec_kernels.tuning import Config
from tests.golden.tiny_checkpoint import write_checkpoint
from tests.kernels.products import (
    assert_equals_the_reference,
    assert_gradients_are_the_references,
    assert_near,
    draw,
    draw_adapter,
    draw_affine,
    draw_codebook,
    draw_sparse,
    multiply_densely,
)

multiply = partial(packed_matmul, implementation="pallas")


def draw_rows(*shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(draw(*shape), dtype)


# bits, kind, d_in, group, d_out, m, dtype, adapters as (rank, pool)
CASES = {
    "2 bits": (2, "symmetric", 512, 64, 256, 1, "float32", []),
    "3 bits and adapters": (3, "packed", 320, 64, 12, 5, "float32", [(3, 1), (2, 1)]),
    "4 bits, groups of 384": (4, "floating", 768, 384, 130, 3, "bfloat16", [(20, 1)]),
    "8 bits, one group": (8, "packed", 96, 96, 10, 17, "float32", []),
    "2 bits, float16": (2, "packed", 40, 8, 10, 2, "float16", []),
    "pooled and plain": (2, "floating", 64, 16, 33, 4, "float32", [(2, 16), (4, 1)]),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case):
    bits, kind, d_in, group, d_out, m, dtype, ranks = CASES[case]
    base = repack_for_kernels(draw_affine(bits, d_in, d_out, group=group, kind=kind))
    adapters = [draw_adapter(d_in, d_out, rank, pool) for rank, pool in ranks]
    assert_equals_the_reference("pallas", draw_rows(m, d_in, dtype=dtype), base, adapters)


OTHERS = {
    "levels of a table, scales of scales": lambda: draw_codebook(4, 512, 12, group=64, double=True),
    "levels of columns": lambda: draw_codebook(3, 40, 12),
    "two of four": lambda: draw_sparse(4, 512, 12, group=32),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_equal_the_reference(kind):
    base = OTHERS[kind]()
    adapter = draw_adapter(base.d_in, 12, 2)
    assert_equals_the_reference(
        "pallas", draw_rows(2, base.d_in), repack_for_kernels(base), [adapter]
    )


@pytest.mark.parametrize("kind", OTHERS)
def test_gradients_of_other_formats_are_the_references(kind):
    base = OTHERS[kind]()
    assert_gradients_are_the_references("pallas", draw_rows(2, base.d_in), base, ())


def test_tiles_of_another_size_make_the_same_product():
    base, x = repack_for_kernels(draw_affine(4, 256, 384, group=32)), draw_rows(2, 20, 256)
    run = jax.jit(partial(pallas_matmul, config=Config(16, 128)))
    assert_near(run(x, base), multiply_densely(x, base), 1e-5)
    assert "grid=(3, 3)" in str(jax.make_jaxpr(run)(x, base))
    assert run(x[:0], base).shape == (0, 20, 384)


STACKS = {
    "numbers of float32": lambda: replace(
        repack_for_kernels(draw_affine(3, 320, 130, group=64, kind="floating", lead=(3,))),
        scales=jnp.asarray(draw(3, 5, 130)),
    ),
    "numbers of float16": lambda: repack_for_kernels(draw_affine(2, 512, 130, group=64, lead=(3,))),
    "levels, scales of scales": lambda: jax.tree.map(
        lambda *layers: jnp.stack(layers),
        *[repack_for_kernels(OTHERS["levels of a table, scales of scales"]())] * 3,
    ),
    "two of four": lambda: repack_for_kernels(draw_sparse(4, 512, 12, group=32, lead=(3,))),
}


@pytest.mark.parametrize("kind", STACKS)
def test_a_layer_of_a_stack_is_read_in_place(kind):
    stack = STACKS[kind]()
    # Few rows of bfloat16 go by another way, see `pallas_pairs`.
    dtype = "bfloat16" if kind == "numbers of float32" else "float32"
    x = draw_rows(4, stack.d_in, dtype=dtype)
    a, b = draw(3, stack.d_in, 20, seed=1) / 8, draw(3, 20, stack.d_out, seed=2) / 8
    low_rank = (jnp.asarray(a, "float16"), jnp.asarray(b, "bfloat16"))

    @jax.jit
    def answers(x, stack, low_rank):
        def step(_, layer):
            one = jax.tree.map(lambda array: array[layer], (stack, low_rank))
            return None, (pallas_matmul(x, stack, low_rank, layer=layer), pallas_matmul(x, *one))

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    in_place, alone = answers(x, stack, low_rank)
    assert in_place.shape == (3, 4, stack.d_out) and not np.array_equal(alone[0], alone[1])
    np.testing.assert_array_equal(in_place, alone)


def test_a_kernel_is_given_the_stack_and_columns_of_any_number():
    stack = STACKS["numbers of float32"]()
    low_rank = draw_rows(3, 320, 20, dtype="bfloat16"), draw_rows(3, 20, 130)
    text = lower("tpu", draw_rows(1, 320), stack, low_rank, layer=jnp.int32(1))
    (call,) = (line for line in text.splitlines() if "@tpu_custom_call(" in line)
    given = re.findall(r"tensor<([^>]*)>", call[call.rindex(": (") : call.rindex("->")])
    # x, padded to whole units, words, scales and offsets; a, padded as x, and b.
    wanted = "1xi32 1x1x512xf32 3x32x130xui32 3x16x130xui32 3x5x130xf32 5x130xf32 1x20x512xf32"
    assert given == [*wanted.split(), "3x20x130xf32"]


def test_gradients_are_the_references():
    base = repack_for_kernels(draw_affine(3, 64, 12, group=16, kind="floating"))
    adapters = [draw_adapter(64, 12, 3), draw_adapter(64, 12, 2, 16)]
    assert_gradients_are_the_references("pallas", draw_rows(4, 64), base, adapters)


def test_what_was_not_repacked_is_repacked_in_the_program_and_gets_its_own_gradients():
    base = draw_affine(2, 40, 10, group=8)
    assert_gradients_are_the_references("pallas", draw_rows(2, 40), base, ())


def test_under_scan_and_vmap_with_gradients():
    stack, x = repack_for_kernels(draw_affine(2, 32, 32, group=32, lead=(2,))), draw_rows(3, 32)

    @partial(jax.jit, static_argnums=0)
    def answers(multiply, x):
        def layer(x, base):
            return jnp.tanh(multiply(x, base) / 9), None

        def loss(x):
            scanned = jax.lax.scan(jax.checkpoint(layer), x, stack)[0]
            side = jax.vmap(multiply, in_axes=(None, 0))(x, stack)
            return jnp.sum(scanned**2) + jnp.sum(jnp.sin(side))

        return jax.value_and_grad(loss)(x)

    assert_near(answers(multiply, x), answers(multiply_densely, x), 1e-4)


def test_under_shard_map_with_a_weight_that_every_device_holds():
    if jax.device_count() < 2:
        pytest.skip("one device")
    base, x = repack_for_kernels(draw_affine(2, 32, 6, group=8, kind="floating")), draw_rows(4, 32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    data, whole = PartitionSpec("data"), PartitionSpec()
    share = partial(jax.shard_map, mesh=mesh, in_specs=(data, whole), out_specs=data)
    with pytest.raises(NotImplementedError, match="pass check_vma=False"):
        share(multiply)(x, base)

    @partial(jax.jit, static_argnums=0)
    def answers(multiply, scales, x):
        def loss(scales, x):
            return jnp.sum(jnp.sin(multiply(x, replace(base, scales=scales))))

        return jax.grad(loss, (0, 1))(scales, x)

    came = answers(share(multiply, check_vma=False), base.scales, x)
    assert_near(came, answers(multiply_densely, base.scales, x), 1e-3)


def lower(platform: str, x, base, low_rank, layer=None, **options) -> str:
    run = jax.jit(partial(pallas_matmul, **options))
    traced = run.trace(x, base, low_rank, layer=layer)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kind", [2, 3, 4, 8, *OTHERS])
def test_lowers_for_tpus_and_nvidia_gpus_without_one(kind):
    base = repack_for_kernels(
        OTHERS[kind]() if kind in OTHERS else draw_affine(kind, 512, 256, group=64)
    )
    x = draw_rows(1, base.d_in, dtype="bfloat16")
    factors = (draw_rows(base.d_in, 20, dtype="bfloat16"), draw_rows(20, base.d_out))
    assert "tpu_custom_call" in lower("tpu", x, base, factors)
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=h100)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(mesh):
        warnings.simplefilter("ignore", DeprecationWarning)  # of Pallas' Triton, jax 0.11
        assert "triton" in lower("cuda", x, base, factors, on_gpu=True)
    with pytest.raises(NotImplementedError, match="cuda"):
        lower("cuda", x, base, factors)


def choose(m: int, d_in: int, d_out: int, bits: float, dtype_bytes: int = 2, rank: int = 64):
    column_bytes, row_bytes = d_in * bits / 8, d_in * dtype_bytes
    return choose_config(m, d_in, d_out, column_bytes=column_bytes, row_bytes=row_bytes, rank=rank)


def test_tiles_are_chosen_by_what_fits_into_vmem():
    # One token: the least rows, 512 columns, fewer if much of the last tile would hang over.
    assert choose(1, 4096, 4096, 3) == choose(1, 4096, 11008, 3) == Config(16, 512)
    assert choose(1, 4096, 640, 3) == Config(16, 128)
    assert choose(1, 28672, 8192, 3) == Config(16, 256)
    # Many: 256 rows and as many columns as keep the sums in registers, fewer rows of a long d_in.
    assert choose(2048, 4096, 4096, 3) == Config(256, 256)
    assert choose(2048, 28672, 8192, 3) == Config(64, 128)
    assert choose(100, 4096, 4096, 3) == Config(64, 512)
    with pytest.raises(NotImplementedError, match="128 columns of 65536 inputs do not fit into 14"):
        choose(1, 65536, 4096, 8)


def test_tiles_of_a_gpu_fit_into_its_registers():
    assert choose_gpu_config(33) == Config(64, 64, num_stages=2)
    assert choose_gpu_config(1) == Config(16, 64, num_stages=2)


def test_a_model_answers_and_generates_by_it(tmp_path):
    model = lqec.load(write_checkpoint(tmp_path / "tiny", num_hidden_layers=1))
    (block,) = model.params["blocks"]
    # Three of seven: what a program takes is compiling its kernels.
    for bits, path in zip((2, 3, 4), ("attn/q", "attn/o", "mlp/down"), strict=True):
        _, d_in, d_out = get_at(block, f"{path}/kernel").shape
        base = draw_affine(bits, d_in, d_out, group=16, lead=(1,))
        leaf = CompressedLinear(base, (LowRank(jnp.ones((1, d_in, 1)), jnp.ones((1, 1, d_out))),))
        block = set_at(block, f"{path}/kernel", leaf)
    model = replace(model, params=repack_for_kernels({**model.params, "blocks": (block,)}))
    fns = step_fns(model.config, jnp.float32)

    @jax.jit
    def generate(params):
        logits, caches = fns.prefill(params, jnp.arange(16)[None], 16, 32)
        chosen = jnp.argmax(logits, axis=-1)
        return logits, fns.decode(params, chosen, 16, caches)[0]

    wanted = generate(model.params)
    with use("pallas"):
        program = generate.trace(model.params)
        assert str(program.jaxpr).count("name=packed_matmul") >= 2 * 3
        assert_near(program.lower().compile()(model.params), wanted, 1e-4)
