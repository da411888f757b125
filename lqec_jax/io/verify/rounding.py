"""What an export must hold: the model's weights, rounded as its record says, and nothing further.

A format rounds either each weight, unpacked (`hf`), or each floating array that a packed weight is
made of (scales, factors), of which the weight is computed again. What is stored of one product, a
dense weight or codes on a grid, must agree to the bit; what is a sum, of factors or of a rotation,
to float32's error in another order of summation, and then be rounded as asked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lqec_jax.core.tree import is_compressed
from lqec_jax.io.exports.record import read_record
from lqec_jax.io.exports.table import FORMATS
from lqec_jax.io.exports.walk import to_dense
from lqec_kernels.formats import Affine, CompressedLinear, Dense

UNIT = 2.0**-24  # float32's unit roundoff
# Of the size of a sum's terms: a sum of n in any order is off by n units at most; 16 at least.
LEAST_TERMS = 16
TINY = 1e-7  # of a rotation, whose terms may cancel
NARROW = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Rounding:
    """How an export was asked to round.

    Attributes:
      dtype: None rounds nothing.
      whole: weights are rounded whole, not the arrays that they are made of.
      adapters: of adapters beside a base, where they are apart; None where they are not.
    """

    dtype: np.dtype | None
    whole: bool
    adapters: "Rounding | None" = None

    @property
    def exact(self) -> bool:
        return self.dtype is None and (self.adapters is None or self.adapters.exact)


class Expected(NamedTuple):
    """A weight as it must be, float32, and the lowest and highest that each number of it may be."""

    dense: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_rounding(folder: Path, record: Mapping[str, Any]) -> Rounding:
    """Returns how an export was rounded, by its record and that of the base it names."""
    row = FORMATS[record["format"]]
    own = Rounding(NARROW.get(record["dtype"]), row.unpacks)
    if row.names == "ours":
        own = replace(own, whole=not import_module(row.reader).read_packed(folder))
    if "base" in row.holds:
        return own
    if record.get("base") is None:
        return Rounding(None, whole=False, adapters=own)
    base = Path(record["base"])
    return replace(read_rounding(base, read_record(base)), adapters=own)


def expect(value: Any, rounding: Rounding) -> Expected:
    """Returns what an export of a parameter, an array or a packed weight, must hold."""
    if not is_compressed(value):
        dense = round_to(np.asarray(value), rounding.dtype)
        return Expected(dense, dense, dense)
    if rounding.adapters is None:
        return _expect_weight(value, rounding)
    base = _expect_weight(replace(value, corrections=()), rounding)
    factors = tuple(c.factors().expanded() for c in value.corrections)
    factors = jax.tree.map(partial(_round_array, dtype=rounding.adapters.dtype), factors)
    added = sum((np.asarray(_dense(f)) for f in factors), np.float32(0))
    error = _error(replace(value, corrections=factors)) if factors else np.float32(0)
    return Expected(base.dense + added, base.low + added - error, base.high + added + error)


def round_to(array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """Rounds numbers to a dtype, to the nearest, and returns them as float32."""
    with np.errstate(over="ignore"):
        return np.asarray(array if dtype is None else array.astype(dtype)).astype(np.float32)


def _expect_weight(leaf: CompressedLinear, rounding: Rounding) -> Expected:
    if not rounding.whole:
        leaf = jax.tree.map(partial(_round_array, dtype=rounding.dtype), leaf)
    dense, error = np.asarray(to_dense(leaf)), _error(leaf)
    stored = partial(round_to, dtype=rounding.dtype if rounding.whole else None)
    return Expected(stored(dense), stored(dense - error), stored(dense + error))


def _round_array(array: Any, dtype: np.dtype | None) -> Any:
    """Rounds an array of a packed weight; codes and other integers are left alone."""
    if dtype is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return round_to(np.asarray(array), dtype)


def _error(leaf: CompressedLinear) -> np.ndarray:
    """Returns by how much a weight may be off, computed in float32 in another order."""
    plain = isinstance(leaf.base, Affine | Dense)
    if plain and not leaf.corrections and leaf.input_transform is leaf.output_transform is None:
        return np.float32(0)  # one product
    size = np.abs(np.asarray(to_dense(replace(leaf, corrections=()))))
    terms = LEAST_TERMS
    for correction in leaf.corrections:
        size = size + np.asarray(_size(correction))
        terms += getattr(correction.factors(), "rank", 1)
    return np.float32(terms * UNIT) * size + np.float32(TINY)


@jax.jit
def _size(correction: Any) -> jax.Array:
    factors = correction.factors()
    return jax.tree.map(jnp.abs, correction if factors is None else factors).dense()


@jax.jit
def _dense(correction: Any) -> jax.Array:
    return correction.dense()
