"""What a decoder's parameters are: paths and shapes, from its config alone.

    blocks/LAYER/attn_norm/scale, attn/q/kernel, mlp/down/bias, ...
    embed/embedding, embed/positions, norm/scale, head/kernel

Kernels are [d_in, d_out]. No family is known here: two that agree in their config are one decoder.
"""

from typing import NamedTuple

import numpy as np

from lqec_jax.core.tree import set_at
from lqec_jax.core.types import Params
from lqec_jax.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

ROW_PARALLEL = frozenset({"attn/o", "mlp/down"})
EVERYTHING = np.iinfo(np.int32).max  # the window of a layer without one, beside layers with


def linear_groups(config: ModelConfig) -> tuple[tuple[str, ...], ...]:
    """Returns a block's linears in data-flow order, those that share an input together."""
    inner = ("mlp/gate", "mlp/up") if config.gated else ("mlp/up",)
    return (("attn/q", "attn/k", "attn/v"), ("attn/o",), inner, ("mlp/down",))


def block_shapes(config: ModelConfig) -> Shapes:
    """Returns parameter path -> shape for one block."""
    d, head_dim = config.d_model, config.head_dim
    shapes: Shapes = {}
    for name in ("attn", "mlp"):
        shapes |= _norm(f"{name}_norm", d, config)
        if config.post_norms:
            shapes |= _norm(f"{name}_post_norm", d, config)
    if config.qk_norm:
        shapes |= _norm("attn/q_norm", head_dim, config) | _norm("attn/k_norm", head_dim, config)
    for path, linear in _linears(config).items():
        shapes[f"{path}/kernel"] = (linear.d_in, linear.d_out)
        if linear.biased:
            shapes[f"{path}/bias"] = (linear.d_out,)
    return shapes


def outer_shapes(config: ModelConfig) -> Shapes:
    """Returns parameter path -> shape outside the blocks; no head when it is tied."""
    d, vocab = config.d_model, config.vocab_size
    shapes: Shapes = {"embed/embedding": (vocab, d)}
    if config.rope is None:
        shapes["embed/positions"] = (config.max_length + config.position_offset, d)
    shapes |= _norm("norm", d, config)
    if not config.tied_head:
        shapes["head/kernel"] = (d, vocab)
    return shapes


def with_constants(config: ModelConfig, layer: int, block: Params) -> Params:
    """Adds to a block's tree what no checkpoint stores: 'attn/window' where layers differ in it.

    Layers of unequal windows are one program under `lax.scan` because the window is data, an int32
    scalar; a layer without one gets `EVERYTHING`.
    """
    if not config.mixed_windows:
        return block
    window = np.asarray(config.windows[layer] or EVERYTHING, np.int32)
    return set_at(block, "attn/window", window)


class _Linear(NamedTuple):
    d_in: int
    d_out: int
    biased: bool


def _linears(config: ModelConfig) -> dict[str, _Linear]:
    d, f = config.d_model, config.d_ff
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linears = {
        "attn/q": _Linear(d, q, config.attention_bias),
        "attn/k": _Linear(d, kv, config.attention_bias),
        "attn/v": _Linear(d, kv, config.attention_bias),
        "attn/o": _Linear(q, d, config.output_bias),
        "mlp/gate": _Linear(d, f, config.mlp_bias),
        "mlp/up": _Linear(d, f, config.mlp_bias),
        "mlp/down": _Linear(f, d, config.mlp_bias),
    }
    return {path: linears[path] for group in linear_groups(config) for path in group}


def _norm(path: str, d: int, config: ModelConfig) -> Shapes:
    scale, bias = {f"{path}/scale": (d,)}, {f"{path}/bias": (d,)}
    return scale | bias if config.norm == "layer" else scale
