"""A model in memory: what `load` and `compress` return."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lqec_jax.core.types import ModelFns, Params
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import model_fns


@dataclass(frozen=True)
class Model:
    """A decoder, dense or compressed.

    Attributes:
      config: what the decoder is.
      params: embedding, segments of blocks, norm, head; see `models.decoder`.
      raw_config: config.json as given; an artifact carries it on.
      tokenizer: has encode, decode, bos_id, files; None where the folder has none.
      recipe: the recipe that made it, '' for a dense model.
      report: the report of the run that made it, {} for a dense model.
      made: the record of how an artifact was made, {} where there is none.
      fingerprint: sha256 of the dense checkpoint it comes from.
      dtype: of activations.
    """

    config: ModelConfig
    params: Params = field(repr=False)
    raw_config: Mapping[str, Any] = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    recipe: str = ""
    report: Mapping[str, Any] = field(default_factory=dict, repr=False)
    fingerprint: str = ""
    folder: Path | None = None
    dtype: Any = jnp.float32
    made: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def fns(self) -> ModelFns:
        return model_fns(self.config, self.dtype)
