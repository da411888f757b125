"""What a decoder needs to know of itself: one frozen, hashable record, static under `jit`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding as a checkpoint asks for it.

    `kind` is the checkpoint's `rope_type`. The fields a kind does not use keep their defaults.
    Frequencies are in radians per token; `original_length` is the context the model was trained on.
    """

    kind: Literal["default", "linear", "dynamic", "llama3", "yarn"] = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: grouped-query attention, rotary positions, gated MLP, RMS norms."""

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float = 1e-5
    activation: str = "silu"
    rope: Rope = Rope()
    attention_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
