"""What a decoder's parameters are: paths and shapes, from its config alone.

    blocks/LAYER/attn_norm/scale, attn/q/kernel, mlp/down/bias, ...
    embed/embedding, embed/positions, norm/scale, head/kernel

Kernels are [d_in, d_out]. No family is known here: two that agree in their config are one decoder.
"""

import numpy as np

from lqec_jax.core.sites import Site, kernel_path
from lqec_jax.core.tree import set_at
from lqec_jax.core.types import Params
from lqec_jax.models.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

EVERYTHING = np.iinfo(np.int32).max  # the window of a layer without one, beside layers with


def linear_sites(config: ModelConfig) -> tuple[Site, ...]:
    """Returns a block's linears in data-flow order, those that share an input in one group."""
    d, f = config.d_model, config.d_ff
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention, output, mlp = config.attention_bias, config.output_bias, config.mlp_bias
    sites = (
        Site("attn/q", d, q, attention, group=0),
        Site("attn/k", d, kv, attention, group=0),
        Site("attn/v", d, kv, attention, group=0),
        Site("attn/o", q, d, output, group=1, split="in"),
        Site("mlp/gate", d, f, mlp, group=2),
        Site("mlp/up", d, f, mlp, group=2),
        Site("mlp/down", f, d, mlp, group=3, split="in"),
    )
    return tuple(site for site in sites if config.gated or site.path != "mlp/gate")


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
    for site in linear_sites(config):
        shapes[kernel_path(site)] = site.shape
        if site.biased:
            shapes[f"{site.path}/bias"] = (*site.shape[:-2], site.d_out)
    return shapes


def outer_shapes(config: ModelConfig) -> Shapes:
    """Returns parameter path -> shape outside the blocks; no head when it is tied."""
    d, vocab = config.d_model, config.vocab_size
    shapes: Shapes = {"embed/embedding": (vocab, d)}
    if config.rope is None:
        shapes["embed/positions"] = (config.max_length + config.position_offset, d)
    shapes |= _norm("norm", d, config)
    if not config.tied_head:
        shapes[kernel_path("head")] = (d, vocab)
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


def _norm(path: str, d: int, config: ModelConfig) -> Shapes:
    scale, bias = {f"{path}/scale": (d,)}, {f"{path}/bias": (d,)}
    return scale | bias if config.norm == "layer" else scale
