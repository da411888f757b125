"""The compressed-tensors export, format `pack-quantized`: what transformers and vLLM load.

w[o, i] = weight_scale[o, group] · (q[o, i] - zero[o, group]) with signed codes, stored as
q + 2^(bits-1): our unsigned codes as they are. A linear's codes are one little-endian stream of
bits a row (3, 5, 6 and 7 bits need compressed-tensors 0.18 or later; its older versions left gaps).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.exports.integer_weights import (
    as_words,
    cast_scales,
    is_packed,
    read_affine,
    read_scales,
)
from lqec_jax.io.exports.walk import Placed, to_stored, walk, write_config
from lqec_jax.io.tensor_file import write_weights
from lqec_jax.models.model import Model
from lqec_kernels.formats import Affine

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
FORMAT = "pack-quantized"
ASYMMETRIC = (
    "asymmetric weights are for vLLM: transformers with compressed-tensors 0.18 to 0.20 refuses "
    "their zeros; symmetric ones, as of rtn(symmetric=True), load in both"
)


def write(model: Model, folder: Path, dtype: np.dtype | None) -> list[str]:
    """Writes the folder; linears that are dense stay dense and are listed as ignored.

    Raises:
      InputError: a linear that the format cannot hold; none that is packed.
    """
    groups, ignored = _find_grids(model)
    # transformers may unpack in the scales' dtype; in float32 nothing is rounded then.
    exact = model.params["embed"]["embedding"].dtype == np.float32
    scales = dtype or (np.dtype(np.float32) if exact else None)
    tensors = (named for placed in walk(model) for named in _stored(placed, dtype, scales))
    write_weights(folder, tensors)
    write_config(model, folder, dtype, make_config(groups, ignored))
    notes = [ASYMMETRIC] if any(not symmetric for _, _, symmetric in groups) else []
    if any(32 % bits for bits, _, _ in groups):
        notes.append("codes that straddle words are read by compressed-tensors 0.18 and later")
    return notes


def pack_linear(base: Affine) -> dict[str, np.ndarray]:
    """Returns a linear's tensors.

    weight_packed int32 [d_out, ceil(d_in·bits/32)], weight_scale [d_out, groups],
    weight_shape int64 [2], and for an asymmetric grid weight_zero_point int32
    [ceil(d_out·bits/32), groups], packed along the output.
    """
    tensors = {
        "weight_packed": as_words(base.codes, base.d_in, base.bits).T,
        "weight_scale": read_scales(base).T,
        "weight_shape": np.array([base.d_out, base.d_in], np.int64),
    }
    if base.zeros is not None:
        tensors["weight_zero_point"] = as_words(base.zeros.T, base.d_out, base.bits)
    return tensors


def make_config(groups: dict[tuple, list[str]], ignored: list[str]) -> dict[str, Any]:
    """Returns the quantization_config: a scheme for each grid, by class where there is one."""
    schemes = {}
    for number, (grid, modules) in enumerate(groups.items()):
        bits, group_size, symmetric = grid
        schemes[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else modules,
            "format": FORMAT,
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if group_size is None else "group",
                "group_size": group_size,
                "dynamic": False,
                "actorder": None,
                "observer": "minmax",
                "observer_kwargs": {},
                "block_structure": None,
            },
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        # A tied head has no tensor of its own, but is a Linear all the same.
        "ignore": sorted({*ignored, "lm_head"}),
        "config_groups": schemes,
    }


def _find_grids(model: Model) -> tuple[dict[tuple, list[str]], list[str]]:
    """Returns (bits, group size, symmetry) -> modules, and the linears that are dense.

    The group size is None where every linear's group is its whole row.
    """
    bases: dict[str, Affine] = {}
    ignored: list[str] = []
    for placed in walk(model):
        if is_packed(placed):
            bases[placed.module] = read_affine(placed, "compressed-tensors", WIDTHS)
        elif placed.stored.transposed:
            ignored.append(placed.module)
    if not bases:
        raise InputError("export: no weight is packed; export a dense model as hf")
    whole_rows = all(base.group_size == base.d_in for base in bases.values())
    groups: dict[tuple, list[str]] = {}
    for module, base in bases.items():
        size = None if whole_rows else base.group_size
        groups.setdefault((base.bits, size, base.zeros is None), []).append(module)
    return groups, ignored


def _stored(
    placed: Placed, dtype: np.dtype | None, scales: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    if not is_packed(placed):
        yield placed.stored.name, to_stored(placed, dtype)
        return
    base = read_affine(placed, "compressed-tensors", WIDTHS)
    for name, array in pack_linear(base).items():
        floating = cast_scales(array, scales, placed.path) if name == "weight_scale" else array
        yield f"{placed.module}.{name}", floating
