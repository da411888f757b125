"""Reads flax folders: a nested dict of arrays, names joined by '/', blocks stacked.

A packed weight's codes lie in runs of 32 along d_in, a run's in `bits` words: one stream of bits a
column. w[i, o] = scales[g, o] (code[i, o] - zero[g, o]), g = i // group_size; then transforms, then
corrections. Names and orientation are ours: 'blocks/3/attn/q/kernel', [d_in, d_out].
Transforms are x ↦ x diag(scale): of the input they scale rows, of the output columns.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.hf import Checkpoint, read_json
from lqec_jax.io.readers.bits import read_codes

PARTS = ("base", "corrections", "input_transform", "output_transform")


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns each parameter's path, blocks one by one, -> what unpacks it."""
    checkpoint = Checkpoint.open(folder)
    weights = read_json(folder / "flax_weights.json")
    found: dict[str, Callable] = {
        f"{path}/kernel": partial(_read_packed, checkpoint, path, said)
        for path, said in weights.items()
    }
    for name in checkpoint.names():
        if not any(name.startswith(f"{path}/{part}/") for path in weights for part in PARTS):
            found[name] = partial(_read_dense, checkpoint, name)
    return _unstack(checkpoint, found)


def _unstack(checkpoint: Checkpoint, found: Mapping[str, Callable]) -> dict[str, Callable]:
    """Renames 'blocks/<segment>/...' by the number of the block, over all segments."""
    first, named = 0, {}
    segments = sorted({int(path.split("/")[1]) for path in found if path.startswith("blocks/")})
    for segment in segments:
        inside = [path for path in found if path.startswith(f"blocks/{segment}/")]
        layers = {checkpoint.shape(name)[0] for name in checkpoint.names()
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

    def array(name: str) -> np.ndarray:
        return checkpoint.read(f"{path}/{name}")[layer]

    w = _base(checkpoint, path, said["base"], array)
    for place in ("input_transform", "output_transform"):
        if said[place] is not None:
            if said[place]["format"] != "channel_scale":
                raise InputError(f"{path}: {place} {said[place]['format']!r} is not read here")
            scale = array(f"{place}/scale").astype(np.float32)
            w = scale[:, None] * w if place == "input_transform" else w * scale
    for number, correction in enumerate(said["corrections"]):
        if correction["format"] != "low_rank":
            raise InputError(f"{path}: correction {correction['format']!r} is not read here")
        a, b = (array(f"corrections/{number}/{name}").astype(np.float64) for name in "ab")
        w = w + (a @ b).astype(np.float32)
    return w


def _base(checkpoint: Checkpoint, path: str, said: Mapping, array: Callable) -> np.ndarray:
    if said["format"] == "dense":
        return array("base/w").astype(np.float32)
    if said["format"] != "affine":
        raise InputError(f"{path}: base {said['format']!r} is not read here")
    bits, group = said["bits"], np.arange(said["d_in"]) // said["group_size"]
    codes = read_codes(array("base/codes"), bits, said["d_in"])
    scales = array("base/scales").astype(np.float32)  # [groups, d_out]
    zeros = np.full(scales.shape, 2.0 ** (bits - 1), np.float32)
    if f"{path}/base/zeros" in checkpoint.entries:
        zeros = array("base/zeros")
        if zeros.dtype == np.uint32:
            zeros = read_codes(zeros.T, bits, scales.shape[1]).T
    return scales[group] * (codes - zeros.astype(np.float32)[group]).astype(np.float32)
