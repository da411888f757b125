"""The options of an export, and which format has them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.io.exports.table import FORMATS

COMMON = ("dtype", "base_only")
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class ExportOptions:
    """How to write.

    Attributes:
      dtype: of every floating tensor; None keeps each as stored, and writes float32 where a packed
        weight becomes a dense one, so that nothing is rounded.
      base_only: low-rank corrections are left out.
      own: what only this format has, by name.
    """

    dtype: np.dtype | None = None
    base_only: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)


def read_options(format: str, given: Mapping[str, Any]) -> ExportOptions:
    """Reads options, and refuses an unknown format and an option that it does not have.

    Args:
      given: options by name, dtype by its name or 'auto'.
    """
    if format not in FORMATS:
        raise InputError(
            f"export: format {format!r} is unknown{did_you_mean(str(format), FORMATS)}"
        )
    known = [*COMMON, *(name for row in FORMATS.values() for name in row.own)]
    for name in given:
        if name not in known:
            raise InputError(f"export: option {name!r} is unknown{did_you_mean(name, known)}")
    dtype = _resolve_dtype(given.get("dtype", "auto"))
    base_only = bool(given.get("base_only", False))
    own = {
        name: value
        for name, value in given.items()
        if name not in COMMON and value is not None and value is not False
    }
    for name in own:
        owners = [owner for owner, row in FORMATS.items() if name in row.own]
        if format not in owners:
            raise InputError(
                f"export: {name} is for format {' or '.join(owners)}, not {format}; leave it out"
            )
    if base_only and "base" not in FORMATS[format].holds:
        raise InputError(
            f"export: base_only leaves out the adapters, which are all that {format} holds"
        )
    return ExportOptions(dtype, base_only, own)


def _resolve_dtype(dtype: str) -> np.dtype | None:
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise InputError(f"export: dtype={dtype!r}; one of auto, {', '.join(DTYPES)} was wanted")
    return DTYPES[dtype]
