"""A Llama of 7 billion parameters' shapes as the compressed model that the benchmarks share."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lqec_jax.core.tree import set_at
from lqec_jax.models import families
from lqec_jax.models.parameters import block_shapes, outer_shapes
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.linears import preview_leaf

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
RECIPE = "rtn(bits=2, group_size=64) | svd(rank=64)"


def read_config(layers: int) -> Any:
    return families.read_config({**LLAMA_7B, "num_hidden_layers": layers})


def make_params(config: Any, dtype: Any, draw: Callable[[Any], Any], draw_outer: Callable) -> dict:
    """Makes parameters of a model as RECIPE leaves them: one segment of all layers.

    Args:
      draw: what a weight holds (a tree of shapes and dtypes, without layers) -> a stack of layers.
      draw_outer: shape -> embedding, head or last norm.
    """
    block: dict = {}
    for path, shape in block_shapes(config).items():
        if len(shape) == 2:
            stack = draw(preview_leaf(parse_recipe(RECIPE), *shape))
        else:
            stack = jnp.ones((config.layers, *shape), dtype)
        block = set_at(block, path, stack)
    params: dict = {"blocks": (block,)}
    for path, shape in outer_shapes(config).items():
        params = set_at(params, path, draw_outer(shape))
    return params
