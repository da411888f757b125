"""Reads the operators of a packed weight in numpy, from their description and equations alone.

A weight is base, then transforms, then corrections. Codes lie in runs of 32 along d_in, a run's in
`bits` words: one stream of bits a column. Nothing here is shared with what wrote them but
constants: the points of the tables and the Hadamard matrices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lqec_jax.io.verify.bits import read_codes
from lqec_kernels.hadamard import build
from lqec_kernels.lattice import e8p_patterns
from lqec_kernels.tables import find_points

# Array's name within the weight -> the array, or None where there is no such array.
Arrays = Callable[[str], np.ndarray | None]


class UnknownFormatError(ValueError):
    """An operator that is not read here."""


def read_weight(said: Mapping[str, Any], array: Arrays) -> np.ndarray:
    """Returns a weight, [d_in, d_out], dense and float32.

    w = M_in base M_out + Σ correction, with transforms x ↦ x M.

    Raises:
      UnknownFormatError: an operator that is not read here.
    """
    w = read_base(said["base"], array, "base")
    if said["input_transform"] is not None:
        transform = _find(TRANSFORMS, said["input_transform"], "input_transform")
        w = transform(said["input_transform"], array, "input_transform", w)
    if said["output_transform"] is not None:
        transform = _find(TRANSFORMS, said["output_transform"], "output_transform")
        # w M = (Mᵀ wᵀ)ᵀ, and Mᵀ is what a transform does to the rows of a weight when transposed.
        w = transform(said["output_transform"], array, "output_transform", w.T, transpose=True).T
    for number, correction in enumerate(said["corrections"]):
        place = f"corrections/{number}"
        w = w + _find(CORRECTIONS, correction, place)(correction, array, place)
    return w


def read_base(said: Mapping[str, Any], array: Arrays, place: str) -> np.ndarray:
    """Returns a base, dense and float32; bases around other bases call it for what is inside."""
    return _find(BASES, said, place)(said, array, place)


def _find(table: Mapping[str, Callable], said: Mapping[str, Any], place: str) -> Callable:
    if said["format"] not in table:
        raise UnknownFormatError(f"{place} {said['format']!r} is not read here")
    return table[said["format"]]


def _dense(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    return array(f"{place}/w").astype(np.float32)


def _affine(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    """w[i, o] = scales[g, o] (code[i, o] - zero[g, o]), g = i // group_size."""
    bits, group = said["bits"], np.arange(said["d_in"]) // said["group_size"]
    codes = read_codes(array(f"{place}/codes"), bits, said["d_in"])
    scales = array(f"{place}/scales").astype(np.float32)  # [groups, d_out], or [1, 1]
    zeros = array(f"{place}/zeros")
    if zeros is None:
        zeros = np.full(scales.shape, 2.0 ** (bits - 1), np.float32)
    elif zeros.dtype == np.uint32:
        zeros = read_codes(zeros.T, bits, codes.shape[1]).T
    return scales[group] * (codes - zeros.astype(np.float32)[group]).astype(np.float32)


def _codebook(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    """w[i, o] = scale[i // group_size, o] · level(code[i // dim, o])[i % dim]."""
    bits, d_in = said["bits"], said["d_in"]
    words, levels = array(f"{place}/codes"), array(f"{place}/levels")
    if levels is not None:
        w = np.take_along_axis(levels.astype(np.float32), read_codes(words, bits, d_in), axis=0)
    else:
        points = find_points(said["table"]) if said["table"] != "e8p" else _e8p_points()
        codes = read_codes(words, bits, -(-d_in // points.shape[1]))
        w = points[codes].transpose(0, 2, 1)  # [codes, dim, d_out]
        w = w.reshape(-1, w.shape[-1])[:d_in]  # [d_in, d_out]
    if "scales" in said:
        scales = _double_scales(array, f"{place}/scales")
    else:
        scales = array(f"{place}/scales")
    if scales is None:
        return w
    return scales.astype(np.float32)[np.arange(d_in) // said["group_size"]] * w


def _double_scales(array: Arrays, place: str) -> np.ndarray:
    """scale[g, o] = mean + absmax[(o · groups + g) // 256] · level(code[g, o])."""
    codes, absmax, mean = (array(f"{place}/{name}") for name in ("codes", "absmax", "mean"))
    block = np.arange(codes.size).reshape(codes.T.shape).T // 256
    return mean + absmax[block] * find_points("dynamic")[codes, 0]


def _e8p_points() -> np.ndarray:
    """Returns all 65536 points: signed patterns with an even sum, a quarter up or down."""
    code = np.arange(2**16)
    size = e8p_patterns()[code >> 8]  # [codes, 8]
    points = np.where(code[:, None] >> np.arange(1, 9) & 1, -size, size)
    points[:, 7] = size[:, 7]
    points[points.sum(axis=1) % 2 != 0, 7] *= -1
    return points + np.where(code & 1, -0.25, 0.25).astype(np.float32)[:, None]


def _sum(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    return sum(read_base(said[name], array, f"{place}/{name}") for name in ("first", "second"))


def _masked(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    w = read_base(said["inner"], array, f"{place}/inner")
    keep = read_codes(array(f"{place}/mask"), 1, len(w))
    return np.where(keep == 1, w, np.float32(0))


def _sparse24(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    """w[4 (i // 2) + places[i, o], o] = inner[i, o]."""
    inner = read_base(said["inner"], array, f"{place}/inner")
    places = read_codes(array(f"{place}/positions"), 2, len(inner)).astype(np.int64)
    rows = 4 * (np.arange(len(inner)) // 2)[:, None] + places
    w = np.zeros((2 * len(inner), inner.shape[1]), np.float32)
    np.put_along_axis(w, rows, inner, axis=0)
    return w


def _bit_planes(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    """w[i, o] = shifts[g, o] + Σ_p alphas[p, g, o] B_p[i, o], g = i // group_size."""
    bits, d_in = said["bits"], said["d_in"]
    words, alphas, shifts = (array(f"{place}/{name}") for name in ("planes", "alphas", "shifts"))
    group = np.arange(d_in) // said["group_size"]
    w = np.zeros((d_in, words.shape[1]), np.float32)
    for plane in range(bits):
        signs = 2.0 * read_codes(words[plane::bits], 1, d_in) - 1
        w += signs * alphas[plane % len(alphas)].astype(np.float32)[group]
    return w if shifts is None else w + shifts.astype(np.float32)[group]


def _outliers(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    w = np.zeros(said["d_in"] * said["d_out"], np.float32)
    np.add.at(w, array(f"{place}/places"), array(f"{place}/values").astype(np.float32))
    return w.reshape(said["d_in"], said["d_out"])


def _low_rank(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    """w[i, o] = Σ_k a[i // pool, k] b[k, o] / pool."""
    a, b = (array(f"{place}/{name}").astype(np.float64) for name in "ab")
    pool = said.get("pool", 1)  # not said where there was none yet
    return (np.repeat(a, pool, axis=0) @ b / pool).astype(np.float32)


def _quantized_low_rank(said: Mapping, array: Arrays, place: str) -> np.ndarray:
    """a bᵀ, of which each is an affine base."""
    a, b = (_affine(said[name], array, f"{place}/{name}").astype(np.float64) for name in "ab")
    return (a @ b.T).astype(np.float32)


def _channel_scale(
    said, array: Arrays, place: str, w: np.ndarray, *, transpose=False
) -> np.ndarray:
    """diag(scale) w, which is its own transpose."""
    return array(f"{place}/scale").astype(np.float32)[:, None] * w


def _hadamard(said, array: Arrays, place: str, w: np.ndarray, *, transpose=False) -> np.ndarray:
    """S (I ⊗ H) w, or with `inverse` (I ⊗ Hᵀ) S w, which is also the transpose of the former."""
    size, block = said["size"], said["block"]
    signs = 2.0 * read_codes(array(f"{place}/signs")[:, None], 1, size) - 1  # [size, 1]
    h = build(block) / np.sqrt(block)

    def mix(h: np.ndarray, w: np.ndarray) -> np.ndarray:
        blocks = w.astype(np.float64).reshape(-1, block, w.shape[-1])  # [blocks, block, d_out]
        return (h @ blocks).reshape(w.shape)  # [d_in, d_out]

    mixed = mix(h.T, signs * w) if said["inverse"] != transpose else signs * mix(h, w)
    return mixed.astype(np.float32)


BASES: dict[str, Callable] = {
    "dense": _dense,
    "affine": _affine,
    "codebook": _codebook,
    "sum": _sum,
    "bit_planes": _bit_planes,
    "masked": _masked,
    "sparse24": _sparse24,
}
CORRECTIONS: dict[str, Callable] = {
    "low_rank": _low_rank,
    "quantized_low_rank": _quantized_low_rank,
    "outliers": _outliers,
}
# (said, array, place, w, transpose) -> M w, or Mᵀ w.
TRANSFORMS: dict[str, Callable] = {"channel_scale": _channel_scale, "hadamard": _hadamard}
