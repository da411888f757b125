"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Family
from lqec_jax.models.rotary import MODELLED, TENSOR_NAMES, open_config, read_rotary

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Llama config.json; absent optional keys take the defaults of Hugging Face's Llama.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; shapes that do not divide.
    """
    keys = open_config(raw, ARCHITECTURES, (*MODELLED, "hidden_act", "attention_bias", "mlp_bias"))
    bias = keys.flag("attention_bias", False)
    return replace(
        read_rotary(keys, max_length=2048),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=keys.flag("mlp_bias", False),
    )


FAMILY = Family(read_config, TENSOR_NAMES)
