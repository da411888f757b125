"""What a compressed weight is made of: operators whose sum is the weight.

    y = T_out( base( T_in(x) ) ) + Σ correction(x)

Every operator is a frozen dataclass registered as a pytree: arrays are leaves, sizes are static.
All matrices are [d_in, d_out]; arrays may carry leading axes (a stack of layers), which the
products do not see because `scan` and `vmap` take them away first.

A base says how it is cut by output column: `columns()` returns arrays whose last axis is d_out, and
`layout.dense(columns)` gives the dense weight of just those columns. That pair is all a product
needs, and `unit` all a sharding rule needs, so a new base touches neither models nor training. A
correction says by `axes` what a base says by where its arrays' axes lie.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from lqec_kernels.fields import static, stored_bits
from lqec_kernels.inputs import InputGrid
from lqec_kernels.packing import RUN, pack, unpack
from lqec_kernels.transforms import ChannelScale as ChannelScale
from lqec_kernels.transforms import Hadamard as Hadamard


class Layout(Protocol):
    """The static half of a base: hashable, turns its columns into dense ones."""

    def dense(self, columns: tuple, dtype: Any) -> jax.Array: ...


class Base(Protocol):
    """A stored weight."""

    d_in: int
    d_out: int
    layout: Layout

    def columns(self) -> tuple: ...
    def dense(self, dtype: Any = jnp.float32) -> jax.Array: ...
    def stored_bits(self) -> int: ...

    def unit(self, axis: int) -> int:
        """Returns how many inputs (axis -2) or outputs (-1) in a row cannot be parted."""


class Correction(Protocol):
    """What is added to a base's product; it reads the inputs that no transform has changed."""

    def apply(self, x: jax.Array) -> jax.Array: ...
    def dense(self, dtype: Any = jnp.float32) -> jax.Array: ...
    def stored_bits(self) -> int: ...

    def axes(self, axis: int) -> dict[str, int]:
        """Returns which fields run along the weight's d_in (axis -2) or d_out (-1), and where.

        Name of a field -> that axis of it, an array or a base, which says its `unit`. Fields that
        are not named have no such axis.
        """

    def factors(self) -> "LowRank | None":
        """Returns the same correction as two floating factors; None where it is no such product."""


@dataclass(frozen=True)
class DenseLayout:
    """A weight stored as it is."""

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        return columns[0].astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """An uncompressed base: w [d_in, d_out]."""

    w: jax.Array

    @property
    def d_in(self) -> int:
        return self.w.shape[-2]

    @property
    def d_out(self) -> int:
        return self.w.shape[-1]

    @property
    def layout(self) -> DenseLayout:
        return DenseLayout()

    def columns(self) -> tuple:
        return (self.w,)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.w.astype(dtype)

    def stored_bits(self) -> int:
        return stored_bits(self.w)

    def unit(self, axis: int) -> int:
        return 1


@dataclass(frozen=True)
class AffineLayout:
    """How Affine's columns become a dense weight."""

    bits: int
    group_size: int
    d_in: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        words, scales, zeros = columns
        codes = unpack(words, self.bits, self.d_in)
        w = place_on_grid(codes, scales, zeros, self).astype(dtype)
        # Words too few for d_in, of a damaged file, have not given so many rows.
        return w.reshape(*words.shape[:-2], self.d_in, words.shape[-1])  # [..., d_in, n]


def place_on_grid(codes: jax.Array, scales, zeros, layout: Any) -> jax.Array:
    """Returns (codes - zeros) · scales of each group, float32 [..., d_in, n].

    Args:
      codes: unsigned [..., d_in, n].
      scales, zeros: floating [..., groups, n]; zeros None is the code in the middle.
      layout: says bits and group_size.
    """
    *lead, d_in, n = codes.shape
    codes = codes.astype(jnp.float32).reshape(*lead, -1, layout.group_size, n)
    zero = 2.0 ** (layout.bits - 1) if zeros is None else zeros.astype(jnp.float32)[..., None, :]
    w = (codes - zero) * scales.astype(jnp.float32)[..., None, :]  # [..., groups, group_size, n]
    return w.reshape(*lead, d_in, n)  # [..., d_in, n]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """A uniform grid per group of inputs.

    w[i, o] = (codes[i, o] - zeros[i // group_size, o]) · scales[i // group_size, o]

    Invariants: 0 <= codes < 2**bits; group_size divides d_in; with zeros None the grid is symmetric
    about code 2**(bits-1); packed zeros obey 0 <= zeros < 2**bits.

    Attributes:
      codes: uint32 [..., ceil(d_in/32)·bits, d_out], see `packing`.
      scales: float16 (float32 by option) [..., d_in/group_size, d_out], in units of the weight; or
        [..., 1, 1], one for the whole weight (group_size is d_in then).
      zeros: None; or uint32 [..., groups, ceil(d_out/32)·bits], integers packed along d_out; or
        floating [..., groups, d_out]. In units of codes.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    bits: int = static()
    group_size: int = static()
    d_in: int = static()

    @classmethod
    def from_codes(cls, codes, scales, zeros, *, bits: int, group_size: int) -> "Affine":
        """Packs unsigned codes [..., d_in, d_out] and, where they are integers, the zeros."""
        if zeros is not None and not jnp.issubdtype(zeros.dtype, jnp.floating):
            zeros = pack(zeros.mT, bits).mT
        return cls(pack(codes, bits), scales, zeros, bits, group_size, codes.shape[-2])

    @property
    def d_out(self) -> int:
        return self.codes.shape[-1]

    @property
    def layout(self) -> AffineLayout:
        return AffineLayout(self.bits, self.group_size, self.d_in)

    def columns(self) -> tuple:
        zeros = self.zeros
        if zeros is not None and zeros.dtype == jnp.uint32:
            zeros = unpack(zeros.mT, self.bits, self.d_out).mT
        scales = jnp.broadcast_to(self.scales, (*self.scales.shape[:-1], self.d_out))
        return (self.codes, scales, zeros)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return stored_bits(self.codes, self.scales, self.zeros)

    def unit(self, axis: int) -> int:
        if axis == -2:
            whole = self.scales.shape[-2:] == (1, 1) and self.zeros is None
            return RUN if whole else math.lcm(RUN, self.group_size)
        return RUN if self.zeros is not None and self.zeros.dtype == jnp.uint32 else 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A correction of rank r: x ↦ (x̄ a) b, with x̄ the means of every `pool` inputs in a row.

    The matrix of it, a b / pool with each row said `pool` times, is constant over those inputs, as
    a group's zero is; pool = 1 is the usual adapter, x̄ = x.

    Elsewhere: PEFT's lora_A = aᵀ, lora_B = bᵀ with lora_alpha = r, so that its factor is 1; pooled,
    QA-LoRA's, whose code takes means as here and whose paper takes sums (arXiv:2309.14717).

    Attributes:
      a: floating [..., d_in/pool, r].
      b: floating [..., r, d_out].
      pool: divides d_in.
    """

    a: jax.Array
    b: jax.Array
    pool: int = static(default=1)

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def apply(self, x: jax.Array) -> jax.Array:
        if self.pool > 1:
            *lead, d_in = x.shape
            x = jnp.mean(x.reshape(*lead, d_in // self.pool, self.pool), axis=-1)  # [..., groups]
        return (x @ self.a.astype(x.dtype)) @ self.b.astype(x.dtype)

    def rows(self) -> jax.Array:
        """Returns every row of the matrix once, float32 [..., d_in/pool, d_out]."""
        product = jnp.matmul(
            self.a.astype(jnp.float32), self.b.astype(jnp.float32), precision="highest"
        )
        return product / self.pool if self.pool > 1 else product

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        rows = self.rows().astype(dtype)
        return jnp.repeat(rows, self.pool, axis=-2) if self.pool > 1 else rows

    def axes(self, axis: int) -> dict[str, int]:
        return {"a": -2} if axis == -2 else {"b": -1}

    def factors(self) -> "LowRank":
        return self

    def expanded(self) -> "LowRank":
        """Returns the same correction as one that reads every input by itself, a float32."""
        if self.pool == 1:
            return self
        a = jnp.repeat(self.a.astype(jnp.float32) / self.pool, self.pool, axis=-2)
        return LowRank(a, self.b)

    def stored_bits(self) -> int:
        return stored_bits(self.a, self.b)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressedLinear:
    """A compressed weight: x ↦ T_out(T_in(x) base) + Σ correction(x).

    Transforms are linear maps of the last axis, x ↦ x M, with `apply` and `apply_transpose`
    (x ↦ x Mᵀ); None is the identity. Corrections see the untransformed input. An input grid rounds
    x before all of them; it is no linear map and no part of `dense()`.
    """

    base: Base
    corrections: tuple = ()
    input_transform: Any = None
    output_transform: Any = None
    input_grid: InputGrid | None = static(default=None)

    @property
    def d_in(self) -> int:
        return self.base.d_in

    @property
    def d_out(self) -> int:
        return self.base.d_out

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Returns the leading axes: (layers,) in a segment, () for one weight."""
        return jax.tree.leaves(self.base)[0].shape[:-2]

    def dense(self) -> jax.Array:
        """Returns the operator as one float32 [..., d_in, d_out] matrix, inputs taken as exact."""
        w = self.base.dense()
        if self.input_transform is not None:
            w = self.input_transform.apply_transpose(w.mT).mT  # M_in w
        if self.output_transform is not None:
            w = self.output_transform.apply(w)
        for correction in self.corrections:
            w = w + correction.dense()
        return w

    def stored_bits(self) -> int:
        """Counts all that is stored: codes, scales, zeros, corrections, transforms."""
        parts = [self.base, *self.corrections, self.input_transform, self.output_transform]
        return sum(part.stored_bits() for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Returns stored bits over the weights they stand for, a stack's layers included."""
        layers = math.prod(self.stack_shape)
        return self.stored_bits() / (layers * self.d_in * self.d_out)
