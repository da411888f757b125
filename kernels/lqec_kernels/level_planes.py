"""Codebook's scalars in the order in which kernels read them."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lqec_kernels.codebook import DoubleScales, look_up, spread_scales
from lqec_kernels.fields import static, stored_bits
from lqec_kernels.planes import choose_unit, join_planes, split_codes


@dataclass(frozen=True)
class LevelPlanesLayout:
    """How the columns of LevelPlanes become a dense weight."""

    table: str
    bits: int
    group_size: int
    d_in: int
    unit_size: int

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        *planes, scales, levels = columns
        codes = join_planes(tuple(planes), self.bits, self.unit_size, self.d_in)
        return look_up(codes, scales, levels, self).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LevelPlanes:
    """Codebook of scalars, its codes in `planes`; made by `repack`, not stored on disk.

    w[i, o] = scales[i // group_size, o] · level(code[i, o])

    Invariants: those of Codebook with dim 1, and of `Planes`.

    Attributes:
      planes: for each width p of `planes.WIDTHS[bits]` uint32 [..., units·unit·p/32, d_out].
      scales, levels, table: as in Codebook.
    """

    planes: tuple[jax.Array, ...]
    scales: jax.Array | DoubleScales | None
    levels: jax.Array | None
    table: str = static()
    bits: int = static()
    group_size: int = static()
    d_in: int = static()
    unit_size: int = static()

    @classmethod
    def from_codes(cls, codes, scales, levels, layout: Any) -> "LevelPlanes":
        """Packs codes [..., d_in, d_out] of a Codebook's layout."""
        size = choose_unit(layout.d_in)
        planes = split_codes(codes, layout.bits, size)
        return cls(planes, scales, levels, layout.table, layout.bits, layout.group_size,
                   layout.d_in, size)  # fmt: skip

    @property
    def d_out(self) -> int:
        return self.planes[0].shape[-1]

    @property
    def layout(self) -> LevelPlanesLayout:
        return LevelPlanesLayout(self.table, self.bits, self.group_size, self.d_in, self.unit_size)

    def columns(self) -> tuple:
        return (*self.planes, spread_scales(self.scales, self.d_out), self.levels)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)

    def stored_bits(self) -> int:
        return stored_bits(*jax.tree.leaves(self))

    def unit(self, axis: int) -> int:
        if axis == -1:
            return 1
        whole = self.group_size == self.d_in
        return self.unit_size if whole else math.lcm(self.unit_size, self.group_size)
