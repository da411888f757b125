"""Tables of points that codes stand for, by name, with the way there and back.

name                    dim  bits  points
nf2 nf3 nf4               1   2-4  NormalFloat: quantiles of a normal, ends at ±1, zero among them
dynamic                   1     8  signed decades, each cut evenly; for scales of scales
gauss1 .. gauss4          1   1-4  the least squared error for N(0, 1)
gauss2_p2 .. gauss4_p2    2   4-8  the same for pairs: 2, 3 or 4 bits a weight
e8p                       8    16  see `lattice`
e8                        8     8  see `lattice`
"""

import json
from collections.abc import Callable
from functools import cache, partial
from importlib import resources
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lqec_kernels import lattice


class Table(NamedTuple):
    """Points and their codes.

    Attributes:
      dim: numbers in a point.
      bits: width of a code.
      decode: unsigned codes [..., n, columns] -> points, float32 [..., n, dim, columns].
      encode: floating [..., n, dim, columns] -> codes of the nearest points, uint32
        [..., n, columns]; of two equally near a scalar goes to the lower.
    """

    dim: int
    bits: int
    decode: Callable
    encode: Callable


# float32 values that QLoRA's NF4 is known by; the formula of `_normal_float` gives them to 5e-8.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


# Scores that are held at a time while vectors are compared with all points of a table.
SCORES = 2**22


@cache
def find_table(name: str) -> Table:
    """Returns a table; see `find_points` for what it raises."""
    if name == "e8p":
        return Table(8, 16, lattice.decode_e8p, _by_rows(lattice.encode_e8p, lattice.PATTERNS))
    points = find_points(name)
    return _scalar_table(points[:, 0]) if points.shape[1] == 1 else _vector_table(points)


def find_points(name: str) -> np.ndarray:
    """Returns a table's points in the order of their codes, float32 [codes, dim]; not e8p's.

    Raises:
      ValueError: no such table; names those there are.
    """
    if name not in POINTS:
        raise ValueError(f"no table {name!r}; there are {', '.join(sorted([*POINTS, 'e8p']))}")
    points = np.asarray(POINTS[name](), np.float32)
    return np.sort(points)[:, None] if points.ndim == 1 else points


def _scalar_table(levels: np.ndarray) -> Table:
    """Makes the table of sorted levels; a number half way between two goes to the lower."""
    middles = (levels[1:] + levels[:-1]) / 2

    def decode(codes: jax.Array) -> jax.Array:
        return jnp.asarray(levels)[codes.astype(jnp.int32)][..., None, :]

    def encode(points: jax.Array) -> jax.Array:
        place = jnp.searchsorted(jnp.asarray(middles), points[..., 0, :], method="compare_all")
        return place.astype(jnp.uint32)

    return Table(1, (len(levels) - 1).bit_length(), decode, encode)


def _vector_table(points: np.ndarray) -> Table:
    """Makes the table of points [codes, dim], in their order."""
    count, dim = points.shape

    def decode(codes: jax.Array) -> jax.Array:
        index = codes.astype(jnp.int32)
        return jnp.stack([jnp.asarray(axis)[index] for axis in points.T], axis=-2)

    def nearest(y: jax.Array) -> jax.Array:
        half_norm = np.sum(points**2, axis=1)[:, None] / 2
        near = jnp.matmul(points, y, precision="highest") - half_norm  # [codes, columns]
        return jnp.argmax(near, axis=0).astype(jnp.uint32)

    return Table(dim, (count - 1).bit_length(), decode, _by_rows(nearest, count))


def _by_rows(nearest: Callable, count: int) -> Callable:
    """Makes an `encode` of (float32 [dim, columns]) -> codes [columns], a few rows at a time."""

    def encode(points: jax.Array) -> jax.Array:
        *lead, dim, columns = points.shape
        rows = points.astype(jnp.float32).reshape(-1, dim, columns)  # [n, dim, columns]
        together = max(1, SCORES // (count * columns))
        if len(rows) <= together:
            return jax.vmap(nearest)(rows).reshape(*lead, columns)
        return jax.lax.map(nearest, rows, batch_size=together).reshape(*lead, columns)

    return encode


def _normal_float(bits: int) -> list[float]:
    """Returns the levels of NormalFloat (Dettmers et al. 2023, arXiv:2305.14314).

    Quantiles at even steps of probability from the outermost to the half, 2^(b-1) above zero and
    one fewer below, and zero; divided by the largest.
    """
    half, outermost = 2 ** (bits - 1), 0.9677083  # QLoRA writes 1 - (1/32 + 1/30)/2 so

    def quantiles(count: int) -> list[float]:
        steps = np.linspace(outermost, 0.5, count + 1)[:-1]
        return [NormalDist().inv_cdf(step) for step in steps]

    levels = [-q for q in quantiles(half - 1)] + [0.0] + quantiles(half)
    return [level / max(levels) for level in levels]


def _dynamic() -> list[float]:
    """Returns the 8-bit dynamic map: 2^i numbers a sign in the decade that ends at 10^(i-6).

    They are the middles of 2^i even parts of [0.1, 1], i = 0 .. 6; with 0 and 1 that makes 256.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        ends = np.linspace(0.1, 1, 2**i + 1)
        middles = (ends[1:] + ends[:-1]) / 2 * 10.0 ** (i - 6)
        levels += [*middles, *-middles]
    return levels


@cache
def _gaussian_grids() -> dict:
    """Reads the grids that kernels/grids/fit_gaussian.py wrote."""
    return json.loads((resources.files("lqec_kernels") / "gaussian_grids.json").read_text())


def _scalar_grid(bits: int) -> list[float]:
    return [level for (level,) in _gaussian_grids()[f"gauss{bits}"]]


def _pair_grid(bits: int) -> list[list[float]]:
    return _gaussian_grids()[f"gauss{bits}_p2"]


# Scalars as [codes], vectors as [codes, dim].
POINTS = {
    "nf2": lambda: _normal_float(2),
    "nf3": lambda: _normal_float(3),
    "nf4": lambda: NF4,
    "dynamic": _dynamic,
    "e8": lattice.e8_ball,
    **{f"gauss{bits}": partial(_scalar_grid, bits) for bits in (1, 2, 3, 4)},
    **{f"gauss{bits}_p2": partial(_pair_grid, bits) for bits in (2, 3, 4)},
}
