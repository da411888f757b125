"""Reads flax folders: a nested dict of arrays, names joined by '/', blocks stacked.

Names and orientation are ours: 'blocks/3/attn/q/kernel', [d_in, d_out]. What a packed weight's
arrays mean is `operators`'.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.core.sites import kernel_path
from lqec_jax.errors import InputError
from lqec_jax.io.files import read_json
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.verify import operators

PARTS = ("base", "corrections", "input_transform", "output_transform")


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns each parameter's path, blocks one by one, -> what unpacks it."""
    checkpoint, weights = Checkpoint.open(folder), read_packed(folder)
    found: dict[str, Callable] = {
        kernel_path(path): partial(_read_packed, checkpoint, path, said)
        for path, said in weights.items()
    }
    for name in checkpoint.names():
        if not any(name.startswith(f"{path}/{part}/") for path in weights for part in PARTS):
            found[name] = partial(_read_dense, checkpoint, name)
    return _unstack(checkpoint, found)


def read_packed(folder: Path) -> dict[str, Any]:
    """Returns path -> what a packed weight is made of; {} where all were unpacked."""
    return read_json(folder / "flax_weights.json")


def read_inputs(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Returns the path of each weight that rounds what it reads, blocks one by one, -> how."""
    found = {
        kernel_path(path): partial(_read_grid, said["input_grid"])
        for path, said in read_packed(folder).items()
        if "input_grid" in said
    }
    return {path: read() for path, read in _unstack(Checkpoint.open(folder), found).items()}


def _read_grid(said: Mapping[str, Any], layer: Any) -> Mapping[str, Any]:
    return said


def _unstack(checkpoint: Checkpoint, found: Mapping[str, Callable]) -> dict[str, Callable]:
    """Renames 'blocks/<segment>/...' by the number of the block, over all segments."""
    first, named = 0, {}
    stacked = [name for name in checkpoint.names() if name.startswith("blocks/")]
    segments = sorted({int(name.split("/")[1]) for name in stacked})
    for segment in segments:
        inside = [path for path in found if path.startswith(f"blocks/{segment}/")]
        layers = {checkpoint.shape(name)[0] for name in stacked
                  if name.startswith(f"blocks/{segment}/")}  # fmt: skip
        if len(layers) != 1:
            raise InputError(f"{checkpoint.folder}: segment {segment} stacks {sorted(layers)}")
        count = layers.pop()
        for path in inside:
            rest = path.split("/", 2)[2]
            for layer in range(count):
                named[f"blocks/{first + layer}/{rest}"] = partial(found[path], layer)
        first += count
    return named | {p: partial(t, ...) for p, t in found.items() if not p.startswith("blocks/")}


def _read_dense(checkpoint: Checkpoint, name: str, layer: Any) -> np.ndarray:
    return checkpoint.read(name)[layer].astype(np.float32)


def _read_packed(checkpoint: Checkpoint, path: str, said: Mapping, layer: Any) -> np.ndarray:
    """Returns one packed weight, `layer` of its stack, dense and float32."""

    def array(name: str) -> np.ndarray | None:
        stored = f"{path}/{name}" in checkpoint.entries
        return checkpoint.read(f"{path}/{name}")[layer] if stored else None

    try:
        return operators.read_weight(said, array)
    except operators.UnknownFormatError as error:
        raise InputError(f"{path}: {error}") from error
