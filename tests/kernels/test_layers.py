"""One layer of a stack: the same numbers as the layer by itself, whatever the weight has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lqec_jax.core.linear import linear
from lqec_kernels import (
    Affine,
    ChannelScale,
    CompressedLinear,
    InputGrid,
    Layer,
    LowRank,
    pick_layer,
    repack_for_kernels,
    take_layer,
)
from tests.kernels.test_reference import assert_near

LAYERS, D_IN, D_OUT = 3, 64, 24


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), jnp.float32)


def draw_affine() -> Affine:
    random = np.random.RandomState(0)
    words = random.randint(0, 2**32, (LAYERS, D_IN // 32 * 2, D_OUT), np.uint32)
    scales, zeros = draw(LAYERS, 2, D_OUT), draw(LAYERS, 2, D_OUT, seed=1)
    return Affine(jnp.asarray(words), scales, zeros, bits=2, group_size=32, d_in=D_IN)


def draw_stack(**parts) -> CompressedLinear:
    return CompressedLinear(repack_for_kernels(draw_affine()), **parts)


def draw_adapter(rank: int, pool: int = 1) -> LowRank:
    return LowRank(draw(LAYERS, D_IN // pool, rank), draw(LAYERS, rank, D_OUT, seed=rank), pool)


STACKS = {
    "plain": {},
    "an adapter": {"corrections": (draw_adapter(4),)},
    "two, one pooled": {"corrections": (draw_adapter(4, 2), draw_adapter(3), draw_adapter(2))},
    "transforms": {
        "corrections": (draw_adapter(4),),
        "input_transform": ChannelScale(1 + draw(LAYERS, D_IN) / 9),
        "output_transform": ChannelScale(1 + draw(LAYERS, D_OUT) / 9),
        "input_grid": InputGrid("int"),
    },
}


@pytest.mark.parametrize("name", STACKS)
def test_equals_the_layer_by_itself(name):
    stack, x = draw_stack(**STACKS[name]), draw(2, D_IN)

    @jax.jit
    def multiply(stack, index, x):
        return linear(x, Layer(stack, index)), linear(x, take_layer(stack, index))

    for index in range(LAYERS):
        came, wanted = multiply(stack, jnp.int32(index), x)
        assert_near([came], [wanted], 1e-6)
        assert_near([came], [linear(x, jax.tree.map(lambda a, i=index: a[i], stack))], 1e-5)


def test_picks_stacks_of_weights_and_slices_of_all_else():
    segment = {"packed": draw_stack(), "scale": draw(LAYERS, 5)}
    picked = pick_layer(segment, jnp.int32(1))
    assert isinstance(picked["packed"], Layer)
    assert picked["packed"].stack is segment["packed"] and int(picked["packed"].index) == 1
    assert np.array_equal(picked["scale"], segment["scale"][1])


@pytest.mark.parametrize("repacked", [True, False])
def test_no_words_of_a_layer_are_sliced_before_its_tiles(repacked):
    stack = draw_stack() if repacked else CompressedLinear(draw_affine())

    def scan(stack, x):
        def step(x, index):
            return x, linear(x, pick_layer(stack, index))

        return jax.lax.scan(step, x, jnp.arange(LAYERS))[1]

    program = jax.jit(scan).lower(stack, draw(2, D_IN)).as_text()
    words = jax.tree.leaves(stack)[0].shape[1]
    # Tiles of words are: half of the columns, inside of the inner loop.
    assert f"tensor<{words}x{D_OUT // 2}xui32>" in program
    assert f"{words}x{D_OUT}xui32>" not in program.replace(f"{LAYERS}x{words}x{D_OUT}xui32>", "")


def test_the_gradient_is_of_that_layer_alone():
    stack = draw_stack(corrections=(draw_adapter(4),))

    @jax.jit
    @jax.grad
    def gradient(correction, base, x):
        leaf = Layer(CompressedLinear(base, (correction,)), jnp.int32(1))
        return jnp.sum(jnp.sin(linear(x, leaf)))

    grads = gradient(stack.corrections[0], stack.base, draw(2, D_IN))
    sizes = np.abs(np.asarray(grads.a)).max(axis=(1, 2))
    assert sizes[1] > 0.1 and sizes[0] == sizes[2] == 0
