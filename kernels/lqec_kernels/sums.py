"""A base that is the sum of two: what the first leaves over, the second stores."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class SumLayout:
    """The layouts of both, and how many of the columns are the first's."""

    first: Any
    second: Any
    split: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        first = self.first.dense(columns[: self.split], jnp.float32)
        second = self.second.dense(columns[self.split :], jnp.float32)
        return (first + second).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """Two bases of one shape, w = first + second: residual vector quantization.

    Invariants: both have the same d_in, d_out and leading axes.
    """

    first: Any
    second: Any

    @property
    def d_in(self) -> int:
        return self.first.d_in

    @property
    def d_out(self) -> int:
        return self.first.d_out

    @property
    def layout(self) -> SumLayout:
        return SumLayout(self.first.layout, self.second.layout, len(self.first.columns()))

    def columns(self) -> tuple:
        return (*self.first.columns(), *self.second.columns())

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return self.first.stored_bits() + self.second.stored_bits()

    def unit(self, axis: int) -> int:
        return math.lcm(self.first.unit(axis), self.second.unit(axis))
