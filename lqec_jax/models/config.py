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
    """A pre-norm decoder with grouped-query attention; every family is one of these.

    Attributes:
      max_length: the longest context, in tokens.
      norm: 'rms', or 'layer' with a mean and a bias.
      norm_offset: added to a norm's stored scale.
      post_norms: attention's and the MLP's output pass a norm of their own.
      qk_norm: queries and keys pass a norm over the head's channels.
      gated: the MLP is down(act(gate(x)) · up(x)), not down(act(up(x))).
      rope: rotary positions; None for a table of learned ones, added to the embedding.
      position_offset: rows of that table before position 0's.
      embed_scale: the embedding is multiplied by it.
      attention_bias: of q, k and v; output_bias: of o; mlp_bias: of the MLP's.
      attention_scale: of scores; None is 1 / sqrt(head_dim).
      attention_softcap, logit_softcap: c in c·tanh(x / c), of scores and of logits.
      windows: how many positions a token reads, itself included, for each layer, 0 for all of
        them; () where every layer reads all.
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    gated: bool = True
    rope: Rope | None = Rope()
    position_offset: int = 0
    embed_scale: float = 1.0
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int, ...] = ()
    tied_head: bool = False

    @property
    def mixed_windows(self) -> bool:
        """Says whether layers differ in their window; each block then carries its own."""
        return len(set(self.windows)) > 1

    @property
    def window(self) -> int | None:
        """Returns the window that all layers share, None for none."""
        return None if self.mixed_windows or not any(self.windows) else self.windows[0]
