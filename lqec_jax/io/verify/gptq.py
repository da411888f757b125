"""Reads GPTQ folders: w[o, i] = scales[g_idx[i], o] (code[i, o] - zero[g_idx[i], o])."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.sources.hf import Checkpoint
from lqec_jax.io.verify.bits import read_codes
from lqec_jax.io.verify.dense import read_beside

PARTS = ("qweight", "qzeros", "scales", "g_idx")
STORED_LESS = {"gptq": 1, "gptq_v2": 0}  # by how much a stored zero is too small


def read(folder: Path, record: Mapping[str, Any]) -> dict[str, Callable[[], np.ndarray]]:
    """Returns each weight's name -> what unpacks it, and what is dense beside them."""
    checkpoint = Checkpoint.open(folder)
    said = checkpoint.config.get("quantization_config", {})
    if said.get("quant_method") != "gptq" or said.get("checkpoint_format") not in STORED_LESS:
        raise InputError(f"{folder}/config.json: its quantization_config is not gptq's")
    return read_beside(checkpoint, PARTS, lambda m: partial(_read, checkpoint, m, said))


def _read(checkpoint: Checkpoint, module: str, said: Mapping[str, Any]) -> np.ndarray:
    words, zero_words, scales, groups = (checkpoint.read(f"{module}.{part}") for part in PARTS)
    bits, d_in, d_out = said["bits"], len(groups), words.shape[1]
    codes = read_codes(words, bits, d_in)  # [d_in, d_out]
    zeros = read_codes(zero_words.T, bits, d_out).T  # [groups, d_out]
    zeros = zeros + STORED_LESS[said["checkpoint_format"]]
    w = scales.astype(np.float32)[groups] * (codes - zeros[groups]).astype(np.float32)
    return w.T
