"""Flax models as their users write them: plain modules, nothing of this library."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from lqec_jax.recipe import parse_recipe

# Few different shapes: every one is compiled for.
WIDTH, HEADS, FF, VOCAB, LAYERS = 32, 4, 32, 64, 3
TOKENS = np.random.RandomState(1).randint(0, VOCAB, (2, 6))
# Parsed once, so that a step is compiled once for all tests.
RECIPE = parse_recipe("rtn(bits=4, group_size=16) | svd(rank=2, dtype='float32')")
KERNELS = "*/kernel"


class Block(nn.Module):
    """Flax's own attention, of DenseGeneral, and a dense layer."""

    bias: bool = True

    @nn.compact
    def __call__(self, h, _=None):
        x = nn.LayerNorm()(h)
        h = h + nn.MultiHeadDotProductAttention(HEADS, use_bias=self.bias, name="attn")(x, x)
        return h + nn.gelu(nn.Dense(WIDTH, use_bias=self.bias, name="mlp")(h)), None


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(VOCAB, WIDTH)(tokens)
        h, _ = Block(name="block")(h)
        return nn.Dense(VOCAB, name="head")(h)


class Scanned(nn.Module):
    """One block scanned over stacked parameters, and a weight of its own in an einsum."""

    bias: bool = False

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(VOCAB, WIDTH)(tokens)
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True},
                       length=LAYERS)  # fmt: skip
        h, _ = scan(self.bias, name="layers")(h, None)
        w = self.param("unembed", nn.initializers.lecun_normal(), (VOCAB, WIDTH))
        return jnp.einsum("btd,vd->btv", h, w)


class Perceptron(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, FF, rngs=rngs)
        self.down = nnx.Linear(FF, WIDTH, rngs=rngs)
        self.mix = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x))) @ self.mix


def init(model: nn.Module):
    """Returns params of a model's shapes, drawn here: its own init takes seconds to compile."""
    rng = np.random.RandomState(0)

    def draw(path, like):
        w = rng.standard_normal(like.shape).astype(like.dtype)
        return w + 1 if path[-1].key == "scale" else 0.2 * w

    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)
