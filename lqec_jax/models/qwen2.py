"""Qwen2 and Qwen2.5 (arXiv:2407.10671): a Llama with biases on q, k and v."""

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
    read_window,
    read_windows,
)

MODELLED_BY_QWEN = (
    *MODELLED, *WINDOW_KEYS, "hidden_act", "use_sliding_window", "max_window_layers"
)  # fmt: skip


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a Qwen2 config.json.

    Raises: InputError: a key that is missing, of the wrong type, or not known to leave the logits
    alone; shapes that do not divide.
    """
    keys = open_config(raw, ("Qwen2ForCausalLM",), MODELLED_BY_QWEN, neutral={"use_mrope": False})
    config = read_rotary(keys, max_length=32768, kv_heads=32)
    return replace(config, attention_bias=True, windows=read_late_windows(keys, config.layers))


def read_late_windows(keys: Section, layers: int) -> tuple[int, ...]:
    """Returns each layer's window: those from `max_window_layers` on have one, if it is in use."""
    full = keys.count("max_window_layers", 28, at_least=0)
    window = read_window(keys, 4096) if keys.flag("use_sliding_window", False) else None
    return read_windows(keys, window, [layer >= full for layer in range(layers)])


FAMILY = Family(read_config, TENSOR_NAMES)
