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
from lqec_jax.models.attention import Scoring, attend_to_past, causal_attention
from lqec_jax.models.cache import Past
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.parameters import EVERYTHING
from lqec_jax.models.rope import inverse_frequencies, rotate, tables, turn

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
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


class Norm(nn.Module):
    """The config's norm over the last axis, statistics in float32.

    rms: x / sqrt(mean(x²) + eps) · (scale + offset) (Zhang & Sennrich 2019);
    layer: (x - mean(x)) / sqrt(var(x) + eps) · scale + bias (Ba et al. 2016, arXiv:1607.06450).
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        scale = self.param("scale", nn.initializers.constant(1 - c.norm_offset), (x.shape[-1],))
        if c.norm_offset:
            scale = scale.astype(jnp.float32) + c.norm_offset
        if c.norm == "rms":
            return rms_normalize(x, c.norm_eps) * scale.astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_normalize(x, c.norm_eps) * scale.astype(x.dtype) + bias.astype(x.dtype)


def layer_normalize(x: jax.Array, eps: float) -> jax.Array:
    """Returns (x - mean) / sqrt(var + eps) over the last axis, computed in float32."""
    centred = x.astype(jnp.float32)
    centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * inverse).astype(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: positions 0 to t - 1, or those that follow a past.

    Returns what it adds, what each linear read, and what the next token needs: keys and values
    [b, t, kv_heads, head_dim], or the past with them.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, past: Past | None = None):
        c = self.config
        b, t, d = x.shape

        def project(name: str, heads: int) -> jax.Array:
            y = Linear(heads * c.head_dim, c.attention_bias, name=name)(x)
            return y.reshape(b, t, heads, c.head_dim)

        def norm(name: str, y: jax.Array) -> jax.Array:
            return Norm(c, name=f"{name}_norm")(y) if c.qk_norm else y

        turned = turn_from_start(c, t) if past is None else turn_after(c, t, past)
        q = turned(norm("q", project("q", c.heads)))
        k = turned(norm("k", project("k", c.kv_heads)))
        v = project("v", c.kv_heads)
        scoring = Scoring(c.attention_scale, c.attention_softcap)
        if past is None:
            mixed = causal_attention(q, k, v, window=self._window(), scoring=scoring)
            kept = k, v
        else:
            kept = past.write(k, v)
            mixed = attend_to_past(
                q, *kept.read(), past.position, window=self._window(), scoring=scoring
            )
        mixed = mixed.reshape(b, t, c.heads * c.head_dim)
        y = Linear(d, c.output_bias, name="o")(mixed)
        return y, {"q": x, "k": x, "v": x, "o": mixed}, kept

    def _window(self) -> int | jax.Array | None:
        """Returns the layers' one window, or this layer's, which its parameters carry."""
        if not self.config.mixed_windows:
            return self.config.window
        if self.is_initializing():  # no layer knows its number: the caller puts in the right one
            self.param("window", lambda key: jnp.int32(EVERYTHING))
        return self.get_variable("params", "window")


def turn_from_start(config: ModelConfig, t: int) -> Callable:
    """Returns what turns queries and keys at positions 0 to t - 1."""
    if config.rope is None:
        return lambda x: x
    cos, sin = tables(config.rope, config.head_dim, t)
    return lambda x: turn(x, cos, sin)


def turn_after(config: ModelConfig, t: int, past: Past) -> Callable:
    """Returns what turns t queries and keys that follow a past."""
    if config.rope is None:
        return lambda x: x
    # A cache is never longer than the model's context, where no rotation depends on the length.
    frequency, scale = inverse_frequencies(config.rope, config.head_dim, past.cache.length)
    positions = past.position + jnp.arange(t)
    return lambda x: rotate(x, positions, frequency, scale)


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x)))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        read = {"up": x}
        if c.gated:
            gate = Linear(c.d_ff, c.mlp_bias, name="gate")(x)
            up = Linear(c.d_ff, c.mlp_bias, name="up")(x)
            inner = gate_with(c.activation, gate, up)
            read["gate"] = x
        else:
            inner = ACTIVATIONS[c.activation](Linear(c.d_ff, c.mlp_bias, name="up")(x))
        y = Linear(x.shape[-1], c.mlp_bias, name="down")(inner)
        return y, {**read, "down": inner}


def gate_with(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns act(gate) · up."""
    return gated_silu(gate, up) if activation == "silu" else ACTIVATIONS[activation](gate) * up


class Block(nn.Module):
    """One pre-norm decoder block: h -> (h, what each linear read, what the next token needs)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, h: jax.Array, past: Past | None = None):
        c = self.config

        def norm_after(name: str, y: jax.Array) -> jax.Array:
            return Norm(c, name=f"{name}_post_norm")(y) if c.post_norms else y

        mixed, read, kept = Attention(c, name="attn")(Norm(c, name="attn_norm")(h), past)
        h = h + norm_after("attn", mixed)
        inputs = {f"attn/{name}": x for name, x in read.items()}
        out, read = MLP(c, name="mlp")(Norm(c, name="mlp_norm")(h))
        inputs |= {f"mlp/{name}": x for name, x in read.items()}
        return h + norm_after("mlp", out), inputs, kept
