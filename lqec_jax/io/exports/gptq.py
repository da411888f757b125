"""The GPTQ export: qweight, qzeros, scales, g_idx, as AutoGPTQ (v1) and GPTQModel (v2) read them.

w[o, i] = scales[g_idx[i], o] · (code[i, o] - zero[g_idx[i], o]); codes are packed along the input,
zeros along the output. Version 1 stores zeros less one, so it has no place for a zero of 0.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lqec_jax.errors import InputError
from lqec_jax.io.exports.integer_weights import (
    as_words,
    cast_scales,
    describe_wide,
    is_packed,
    pack_rows,
    read_affine,
    read_scales,
    read_zeros,
)
from lqec_jax.io.exports.walk import Placed, to_stored, walk, write_config
from lqec_jax.io.files import write_json
from lqec_jax.io.tensor_file import write_weights
from lqec_jax.models.model import Model
from lqec_kernels.formats import Affine

WIDTHS = (2, 3, 4, 8)
CHECKPOINT_FORMATS = {1: "gptq", 2: "gptq_v2"}
STORED_LESS = {1: np.uint8(1), 2: np.uint8(0)}  # what is taken off a zero
CONFIG = "quantize_config.json"


def write(
    model: Model, folder: Path, dtype: np.dtype | None, *, gptq_version: int = 1
) -> list[str]:
    """Writes the folder that GPTQModel and vLLM read.

    Args:
      gptq_version: 1 stores zeros less one, 2 as they are.
    Raises:
      InputError: a linear that GPTQ cannot hold; linears of two widths, group sizes or symmetries;
        a zero of 0 in version 1.
    """
    if gptq_version not in CHECKPOINT_FORMATS:
        raise InputError(f"export: gptq_version={gptq_version!r}; 1 or 2 was wanted")
    bits, group_size, symmetric = _find_grid(model)
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": CHECKPOINT_FORMATS[gptq_version],
        "pack_dtype": "int32",
        "true_sequential": True,
        "static_groups": False,
        "meta": {"quantizer": ["lqec-jax"]},
    }
    tensors = (named for placed in walk(model) for named in _stored(placed, gptq_version, dtype))
    write_weights(folder, tensors)
    write_config(model, folder, dtype, quantization)
    write_json(folder / CONFIG, quantization)
    bases = (read_affine(placed, "gptq", WIDTHS) for placed in walk(model) if is_packed(placed))
    return _notes(bits, symmetric, gptq_version) + describe_wide("gptq", bases)


def pack_linear(base: Affine, version: int, path: str) -> dict[str, np.ndarray]:
    """Returns a linear's tensors.

    qweight int32 [d_in·bits/32, d_out], qzeros int32 [groups, d_out·bits/32], scales as stored
    [groups, d_out], g_idx int32 [d_in].
    """
    zeros = read_zeros(base)
    if version == 1 and not zeros.all():
        raise InputError(
            f"export: {path} has {int((zeros == 0).sum())} zeros of 0, which gptq version 1 "
            "stores as -1; add --gptq-version 2"
        )
    zeros = zeros - STORED_LESS[version]
    return {
        "qweight": as_words(base.codes, base.d_in, base.bits),
        "qzeros": pack_rows(zeros.T, base.bits).T,
        "scales": read_scales(base),
        "g_idx": np.arange(base.d_in, dtype=np.int32) // base.group_size,
    }


def _stored(
    placed: Placed, version: int, dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    if not is_packed(placed):
        yield placed.stored.name, to_stored(placed, dtype)
        return
    base = read_affine(placed, "gptq", WIDTHS)
    for name, array in pack_linear(base, version, placed.path).items():
        floating = cast_scales(array, dtype, placed.path) if name == "scales" else array
        yield f"{placed.module}.{name}", floating


def _find_grid(model: Model) -> tuple[int, int, bool]:
    """Returns the bits, the group size (-1 for whole rows) and the symmetry of all linears."""
    grids: dict[tuple[int, int, bool], str] = {}
    whole_rows = True
    for placed in walk(model):
        if not placed.stored.transposed or not placed.path.startswith("blocks/"):
            continue
        if not is_packed(placed):
            raise InputError(
                f"export: {placed.path} is dense, and gptq wants every linear of a block packed; "
                "export it as compressed-tensors or hf"
            )
        base = read_affine(placed, "gptq", WIDTHS)
        if base.d_in % 32 or base.d_out % 32:
            raise InputError(
                f"export: {placed.path} is [{base.d_in}, {base.d_out}], and gptq packs multiples "
                "of 32; export it as compressed-tensors or hf"
            )
        whole_rows &= base.group_size == base.d_in
        grids.setdefault((base.bits, base.group_size, base.zeros is None), placed.path)
    if whole_rows:
        grids = {(bits, -1, sym): path for (bits, _, sym), path in grids.items()}
    if len(grids) > 1:
        (one, path), (other, second) = list(grids.items())[:2]
        raise InputError(
            f"export: {path} has {_in_words(one)}, {second} has {_in_words(other)}, and gptq has "
            "one grid for all; export it as compressed-tensors or hf"
        )
    return next(iter(grids))


def _in_words(grid: tuple[int, int, bool]) -> str:
    bits, group_size, symmetric = grid
    return f"{bits} bits in groups of {group_size}, {'' if symmetric else 'a'}symmetric"


def _notes(bits: int, symmetric: bool, version: int) -> list[str]:
    if version == 1 and not symmetric:
        return ["asymmetric version 1 is read by GPTQModel; vLLM takes symmetric 4 and 8 bits only"]
    if bits in (2, 3) or not symmetric:
        return ["vLLM's own gptq takes symmetric 4 and 8 bits only; GPTQModel reads this folder"]
    return []
