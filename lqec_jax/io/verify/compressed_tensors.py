"""Reads pack-quantized folders: w[o, i] = weight_scale[o, g] (q[o, i] - zero[o, g]), q signed."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.verify.bits import read_codes
from lqec_jax.io.verify.dense import read_beside

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns each weight's name -> what unpacks it, and what is dense beside them."""
    checkpoint = Checkpoint.open(folder)
    said = checkpoint.config.get("quantization_config", {})
    if said.get("format") != "pack-quantized":
        raise InputError(f"{folder}/config.json: its quantization_config is not pack-quantized")

    def open_packed(module: str) -> Callable[[], np.ndarray]:
        return partial(_read, checkpoint, module, _find_scheme(folder, said, module))

    return read_beside(checkpoint, PARTS, open_packed)


def _find_scheme(folder: Path, said: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Returns the one scheme whose targets name a module, by class, in full or by a pattern."""
    fitting = [
        group["weights"]
        for group in said["config_groups"].values()
        if any(_names(target, module) for target in group["targets"])
    ]
    if len(fitting) != 1 or module in said["ignore"]:
        raise InputError(f"{folder}/config.json: {len(fitting)} schemes name {module}; wanted one")
    return fitting[0]


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in ("Linear", module)


def _read(checkpoint: Checkpoint, module: str, scheme: Mapping[str, Any]) -> np.ndarray:
    bits = scheme["num_bits"]
    d_out, d_in = (int(size) for size in checkpoint.read(f"{module}.weight_shape"))
    stored = read_codes(checkpoint.read(f"{module}.weight_packed").T, bits, d_in).T
    signed = stored - 2 ** (bits - 1)  # [d_out, d_in]
    scales = checkpoint.read(f"{module}.weight_scale").astype(np.float32)  # [d_out, groups]
    group = np.arange(d_in) // (scheme["group_size"] or d_in)
    if not scheme["symmetric"]:
        words = checkpoint.read(f"{module}.weight_zero_point")
        zeros = read_codes(words, bits, d_out) - 2 ** (bits - 1)  # [d_out, groups]
        signed = signed - zeros[:, group]
    return scales[:, group] * signed.astype(np.float32)
