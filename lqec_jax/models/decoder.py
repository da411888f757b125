"""A decoder as pure functions over a parameter tree; see `core.types.ModelFns`.

    params = {'embed': {'embedding': [vocab, d]}, 'blocks': (segment, ...), 'norm': {'scale': [d]},
              'head': {'kernel': [d, vocab]}}          # no head where it is tied to the embedding

The paths and shapes of every config are in `models.parameters`.

A segment is one block's tree stacked on a leading layer axis and is walked by `lax.scan`, so
compile time does not grow with depth.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.sites import kernel_path
from lqec_jax.core.tree import set_at, stack_blocks
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.errors import InputError
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.layers import Block, Norm
from lqec_jax.models.parameters import linear_sites, outer_shapes, with_constants

# Activations of a training update, in bytes of float32, above which blocks are recomputed. A batch
# counts as one of 8 at least, so that a smaller one does not change how a run computes.
REMAT_BYTES, LEAST_BATCH = 2**30, 8


@lru_cache(maxsize=32)
def model_fns(config: ModelConfig, dtype: Any = jnp.float32, *, remat: bool = True) -> ModelFns:
    """Returns a model's functions for one compute dtype.

    Args:
      config: the model.
      dtype: of activations; statistics inside norms and softmax, and logits, are float32.
      remat: recompute a block in the backward pass instead of keeping its activations. Holds one
        block's activations and every block's input, for about a third more time.
    """
    norm_module = Norm(config)

    def embed(params: Params, tokens: jax.Array, start: Any = 0) -> jax.Array:
        h = params["embed"]["embedding"][tokens].astype(dtype)
        if config.embed_scale != 1:
            h = h * jnp.asarray(config.embed_scale, dtype)
        if config.rope is None:
            h = h + _positions(config, params, start, tokens.shape[1]).astype(dtype)
        return h

    def block(block_params: Params, h: jax.Array):
        return Block(config).apply({"params": block_params}, h)[:2]

    def norm(params: Params, h: jax.Array) -> jax.Array:
        return norm_module.apply({"params": params["norm"]}, h)

    def advance(h, block_params):
        return block(block_params, h)[0], None

    def hidden(params: Params, tokens: jax.Array):
        h = embed(params, tokens)
        step = jax.checkpoint(advance) if remat else advance
        for segment in params["blocks"]:
            h, _ = jax.lax.scan(step, h, segment)
        return h, norm(params, h)

    def head(params: Params, post_norm: jax.Array, start=0, size: int | None = None) -> jax.Array:
        tied = "head" not in params
        kernel = params["embed"]["embedding"] if tied else params["head"]["kernel"]
        axis = 0 if tied else 1
        if size is not None:
            kernel = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis)
        equation = "...d,vd->...v" if tied else "...d,dv->...v"
        rows = _accompany(post_norm)
        logits = jnp.einsum(
            equation, rows, kernel.astype(dtype), preferred_element_type=jnp.float32
        )
        if rows is not post_norm:
            logits = logits[:1]
        cap = config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    return ModelFns(
        embed=embed,
        block=block,
        hidden=hidden,
        head=head,
        sites=linear_sites(config),
        norm=norm,
        vocab_size=config.vocab_size,
    )


def needs_remat(config: ModelConfig, seqlen: int, batch: int) -> bool:
    """Says whether an update of `batch` windows would hold too many activations of blocks."""
    tokens = max(batch, LEAST_BATCH) * seqlen
    return 4 * tokens * config.layers * count_kept(config) > REMAT_BYTES


def count_kept(config: ModelConfig) -> int:
    """Returns how many numbers a block keeps of one token until its backward pass."""
    return 8 * config.d_model + 4 * config.heads * config.head_dim + 4 * config.d_ff


def forward(config: ModelConfig, params: Params, tokens: jax.Array, dtype: Any = jnp.float32):
    """Returns next-token logits.

    Args:
      tokens: int [b, t], ids below vocab_size.
    Returns:
      float32 [b, t, vocab].
    """
    fns = model_fns(config, dtype)
    return fns.head(params, fns.hidden(params, tokens)[1])


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Returns random float32 parameters, for tests and for training from scratch."""
    embed_key, head_key, *block_keys = jax.random.split(key, 2 + config.layers)
    h = jnp.zeros((1, 1, config.d_model))
    blocks = [Block(config).init(k, h)["params"] for k in block_keys]
    blocks = [with_constants(config, layer, block) for layer, block in enumerate(blocks)]
    params = {"blocks": stack_blocks(blocks), "norm": Norm(config).init(key, h)["params"]}
    for path, shape in outer_shapes(config).items():
        if path.startswith(("embed/", "head/")):
            path_key = head_key if path == kernel_path("head") else embed_key
            array = jax.random.normal(path_key, shape) / config.d_model**0.5
            params = set_at(params, path, array)
    return params


def _accompany(x: jax.Array) -> jax.Array:
    """Puts a row of zeros beside a single one, [1, ..., d] -> [2, ..., d], on a TPU.

    With one row its compiler leaves the matrix units aside, and expects three times the cycles.
    """
    if x.shape[0] == x.size // x.shape[-1] == 1 and jax.default_backend() == "tpu":
        return jnp.pad(x, [(0, 1)] + [(0, 0)] * (x.ndim - 1))
    return x


def _positions(config: ModelConfig, params: Params, start: Any, count: int) -> jax.Array:
    """Returns the learned positions start to start + count - 1, [count, d]."""
    if count > config.max_length:
        raise InputError(
            f"{count} tokens at once; the model has positions for {config.max_length}, cut the text"
        )
    table = params["embed"]["positions"]
    return jax.lax.dynamic_slice_in_dim(table, start + config.position_offset, count)
