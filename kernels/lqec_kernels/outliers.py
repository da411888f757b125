"""A few weights held apart, each by its place and value."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lqec_kernels.fields import static, stored_bits

# Products of outliers and tokens that are held at once.
PRODUCTS = 4 * 2**20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outliers:
    """A sparse correction: x ↦ y, y[o] = Σ over outliers (i, o) of x[i] · value.

    Its dense form is zero but at (place // d_out, place % d_out); values at one place add up.

    Attributes:
      places: uint32 [..., k], row · d_out + column; any order, ascending reads memory in order.
      values: floating [..., k], in units of the weight.
    """

    places: jax.Array
    values: jax.Array
    d_in: int = static()
    d_out: int = static()

    @property
    def count(self) -> int:
        return self.places.shape[-1]

    def apply(self, x: jax.Array) -> jax.Array:
        """Multiplies x [..., d_in] in its dtype; sums are float32 or wider.

        Gathers inputs, multiplies, adds to outputs, for a chunk of outliers at a time: neither
        direction holds more than `PRODUCTS` products.
        """
        *lead, d_in = x.shape
        wide = jnp.asarray(x).reshape(-1, d_in).T.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = _multiply((self.d_in, self.d_out), wide, self.places, self.values)
        return y.T.reshape(*lead, self.d_out).astype(x.dtype)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        """Returns [..., d_in, d_out]."""

        def scatter(places, values):
            zero = jnp.zeros((self.d_in, self.d_out), jnp.float32)
            return zero.at[places // self.d_out, places % self.d_out].add(values)

        lead = self.places.shape[:-1]
        values = self.values.astype(jnp.float32).reshape(-1, self.count)
        dense = jax.vmap(scatter)(self.places.reshape(-1, self.count), values)
        return dense.reshape(*lead, self.d_in, self.d_out).astype(dtype)

    def stored_bits(self) -> int:
        return stored_bits(self.places, self.values)

    def axes(self, axis: int) -> dict[str, int]:
        return {}  # a place is a number of both

    def factors(self) -> None:
        return None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(shape: tuple[int, int], x: jax.Array, places: jax.Array, values: jax.Array):
    """Returns y [d_out, t] for x [d_in, t]: what belongs to one outlier lies together."""
    d_in, d_out = shape

    def add(y, chunk):
        places, values = chunk
        return y.at[places % d_out].add(values[:, None] * x[places // d_out]), None

    chunks = _cut(x.shape[1], places, values.astype(x.dtype))
    return lax.scan(add, jnp.zeros((d_out, x.shape[1]), x.dtype), chunks)[0]


def _forward(shape: tuple, x, places, values):
    return _multiply(shape, x, places, values), (x, places, values)


def _backward(shape: tuple, residual, dy):
    x, places, values = residual
    d_in, d_out = shape

    def add(dx, chunk):
        places, values = chunk
        rows, columns = places // d_out, places % d_out
        dy_there = dy[columns]
        dx = dx.at[rows].add(values[:, None] * dy_there)
        return dx, jnp.sum(x[rows] * dy_there, axis=1)

    chunks = _cut(x.shape[1], places, values.astype(x.dtype))
    dx, d_values = lax.scan(add, jnp.zeros_like(x), chunks)
    d_places = np.zeros(places.shape, jax.dtypes.float0)
    return dx, d_places, d_values.reshape(-1)[: values.size].astype(values.dtype)


_multiply.defvjp(_forward, _backward)


def _cut(tokens: int, places: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cuts outliers into equal chunks, the last filled up with values of zero."""
    count = places.size
    chunk = max(1, min(count, PRODUCTS // max(tokens, 1)))
    chunks = -(-count // chunk)
    filled = [jnp.pad(array, (0, chunks * chunk - count)) for array in (places, values)]
    return tuple(array.reshape(chunks, chunk) for array in filled)  # [chunks, chunk]
