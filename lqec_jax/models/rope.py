"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its context extensions.

Channel pair i of a head of d channels turns by the angle `position * f_i`, f_i = theta^(-2i / d),
so a dot product of a query and a key depends on their distance only. A head's pairs are
(i, i + d/2), the layout of Hugging Face checkpoints. The extensions change f_i; with L the original
context and s the factor:

- linear: f_i / s.
- dynamic: theta grows by (s * t / L - (s - 1))^(d / (d - 2)) once the length t exceeds L.
- llama3 (arXiv:2407.21783): by the turns L * f_i / 2pi that a pair makes in the original context,
  pairs above `high_freq_factor` turns are kept, those below `low_freq_factor` are divided by s,
  and the ones between are interpolated linearly in turns.
- yarn (Peng et al. 2023, arXiv:2309.00071): the same, linear in the pair's index, between the pairs
  that make `beta_fast` and `beta_slow` turns; cos and sin are scaled by 0.1 ln(s) + 1.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.models.config import Rope


def inverse_frequencies(rope: Rope, head_dim: int, length: int) -> tuple[np.ndarray, float]:
    """Returns what each channel pair turns per token, and the factor on cos and sin.

    Args:
        rope: the checkpoint's rotary embedding.
        head_dim: channels of a head, even.
        length: tokens of the whole sequence, cache included; only `dynamic` depends on it, and its
            keys turned at another length are not those this length asks for.
    Returns:
        float32 [head_dim / 2] in radians per token; a float, 1 except for `yarn`.
    """
    theta = _stretched_theta(rope, head_dim, length) if rope.kind == "dynamic" else rope.theta
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    attention_scale = 1.0
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _interpolate(frequency, rope.factor, _kept_by_turns(rope, frequency))
    elif rope.kind == "yarn":
        frequency = _interpolate(frequency, rope.factor, _kept_by_index(rope, head_dim))
        attention_scale = _yarn_attention_scale(rope)
    return frequency.astype(np.float32), attention_scale


def tables(rope: Rope, head_dim: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin, each float32 [length, head_dim / 2], for positions 0 to length - 1.

    The attention scale is multiplied in. Feed them to `turn`.
    """
    frequency, scale = inverse_frequencies(rope, head_dim, length)
    return _cos_sin(jnp.arange(length), frequency, scale)


def rotate(
    x: jax.Array, positions: jax.Array, frequency: np.ndarray, attention_scale: float = 1.0
) -> jax.Array:
    """Turns each channel pair of `x` by its position's angle, computed in float32.

    Args:
        x: queries or keys, [b, t, heads, head_dim].
        positions: int [t] or [b, t], in tokens.
        frequency, attention_scale: from `inverse_frequencies`.
    Returns: as `x`, in its dtype.
    """
    return turn(x, *_cos_sin(positions, frequency, attention_scale))


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the channel pairs (i, i + d/2) of `x` by the angles that `cos` and `sin` are of.

    x [b, t, heads, head_dim] of any float dtype; cos, sin float32 [t, head_dim / 2] or with a
    leading [b]. Computes in float32 and returns the dtype of `x`.
    """
    cos, sin = cos[..., None, :], sin[..., None, :]  # [b or none, t, 1, head_dim / 2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [b, t, heads, head_dim / 2]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _cos_sin(
    positions: jax.Array, frequency: np.ndarray, scale: float
) -> tuple[jax.Array, jax.Array]:
    angles = positions[..., None].astype(jnp.float32) * frequency  # [..., t, head_dim / 2]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _stretched_theta(rope: Rope, head_dim: int, length: int) -> float:
    stretch = max(length, rope.original_length) / rope.original_length
    growth = rope.factor * stretch - (rope.factor - 1)
    return rope.theta * growth ** (head_dim / (head_dim - 2))


def _interpolate(frequency: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    return frequency * (kept + (1 - kept) / factor)


def _kept_by_turns(rope: Rope, frequency: np.ndarray) -> np.ndarray:
    turns = rope.original_length * frequency / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    return np.clip((turns - low) / (high - low), 0, 1)


def _kept_by_index(rope: Rope, head_dim: int) -> np.ndarray:
    def index_of(turns: float) -> float:
        frequency = 2 * math.pi * turns / rope.original_length
        return -head_dim * math.log(frequency) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Equal ends ask for a step; a ramp this steep is one at integer indices.
    width = high - low or 1e-3
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)


def _yarn_attention_scale(rope: Rope) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
