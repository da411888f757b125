"""What compiled programs hold: training costs packed weights, not dense ones. Nothing here is run."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from lqec_kernels.formats import Affine
from lqec_kernels.reference import tiled_matmul

from lqec_jax.core.tree import unstack_blocks
from lqec_jax.models.decoder import init_params, model_fns
from lqec_jax.train.losses import rilq_terms
from lqec_jax.train.update import init_state, make_update
from tests.train.tiny import GROUP, compress, make_config, plain_fns, plain_params

# How much of the added blocks' dense float32 bytes may be added to what an update holds.
BOUND = 0.15
# Machine code is not looked at, and takes half of the compile time to optimize.
FAST = {"xla_backend_optimization_level": 0}


def lower_update(fns, params, tokens: int, d: int):
    """Lowers RILQ's update, adapters trained, from shapes alone."""

    def loss(params, batch):
        return rilq_terms(fns, batch["teacher"], params, batch["tokens"],
                          model_weight=0.5, token_weight=0.5, target="post_norm")  # fmt: skip

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        "teacher": jax.ShapeDtypeStruct((1, tokens, d), jnp.float32),
    }
    return make_update(loss, optimizer).lower(state, batch)


def temp_bytes(lowered) -> int:
    return lowered.compile(compiler_options=FAST).memory_analysis().temp_size_in_bytes


def decoder_shapes(layers: int, d: int, mixed: bool):
    """Returns (config, parameter shapes): one segment of 2 bits, or one a block of 2, 3, 2, ... bits."""
    config = make_config(layers, d, 2 * d)
    fns, key = model_fns(config), jax.random.key(0)

    def make():
        params = init_params(config, key)
        blocks = params["blocks"]
        if mixed:
            blocks = [jax.tree.map(lambda w: w[None], b) for b in unstack_blocks(blocks)]
        blocks = tuple(compress(fns, b, 2 + n % 2, key) for n, b in enumerate(blocks))
        return {**params, "blocks": blocks}

    return config, jax.eval_shape(make)


def added_share(remat: bool, mixed: bool, d: int = 512, tokens: int = 8) -> float:
    """Returns what 8 more blocks add to an update, their inputs deducted, over their dense bytes."""

    def held(layers: int) -> int:
        config, params = decoder_shapes(layers, d, mixed)
        # Not the cached function: a trace of it may be of another product.
        fns = model_fns.__wrapped__(config, jnp.float32, remat)
        return temp_bytes(lower_update(fns, params, tokens, d))

    inputs = 8 * tokens * d * 4
    dense = 8 * (4 * d * d + 3 * d * 2 * d) * 4
    return (held(16) - held(8) - inputs) / dense


@pytest.mark.parametrize("remat", [True, False])
def test_eight_more_blocks_add_little(remat):
    assert 0 < added_share(remat, mixed=False) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, False])
def test_eight_more_blocks_of_other_bits_add_little(remat):
    assert 0 < added_share(remat, mixed=True) <= BOUND


def multiply_densely(x, base, *, shards=1):
    return x @ base.dense(x.dtype)


def test_a_dense_product_breaks_the_bound(monkeypatch):
    monkeypatch.setattr("lqec_jax.core.linear.packed_matmul", multiply_densely)
    assert added_share(remat=False, mixed=False) > 5 * BOUND


def plain_share(remat: bool, d: int = 512, tokens: int = 8) -> float:
    """`added_share` of a model of one linear a block, in 8 and 16 segments of 2 and 3 bits."""

    def held(layers: int) -> int:
        params = jax.eval_shape(lambda: plain_params((2, 3) * (layers // 2), d))
        return temp_bytes(lower_update(plain_fns(remat), params, tokens, d))

    return (held(16) - held(8) - 8 * tokens * d * 4) / (8 * d * d * 4)


@pytest.mark.parametrize("remat", [True, False])
def test_segments_of_one_block_add_little(remat):
    assert 0 < plain_share(remat) <= BOUND


def test_a_dense_product_under_checkpoint_breaks_the_bound(monkeypatch):
    monkeypatch.setattr("lqec_jax.core.linear.packed_matmul", multiply_densely)
    assert plain_share(remat=True) > BOUND


def test_recomputed_activations_do_not_pile_up():
    # Segments of one block are no loops to the compiler, and nothing but order frees their
    # activations. kens, d, added = 512, 64, 4

    def held(layers: int) -> int:
        params = jax.eval_shape(lambda: plain_params((2, 3) * (layers // 2), d))
        return temp_bytes(lower_update(plain_fns(remat=True), params, tokens, d))

    one_input = tokens * d * 4
    assert held(2 + added) - held(2) <= 1.25 * added * one_input


def test_a_product_holds_less_than_the_dense_weight():
    d_in, d_out = 512, 1024
    x = jax.ShapeDtypeStruct((4, d_in), jnp.float32)
    base = jax.eval_shape(draw_base, d_in, d_out)
    grad = jax.value_and_grad(lambda x, base: jnp.sum(jnp.square(tiled_matmul(x, base))))
    assert temp_bytes(jax.jit(grad).lower(x, base)) < 0.75 * d_in * d_out * 4


def draw_base(d_in: int, d_out: int) -> Affine:
    shape = (d_in // GROUP, d_out)
    codes = jnp.zeros((d_in, d_out), jnp.uint8)
    scales, zeros = jnp.ones(shape, jnp.float16), jnp.zeros(shape, jnp.uint8)
    return Affine.from_codes(codes, scales, zeros, bits=2, group_size=GROUP)


draw_base = jax.tree_util.Partial(draw_base)


def test_gradients_of_frozen_scales_are_not_computed():
    x, base = jnp.ones((64, 256)), draw_base(256, 256)

    def flops(argnums) -> float:
        grad = jax.grad(lambda x, scales: jnp.sum(jnp.square(product(x, scales))), argnums)
        return jax.jit(grad).lower(x, base.scales).compile().cost_analysis()["flops"]

    def product(x, scales):
        return tiled_matmul(x, Affine(base.codes, scales, base.zeros, 2, GROUP, 256))

    assert flops(0) < 0.8 * flops((0, 1))


@pytest.mark.parametrize("remat", [True, False])
def test_no_program_names_a_dense_weight(remat, monkeypatch):
    # Widths that are nothing else in the model: a float array of [d_in, d_out] is a dense weight.
    config = make_config(2, 64, 96)
    params = jax.eval_shape(
        lambda: (lambda p: {**p, "blocks": (compress(model_fns(config), p["blocks"][0], 2,
                                                     jax.random.key(0)),)})
        (init_params(config, jax.random.key(0)))
    )  # fmt: skip

    def programs() -> str:
        fns = model_fns.__wrapped__(config, jnp.float32, remat)
        lowered = lower_update(fns, params, 8, 64).as_text()
        forward = jax.make_jaxpr(fns.hidden)(params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        return lowered + str(forward)

    dense = re.compile(r"f32\[(?:\d+,)*(?:64,96|96,64)\]|tensor<(?:\d+x)*(?:64x96|96x64)xf32>")
    assert not dense.search(programs())
    monkeypatch.setattr("lqec_jax.core.linear.packed_matmul", multiply_densely)
    assert len(dense.findall(programs())) > 4
