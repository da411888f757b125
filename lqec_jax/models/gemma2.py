"""Gemma 2 (arXiv:2408.00118): norms around each part, capped scores and logits, every other layer
with a sliding window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Family
from lqec_jax.models.raw_config import Section
from lqec_jax.models.rotary import (
    MODELLED,
    TENSOR_NAMES,
    WINDOW_KEYS,
    open_config,
    read_rotary,
    read_windows,
)

NAMES = TENSOR_NAMES | {
    "attn_post_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
}

MODELLED_BY_GEMMA = (
    *MODELLED, *WINDOW_KEYS, "hidden_activation", "attention_bias", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
# The original reads `hidden_activation`, whatever an older `hidden_act` beside it says.
INERT = ("hidden_act", "cache_implementation", "sliding_window_size")
NEUTRAL = {"use_bidirectional_attention": False}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Gemma 2 config.json; absent softcaps are 50 and 30, null ones are none.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; shapes that do not divide.
    """
    keys = open_config(raw, ("Gemma2ForCausalLM",), MODELLED_BY_GEMMA, INERT, NEUTRAL)
    config = read_rotary(
        keys,
        max_length=8192,
        kv_heads=4,
        head_dim=256,
        tied_head=True,
        activation="hidden_activation",
        activation_default="gelu_pytorch_tanh",
    )
    bias = keys.flag("attention_bias", False)
    softcaps = Section(
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **keys.values}
    )
    return replace(
        config,
        norm_offset=1.0,
        post_norms=True,
        embed_scale=config.d_model**0.5,
        attention_bias=bias,
        output_bias=bias,
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=softcaps.number("attn_logit_softcapping", None),
        logit_softcap=softcaps.number("final_logit_softcapping", None),
        windows=read_windows(
            keys, keys.count("sliding_window", 4096), [i % 2 == 0 for i in range(config.layers)]
        ),
    )


FAMILY = Family(read_config, NAMES)
