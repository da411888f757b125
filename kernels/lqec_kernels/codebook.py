"""Weights stored as indices into a table: of scalars or of short vectors, fixed or per column."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_kernels.fields import static, stored_bits
from lqec_kernels.packing import RUN, pack, unpack, words_for
from lqec_kernels.tables import find_table

SCALE_BLOCK = 256  # scales that share a scale of their own, QLoRA's number


@dataclass(frozen=True)
class CodebookLayout:
    """How Codebook's columns become a dense weight."""

    table: str
    bits: int
    group_size: int
    d_in: int

    @property
    def dim(self) -> int:
        return find_table(self.table).dim if self.table else 1

    def codes(self, words: jax.Array) -> jax.Array:
        """Returns the codes as unsigned integers, [..., ceil(d_in / dim), n]."""
        count = -(-self.d_in // self.dim)
        missing = words_for(count, self.bits) - words.shape[-2]
        words = jnp.pad(words, [(0, 0)] * (words.ndim - 2) + [(0, missing), (0, 0)])
        return unpack(words, self.bits, count)

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        words, scales, levels = columns
        return look_up(self.codes(words), scales, levels, self).astype(dtype)


def look_up(codes: jax.Array, scales, levels, layout: Any) -> jax.Array:
    """Returns what codes stand for, float32 [..., d_in, n].

    Args:
      codes: unsigned [..., ceil(d_in / dim), n].
      scales: None, or floating [..., groups, n].
      levels: None, or floating [..., 2**bits, n].
      layout: says table, group_size and d_in.
    """
    if levels is None:
        w = find_table(layout.table).decode(codes)  # [..., codes, dim, n]
        w = w.reshape(*w.shape[:-3], -1, w.shape[-1])[..., : layout.d_in, :]  # [..., d_in, n]
    else:
        w = jnp.take_along_axis(levels.astype(jnp.float32), codes.astype(jnp.int32), axis=-2)
    if scales is None:
        return w
    grouped = w.reshape(*w.shape[:-2], -1, layout.group_size, w.shape[-1])  # [..., G, group, n]
    grouped = grouped * scales.astype(jnp.float32)[..., None, :]
    return grouped.reshape(w.shape)  # [..., d_in, n]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DoubleScales:
    """Scales quantized in turn, the double quantization of Dettmers et al. 2023, arXiv:2305.14314.

    scale[g, o] = mean + absmax[(o·G + g) // 256] · level(codes[g, o])

    The 256 levels are the 'dynamic' table: fine near zero, where most deviations from the mean lie.

    Attributes:
      codes: uint8 [..., G, d_out].
      absmax: float32 [..., ceil(G·d_out / 256)], the largest deviation in a block of 256 scales, in
        the order of output columns.
      mean: float32 [..., 1], of all scales.
    """

    codes: jax.Array
    absmax: jax.Array
    mean: jax.Array

    @classmethod
    def from_scales(cls, scales: jax.Array) -> "DoubleScales":
        """Quantizes float32 scales [G, d_out] to 8 bits, to 1 % of their block's absmax."""
        mean = jnp.mean(scales)
        flat = (scales - mean).T.reshape(-1)  # [d_out · G]
        blocks = -(-flat.size // SCALE_BLOCK)
        flat = jnp.pad(flat, (0, blocks * SCALE_BLOCK - flat.size)).reshape(blocks, SCALE_BLOCK)
        absmax = jnp.max(jnp.abs(flat), axis=1)
        unit = flat / jnp.where(absmax > 0, absmax, 1.0)[:, None]
        codes = find_table("dynamic").encode(unit.reshape(-1, 1, 1))[: scales.size, 0]
        codes = codes.reshape(scales.T.shape).T.astype(jnp.uint8)  # [G, d_out]
        return cls(codes, absmax, mean[None])

    def dense(self) -> jax.Array:
        """Returns the scales, float32 [..., G, d_out]."""
        *lead, groups, d_out = self.codes.shape
        level = find_table("dynamic").decode(self.codes)[..., 0, :]
        block = np.arange(groups * d_out).reshape(d_out, groups).T // SCALE_BLOCK  # [G, d_out]
        return self.mean[..., None] + self.absmax[..., block] * level

    def stored_bits(self) -> int:
        return stored_bits(self.codes, self.absmax, self.mean)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codebook:
    """A table index of `bits` bits for every `dim` consecutive inputs of a column, and scales.

    w[i, o] = scales[i // group_size, o] · level(code[i // dim, o])[i % dim]

    `level` is a constant table of `tables`, or for scalars (dim 1) one table a column, stored.

    Invariants: table is '' exactly where levels are given; group_size divides d_in; the stream of
    codes ends with the last word that holds one, so that words = ceil(ceil(d_in/dim)·bits / 32).

    Attributes:
      codes: uint32 [..., words, d_out], see `packing`.
      scales: None for 1; floating [..., d_in/group_size, d_out]; floating [..., 1, 1], one for the
        whole weight (group_size is d_in then); or DoubleScales. In units of the weight.
      levels: None, or floating [..., 2**bits, d_out], any order.
      table: name of a table; its dim and bits are the codes'.
    """

    codes: jax.Array
    scales: jax.Array | DoubleScales | None
    levels: jax.Array | None
    table: str = static()
    bits: int = static()
    group_size: int = static()
    d_in: int = static()

    @classmethod
    def from_codes(cls, codes, scales, *, table: str, group_size: int, d_in: int) -> "Codebook":
        """Packs codes [..., ceil(d_in / dim), d_out] of a constant table."""
        bits = find_table(table).bits
        return cls(_pack(codes, bits), scales, None, table, bits, group_size, d_in)

    @classmethod
    def from_levels(cls, codes, levels, *, bits: int) -> "Codebook":
        """Packs codes [..., d_in, d_out] of tables [..., 2**bits, d_out], one a column."""
        d_in = codes.shape[-2]
        return cls(_pack(codes, bits), None, levels, "", bits, d_in, d_in)

    @property
    def d_out(self) -> int:
        return self.codes.shape[-1]

    @property
    def layout(self) -> CodebookLayout:
        return CodebookLayout(self.table, self.bits, self.group_size, self.d_in)

    def columns(self) -> tuple:
        return (self.codes, spread_scales(self.scales, self.d_out), self.levels)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return stored_bits(*jax.tree.leaves(self))

    def unit(self, axis: int) -> int:
        if axis == -1:
            return 1
        whole_words = math.lcm(RUN, self.bits) // self.bits * self.layout.dim
        is_shared = self.scales is None or jax.tree.leaves(self.scales)[0].shape[-1] == 1
        return whole_words if is_shared else math.lcm(whole_words, self.group_size)


def spread_scales(scales: jax.Array | DoubleScales | None, d_out: int) -> jax.Array | None:
    """Returns scales as numbers of every column, [..., G, d_out]."""
    if isinstance(scales, DoubleScales):
        scales = scales.dense()
    return None if scales is None else jnp.broadcast_to(scales, (*scales.shape[:-1], d_out))


def _pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes along the second-to-last axis and leaves out the last run's empty words."""
    words = -(-codes.shape[-2] * bits // RUN)
    return pack(codes, bits)[..., :words, :]
