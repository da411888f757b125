"""Reads a dense folder: every tensor as float32; and what is dense beside packed weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.io.sources.hf import Checkpoint

Thunk = Callable[[], np.ndarray]


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Thunk]:
    """Returns each tensor's name -> what reads it."""
    return _read_all(Checkpoint.open(folder))


def read_beside(
    checkpoint: Checkpoint, parts: Sequence[str], open_packed: Callable[[str], Thunk]
) -> dict[str, Thunk]:
    """Returns each weight's name -> what reads it, where some weights lie in several tensors.

    Args:
      parts: the last names of those tensors; each packed weight has the first.
      open_packed: name of a module -> what unpacks its weight.
    """
    whole, modules = {}, []
    for name, thunk in _read_all(checkpoint).items():
        module, _, part = name.rpartition(".")
        if part not in parts:
            whole[name] = thunk
        elif part == parts[0]:
            modules.append(module)
    return whole | {f"{module}.weight": open_packed(module) for module in modules}


def _read_all(checkpoint: Checkpoint) -> dict[str, Thunk]:
    return {name: partial(_read, checkpoint, name) for name in checkpoint.names()}


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.read(name).astype(np.float32)
