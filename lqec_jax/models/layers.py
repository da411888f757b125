"""The parts of a decoder block as flax.linen modules, read functionally.

Parameters are plain nested dicts: `module.apply({"params": tree}, x)`. A kernel may be an array or
a CompressedLinear; it is declared with `param` only while initializing and otherwise read with
`get_variable`, because linen would refuse a packed leaf for its shape.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lqec_jax.core.linear import linear
from lqec_jax.models.activations import gated_silu, rms_normalize
from lqec_jax.models.attention import causal_attention
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.rope import tables, turn

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Linear(nn.Module):
    """y = x kernel + bias, the kernel dense or compressed."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_initializing():
            shape = (x.shape[-1], self.features)
            self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        y = linear(x, self.get_variable("params", "kernel"))
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, the mean in float32 (Zhang & Sennrich 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_normalize(x, self.eps) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions 0 to t - 1."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        b, t, d = x.shape

        def project(name: str, heads: int) -> jax.Array:
            y = Linear(heads * c.head_dim, c.attention_bias, name=name)(x)
            return y.reshape(b, t, heads, c.head_dim)

        cos, sin = tables(c.rope, c.head_dim, t)
        q = turn(project("q", c.heads), cos, sin)
        k = turn(project("k", c.kv_heads), cos, sin)
        mixed = causal_attention(q, k, project("v", c.kv_heads))
        mixed = mixed.reshape(b, t, c.heads * c.head_dim)
        y = Linear(d, c.attention_bias, name="o")(mixed)
        return y, {"q": x, "k": x, "v": x, "o": mixed}


class MLP(nn.Module):
    """down(act(gate(x)) · up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        gate = Linear(c.d_ff, c.mlp_bias, name="gate")(x)
        up = Linear(c.d_ff, c.mlp_bias, name="up")(x)
        inner = gate_with(c.activation, gate, up)
        y = Linear(x.shape[-1], c.mlp_bias, name="down")(inner)
        return y, {"gate": x, "up": x, "down": inner}


def gate_with(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns act(gate) · up."""
    return gated_silu(gate, up) if activation == "silu" else ACTIVATIONS[activation](gate) * up


class Block(nn.Module):
    """One pre-norm decoder block: h -> (h, what each linear read)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        eps = self.config.norm_eps
        mixed, read = Attention(self.config, name="attn")(RMSNorm(eps, name="attn_norm")(h))
        h = h + mixed
        inputs = {f"attn/{name}": x for name, x in read.items()}
        out, read = MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(h))
        inputs |= {f"mlp/{name}": x for name, x in read.items()}
        return h + out, inputs
