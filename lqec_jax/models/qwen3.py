"""Qwen3, dense (arXiv:2505.09388): a Llama whose queries and keys are normed by head."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Family
from lqec_jax.models.qwen2 import MODELLED_BY_QWEN, read_late_windows
from lqec_jax.models.rotary import TENSOR_NAMES, open_config, read_rotary

NAMES = TENSOR_NAMES | {
    "attn/q_norm": "model.layers.{layer}.self_attn.q_norm",
    "attn/k_norm": "model.layers.{layer}.self_attn.k_norm",
}


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Qwen3 config.json; an absent `head_dim` is 128.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; shapes that do not divide.
    """
    keys = open_config(raw, ("Qwen3ForCausalLM",), (*MODELLED_BY_QWEN, "attention_bias"))
    config = read_rotary(keys, max_length=32768, kv_heads=32, head_dim=128)
    bias = keys.flag("attention_bias", False)
    return replace(
        config,
        qk_norm=True,
        attention_bias=bias,
        output_bias=bias,
        windows=read_late_windows(keys, config.layers),
    )


FAMILY = Family(read_config, NAMES)
