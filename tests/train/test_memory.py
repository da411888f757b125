"""What compiled programs hold: training costs packed weights, not dense ones. Nothing is run."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from lqec_jax.core.group_grid import GroupGrid
from lqec_jax.core.tree import set_at
from lqec_jax.models.decoder import model_fns
from lqec_jax.train.answers import Answer
from lqec_jax.train.losses import Divergence, ModelLoss, NextToken
from lqec_jax.train.parts import Adapters, Clips
from lqec_jax.train.steps import Program, Training
from lqec_jax.train.update import choose_options, init_state, make_update
from lqec_kernels.formats import Affine, CompressedLinear, Dense
from lqec_kernels.reference import tiled_matmul
from tests.compiling import options_for_memory
from tests.train.tiny import GROUP, RILQ, draw_decoder, draw_plain, make_config, plain_fns

# How much of the added blocks' dense float32 bytes may be added to what an update holds.
BOUND = 0.15
# What XLA does for a program that asks for no other order.
DEFAULT_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED"}
PRODUCT = "lqec_kernels.api.tiled_matmul"
# Not the cached function: what it traced before may hold another product.
fresh_fns = model_fns.__wrapped__


def multiply_densely(x, base, *, low_rank=None, layer=None, shards=1):
    return x @ base.dense(x.dtype)


LREC = ModelLoss((Divergence(1.0, "sum"), NextToken(120.0)))
FINE_TUNING = ModelLoss((NextToken(),))


def lower_update(fns, params, tokens: int, d: int, of=RILQ):
    """Lowers the update of a loss, adapters trained, from shapes alone."""

    def loss(params, batch):
        return of(fns, params, batch)

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        "teacher": jax.ShapeDtypeStruct((1, tokens, d), jnp.float32),
    }
    options = choose_options(len(params["blocks"]))
    return make_update(loss, optimizer, compiler_options=options).lower(state, batch)


def temp_bytes(lowered, **options: str) -> int:
    compiled = lowered.compile(compiler_options=options_for_memory() | options)
    return compiled.memory_analysis().temp_size_in_bytes


def shapes_of(tree):
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), tree)


def decoder_share(remat: bool, mixed: bool, d: int = 512, tokens: int = 8) -> float:
    """Returns what 8 more blocks add to an update, less their inputs, over their dense bytes."""

    def held(layers: int) -> int:
        config = make_config(layers, d, 2 * d)
        params = shapes_of(draw_decoder(config, (2, 3) * (layers // 2) if mixed else (2,)))
        return temp_bytes(lower_update(fresh_fns(config, remat=remat), params, tokens, d))

    dense = 8 * (4 * d * d + 3 * d * 2 * d) * 4
    return (held(16) - held(8) - 8 * tokens * d * 4) / dense


def plain_share(remat: bool, d: int = 512, tokens: int = 8, **options: str) -> float:
    """The same of 4 more segments of one block of one linear, of 2 and 3 bits in turn."""

    def held(layers: int) -> int:
        params = shapes_of(draw_plain((2, 3) * (layers // 2), d))
        return temp_bytes(lower_update(plain_fns(remat), params, tokens, d), **options)

    return (held(8) - held(4) - 4 * tokens * d * 4) / (4 * d * d * 4)


def scanned_share(of, d: int = 512, tokens: int = 8) -> float:
    """The same of 8 more blocks of one linear, in one segment."""

    def held(layers: int) -> int:
        one = shapes_of(draw_plain((2,), d))
        stack = lambda s: jax.ShapeDtypeStruct((layers, *s.shape[1:]), s.dtype)  # noqa: E731
        params = {**one, "blocks": jax.tree.map(stack, one["blocks"])}
        return temp_bytes(lower_update(plain_fns(), params, tokens, d, of))

    return (held(16) - held(8) - 8 * tokens * d * 4) / (8 * d * d * 4)


@pytest.mark.parametrize("remat", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_eight_more_blocks_add_little(remat):
    assert 0 < decoder_share(remat, mixed=False) <= BOUND


def test_eight_more_linears_add_little_to_the_other_losses(monkeypatch):
    assert 0 < scanned_share(LREC) <= BOUND
    assert 0 < scanned_share(FINE_TUNING) <= BOUND
    monkeypatch.setattr(PRODUCT, multiply_densely)
    assert scanned_share(LREC) > 5 * BOUND


def apiq_share(d: int = 512, tokens: int = 8) -> float:
    """Returns what ApiQ's update of a block holds, less its gradients, over the dense bytes."""
    fns = fresh_fns(make_config(1, d, 2 * d))
    parts = Clips(grid=GroupGrid(2, GROUP)), Adapters(rank=4)
    training = Training("apiq", parts, Answer(aug=True), None)
    shapes = {path: (d, d) for path in fns.linears}
    shapes |= {"mlp/gate": (d, 2 * d), "mlp/up": (d, 2 * d), "mlp/down": (2 * d, d)}

    def start() -> dict:
        block = {"attn_norm": {"scale": jnp.ones(d)}, "mlp_norm": {"scale": jnp.ones(d)}}
        for path, shape in shapes.items():
            leaf = training.begin(CompressedLinear(Dense(jnp.ones(shape))), jax.random.key(0))
            block = set_at(block, f"{path}/kernel", leaf)
        return {"blocks": (block,)}

    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda: init_state(start(), optimizer, training.moves))
    wide, one = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, tokens, d), (1,)))
    batch = {"h": wide, "answer": wide, "spread": one, "scale": one}
    loss = Program(fns, training.parts, training.loss)
    lowered = make_update(loss, optimizer).lower(state, batch)
    gradients = sum(array.size * 4 for array in jax.tree.leaves(state.train))
    dense = 4 * sum(d_in * d_out for d_in, d_out in shapes.values())
    return (temp_bytes(lowered) - gradients) / dense


def test_apiq_holds_less_than_its_block(monkeypatch):
    """One dense float32 copy of a block would be a share of 1."""
    assert 0 < apiq_share() < 0.7
    monkeypatch.setattr(PRODUCT, multiply_densely)
    assert apiq_share() > 1.5


@pytest.mark.thorough
@pytest.mark.parametrize("remat", [True, False])
def test_eight_more_blocks_of_other_bits_add_little(remat):
    assert 0 < decoder_share(remat, mixed=True) <= BOUND


@pytest.mark.thorough
def test_a_dense_product_breaks_the_bound(monkeypatch):
    monkeypatch.setattr(PRODUCT, multiply_densely)
    assert decoder_share(remat=False, mixed=False) > 5 * BOUND


@pytest.mark.parametrize(
    ("remat", "order"),
    [pytest.param(True, DEFAULT_ORDER, marks=pytest.mark.thorough), (False, {})],
)
def test_segments_of_one_block_add_little(remat, order, monkeypatch):
    # Such a segment is no loop to XLA, which then keeps dense copies even where the block is to be
    # recomputed: a checkpoint around the dense product does not help.
    assert 0 < plain_share(remat, **order) <= BOUND
    monkeypatch.setattr(PRODUCT, multiply_densely)
    assert plain_share(remat, **order) > 5 * BOUND


@pytest.mark.thorough
def test_recomputing_segments_of_one_block_saves_their_activations():
    # In the default order it saves nothing: all blocks are recomputed before the first is used.
    config = make_config(2, 64, 128)
    params = shapes_of(draw_decoder(config, (2, 3)))

    def held(remat: bool) -> int:
        return temp_bytes(lower_update(fresh_fns(config, remat=remat), params, 256, 64))

    assert held(True) < 0.75 * held(False)


def draw_base(d_in: int, d_out: int) -> Affine:
    shape = (d_in // GROUP, d_out)
    codes = jnp.zeros((d_in, d_out), jnp.uint8)
    scales, zeros = jnp.ones(shape, jnp.float16), jnp.zeros(shape, jnp.uint8)
    return Affine.from_codes(codes, scales, zeros, bits=2, group_size=GROUP)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_product_holds_less_than_the_dense_weight(rank):
    d_in, d_out = 512, 1024
    x, base = jnp.ones((4, d_in)), draw_base(d_in, d_out)
    low_rank = (jnp.ones((d_in, rank)), jnp.ones((rank, d_out))) if rank else None

    def loss(x, low_rank, base):
        return jnp.sum(jnp.square(tiled_matmul(x, base, low_rank=low_rank)))

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, low_rank, base)
    assert temp_bytes(lowered) < 0.75 * d_in * d_out * 4


def test_gradients_of_frozen_scales_are_not_computed():
    x, base = jnp.ones((64, 256)), draw_base(256, 256)

    def flops(argnums) -> float:
        def loss(x, scales):
            whole = Affine(base.codes, scales, base.zeros, 2, GROUP, 256)
            return jnp.sum(jnp.square(tiled_matmul(x, whole)))

        lowered = jax.jit(jax.grad(loss, argnums)).lower(x, base.scales)
        return lowered.compile(compiler_options=options_for_memory()).cost_analysis()["flops"]

    assert flops(0) < 0.8 * flops((0, 1))


@pytest.mark.parametrize("remat", [True, False])
def test_no_program_names_a_dense_weight(remat, monkeypatch):
    # Widths that are nothing else in the model: a float array of [d_in, d_out] is a dense weight.
    config = make_config(2, 64, 96)
    params = shapes_of(draw_decoder(config, (2,)))
    dense = re.compile(r"f32\[(?:\d+,)*(?:64,96|96,64)\]|tensor<(?:\d+x)*(?:64x96|96x64)xf32>")

    def find_dense() -> list[str]:
        fns = fresh_fns(config, remat=remat)
        forward = jax.make_jaxpr(fns.hidden)(params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        return dense.findall(str(forward) + lower_update(fns, params, 8, 64).as_text())

    assert not find_dense()
    monkeypatch.setattr(PRODUCT, multiply_densely)
    assert len(find_dense()) > 4
