"""Mistral (arXiv:2310.06825): a Llama whose every layer may read a sliding window."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lqec_jax.models.config import ModelConfig
from lqec_jax.models.families import Family
from lqec_jax.models.rotary import (
    MODELLED,
    TENSOR_NAMES,
    open_config,
    read_rotary,
    read_window,
    read_windows,
)


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Mistral config.json; an absent `sliding_window` is 4096, a null one is none.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; shapes that do not divide.
    """
    keys = open_config(raw, ("MistralForCausalLM",), (*MODELLED, "hidden_act", "sliding_window"))
    config = read_rotary(keys, max_length=4096 * 32, kv_heads=8)
    windows = read_windows(keys, read_window(keys, 4096), [True] * config.layers)
    return replace(config, windows=windows)


FAMILY = Family(read_config, TENSOR_NAMES)
