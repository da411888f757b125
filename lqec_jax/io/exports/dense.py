"""The dense export: a Hugging Face folder in the original names and shapes, nothing packed."""

from pathlib import Path

import numpy as np

from lqec_jax.core.tree import is_compressed
from lqec_jax.io.exports.walk import to_stored, walk, write_config
from lqec_jax.io.tensor_file import write_weights
from lqec_jax.models.model import Model


def write(model: Model, folder: Path, dtype: np.dtype | None) -> list[str]:
    """Writes every weight dense, under its original name.

    Raises:
      InputError: a weight holds values that `dtype` cannot.
    """
    packed = any(is_compressed(placed.value) for placed in walk(model))
    kept = dtype or (np.dtype(np.float32) if packed else None)
    tensors = ((p.stored.name, to_stored(p, kept)) for p in walk(model))
    write_weights(folder, tensors)
    write_config(model, folder, kept)
    if dtype is None and packed:
        return ["weights are float32, so that nothing is rounded; --dtype bfloat16 halves them"]
    return []
