"""Reads a dense folder: every tensor as float32."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.io.hf import Checkpoint


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns each tensor's name -> what reads it."""
    checkpoint = Checkpoint.open(folder)
    return {name: partial(_read, checkpoint, name) for name in checkpoint.names()}


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.read(name).astype(np.float32)
