"""Reads LoRA adapters: w[o, i] += (alpha / r) Σ_k B[o, k] A[k, i]."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.files import read_json
from lqec_jax.io.tensor_file import TensorEntry, read_entry, read_header

KEY = re.compile(r"base_model\.model\.(.+)\.lora_A\.weight")


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns each adapted weight's name -> what gives the matrix that is added to it."""
    said = read_json(folder / "adapter_config.json")
    entries = read_header(folder / "adapter_model.safetensors")
    found = {}
    for name in entries:
        half_a = name.replace(".lora_B.", ".lora_A.")
        fits = KEY.fullmatch(half_a)
        if fits is None or half_a not in entries:
            raise InputError(f"{folder}: {name} is no half of an adapter")
        if name != half_a:
            continue
        module = fits.group(1)
        if not _is_target(said, module):
            raise InputError(f"{folder}/adapter_config.json: no target names {module}")
        found[f"{module}.weight"] = partial(_read, entries, name, _factor(said, module))
    return found


def _read(entries: Mapping[str, TensorEntry], name: str, factor: Callable) -> np.ndarray:
    a = read_entry(entries[name]).astype(np.float64)  # [r, d_in]
    b = read_entry(entries[name.replace(".lora_A.", ".lora_B.")]).astype(np.float64)  # [d_out, r]
    return (factor(len(a)) * (b @ a)).astype(np.float32)


def _is_target(said: Mapping[str, Any], module: str) -> bool:
    return any(module == t or module.endswith(f".{t}") for t in said["target_modules"])


def _factor(said: Mapping[str, Any], module: str) -> Callable[[int], float]:
    """Returns what checks an adapter's rank and gives its factor, alpha over rank."""
    rank = _by_pattern(said["rank_pattern"], module, said["r"])
    alpha = _by_pattern(said["alpha_pattern"], module, said["lora_alpha"])

    def factor(stored: int) -> float:
        if stored != rank:
            raise InputError(f"adapter_config.json: {module} has rank {rank}, its file {stored}")
        return alpha / (rank**0.5 if said["use_rslora"] else rank)

    return factor


def _by_pattern(patterns: Mapping[str, int], module: str, default: int) -> int:
    fits = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    return next(fits, default)
