"""How the fields of an operator are declared and counted."""

import math
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp

STATIC = {"static": True}


def static(**options: Any) -> Any:
    """Declares a field that is part of the tree's structure, not one of its leaves."""
    return field(metadata=STATIC, **options)


def stored_bits(*arrays: jax.Array | None) -> int:
    """Counts the bits that arrays take on disk; reads shapes only."""
    return sum(
        math.prod(a.shape) * jnp.dtype(a.dtype).itemsize * 8 for a in arrays if a is not None
    )
