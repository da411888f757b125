"""A decoder one token at a time: `prefill` reads a prompt, `decode` one token after it.

Both are pure and compile once for each shape: prompts may be padded on the right, because what
follows a token cannot reach it, and the cache has a fixed length.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lqec_jax.core.types import Params
from lqec_jax.models.cache import Cache, Past, arrange, count_layers
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.layers import Block
from lqec_kernels import pick_layer

Caches = tuple[Cache, ...]  # one a segment


class StepFns(NamedTuple):
    """The two functions of a model.

    prefill: (params, tokens int [b, t], count, length) -> (float32 [b, vocab], caches). The logits
      are those after the first `count` tokens; the caches have room for `length` tokens, static and
      at most the model's context.
    decode: (params, tokens int [b], position, caches) -> (float32 [b, vocab], caches), for tokens
      that stand at `position`.
    """

    prefill: Any
    decode: Any


@lru_cache(maxsize=32)
def step_fns(config: ModelConfig, dtype: Any = jnp.float32) -> StepFns:
    """Returns a model's functions for one compute dtype."""
    fns = model_fns(config, dtype)

    def prefill(params: Params, tokens: jax.Array, count: Any, length: int):
        def advance(segment, h, layer):
            h, _, (k, v) = Block(config).apply({"params": pick_layer(segment, layer)}, h)
            return h, arrange(k, v)

        h, caches = fns.embed(params, tokens), []
        for segment in params["blocks"]:
            layers = jnp.arange(count_layers(segment))
            h, (keys, values) = lax.scan(partial(advance, segment), h, layers)
            caches.append(Cache.begin(keys, values, length))
        last = lax.dynamic_index_in_dim(h, count - 1, axis=1, keepdims=False)  # [b, d]
        return fns.head(params, fns.norm(params, last)), tuple(caches)

    def decode(params: Params, tokens: jax.Array, position: Any, caches: Caches):
        def advance(segment, layer, carry):
            h, cache = carry
            past = Past(cache, layer, position)
            h, _, past = Block(config).apply({"params": pick_layer(segment, layer)}, h, past)
            return h, past.cache

        h, written = fns.embed(params, tokens[:, None], position), []
        for segment, cache in zip(params["blocks"], caches, strict=True):
            turn = partial(advance, segment)
            h, cache = lax.fori_loop(0, count_layers(segment), turn, (h, cache))
            written.append(cache)
        return fns.head(params, fns.norm(params, h[:, 0])), tuple(written)

    return StepFns(prefill, decode)
