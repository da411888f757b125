"""The adapter export: low-rank corrections as a PEFT LoRA folder over the base without them.

PEFT adds (lora_alpha / r) · B A x with A [r, d_in], B [d_out, r]; ours is x a b, so A = aᵀ, B = bᵀ
and alpha = r; a pooled adapter is written as one that reads every input, which PEFT knows only. The
base is what `export` writes with base_only; transforms are part of it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lqec_jax.core.tree import is_compressed
from lqec_jax.errors import InputError
from lqec_jax.io.exports.record import hash_base, read_record
from lqec_jax.io.exports.walk import Placed, cast, walk
from lqec_jax.io.files import write_json, write_tensors
from lqec_jax.models.model import Model
from lqec_kernels.formats import LowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
UNNAMED = "the base is this model's export with --base-only; --base names it in the config"
DEQUANTIZE = (
    "PEFT wants to see the base's weights: in transformers, run it once before adding the adapter, "
    "or load it with CompressedTensorsConfig(dequantize=True) where all linears have one grid"
)


def write(
    model: Model, folder: Path, dtype: np.dtype | None, *, base: str | Path | None = None
) -> list[str]:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
      base: the exported folder that the adapter belongs to.
    Raises:
      InputError: there is no adapter; a correction is not of low rank; `base` is not the exported
        base of this model.
    """
    notes = [UNNAMED] if base is None else _check_base(model, Path(base))
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    modules: list[str] = []
    for placed in walk(model):
        if placed.stored.transposed:
            modules.append(placed.module)
        if not is_compressed(placed.value) or not placed.value.corrections:
            continue
        a, b = _factors(placed)
        ranks[placed.module] = a.shape[1]
        name = f"{PREFIX}{placed.module}"
        tensors[f"{name}.lora_A.weight"] = cast(a.T, dtype, placed.path)
        tensors[f"{name}.lora_B.weight"] = cast(b.T, dtype, placed.path)
    if not ranks:
        raise InputError(
            "export: the model has no low-rank corrections for peft to hold; export it as hf, or "
            "compress with a step that adds some, as svd"
        )
    write_tensors(folder / WEIGHTS, tensors, made_by="pt")
    named = None if base is None else str(Path(base))
    write_json(folder / CONFIG, make_config(ranks, modules, named))
    return notes


def make_config(ranks: Mapping[str, int], modules: Sequence[str], base: str | None) -> dict:
    """Returns adapter_config.json.

    Args:
      ranks: module name -> its adapter's rank.
      modules: every linear of the model, with an adapter or without.
      base: folder or id of the base.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes a key for a regular expression, and the first that fits.
    other = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": _targets(ranks, modules),
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _targets(ranks: Mapping[str, int], modules: Sequence[str]) -> list[str]:
    """Returns the last words of the modules where those say it, 'q_proj', else their full names."""
    words = {name.rpartition(".")[2] for name in ranks}
    meant = {name for name in modules if name.rpartition(".")[2] in words}
    return sorted(words) if meant == set(ranks) else sorted(ranks)


def _factors(placed: Placed) -> tuple[np.ndarray, np.ndarray]:
    """Returns a [d_in, r] and b [r, d_out]; several corrections are one of their ranks' sum."""
    adapters = [correction.factors() for correction in placed.value.corrections]
    if None in adapters:
        strange = placed.value.corrections[adapters.index(None)]
        raise InputError(
            f"export: {placed.path} has a {type(strange).__name__} correction, which peft "
            "cannot hold; export it as hf, where it is folded in"
        )
    factors = [_expand(adapter) for adapter in adapters]
    a = np.concatenate([a for a, _ in factors], axis=1)
    return a, np.concatenate([b for _, b in factors], axis=0)


def _expand(correction: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """Returns a and b, a with a row an input; in its own dtype where that rounds nothing."""
    whole = correction.expanded()
    a, stored = np.asarray(whole.a), np.asarray(correction.a).dtype
    exact = np.array_equal(a.astype(stored).astype(a.dtype), a)
    return a.astype(stored) if exact else a, np.asarray(whole.b)


def _check_base(model: Model, base: Path) -> list[str]:
    """Returns what the reader of this base should know."""
    record = read_record(base)
    wanted = hash_base(model.params)
    if record["base_sha256"] != wanted:
        raise InputError(
            f"export: {base} was exported from another base (sha256 {record['base_sha256'][:12]}, "
            f"this model's is {wanted[:12]}); export this model's with --base-only"
        )
    if not record.get("base_only"):
        raise InputError(f"export: {base} has the adapters folded in; export it with --base-only")
    return [DEQUANTIZE] if record["format"] == "compressed-tensors" else []
