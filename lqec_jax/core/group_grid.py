"""A uniform grid per group of inputs, as the arguments of a method describe it."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, resolve_group
from lqec_jax.core.scales import suit_dtype
from lqec_kernels.formats import Affine, CompressedLinear

# What a clip search may lower, and the exponent of the error in it; 2.4 is GPTQ's.
SEARCHES = {"weight": 2.4, "output": 2.0}


@dataclass(frozen=True)
class GroupGrid:
    """How weights are rounded: w[i, o] ≈ scales[g, o] (codes[i, o] - zeros[g, o]).

    Attributes:
      bits: 1-8.
      group_size: inputs that share a scale; None for all of them.
      symmetric: zeros are 2^(bits-1) and not stored.
      clip_search: None; 'weight' shrinks each group's range to lower Σ|ŵ - w|^2.4; 'output' lowers
        Σ weight_i (ŵ_i - w_i)² with a weight per input that the method chooses.
      dtype: in which scales are stored.
    """

    bits: int
    group_size: int | None
    symmetric: bool = False
    clip_search: str | None = None
    dtype: Any = jnp.float16

    def size(self, method: str, d_in: int) -> int:
        """Returns the group's length for one matrix.

        Raises:
          InputError: it does not divide d_in.
        """
        return resolve_group(method, self.group_size, d_in)

    def fit(self, w: jax.Array, weight: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
        """Returns (scales, zeros), each [groups, 1, d_out].

        Args:
          w: [groups, group_size, d_out].
          weight: of an input in the search by output, [groups, group_size, 1].
        """
        w = w.astype(jnp.float32)
        if self.clip_search is None:
            lo, hi = grids.find_range(w, symmetric=self.symmetric)
            return grids.fit_grid(lo, hi, self.bits, symmetric=self.symmetric, dtype=self.dtype)
        by_output = self.clip_search == "output"
        return grids.search_clip(
            w, self.bits, weight if by_output else 1.0, symmetric=self.symmetric,
            dtype=self.dtype, power=SEARCHES[self.clip_search],
        )  # fmt: skip

    def round(self, w: jax.Array, scales: jax.Array, zeros: jax.Array) -> tuple:
        """Returns the nearest codes, uint8, and what they stand for, in w's dtype."""
        codes = grids.round_to_grid(w, scales, zeros, self.bits)
        return codes.astype(jnp.uint8), grids.dequantize(codes, scales, zeros).astype(w.dtype)

    def pack(self, codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> Affine:
        """Makes the format of codes [d_in, d_out] and of scales and zeros [groups, d_out]."""
        zeros = None if self.symmetric else zeros.astype(jnp.uint8)
        size = codes.shape[0] // scales.shape[0]
        return Affine.from_codes(codes, scales, zeros, bits=self.bits, group_size=size)


def suit_grid(grid: GroupGrid, leaf: CompressedLinear) -> GroupGrid:
    """Returns the grid on which a weight is trained, see `scales.suit_dtype`."""
    return replace(grid, dtype=suit_dtype(grid.dtype, leaf))


def make_grid(
    method: str, *, bits: int, group_size: int | None, symmetric: bool,
    clip_search: bool | str = False, scale_dtype: str = "float16",
) -> GroupGrid:  # fmt: skip
    """Makes a grid from a method's arguments.

    Args:
      clip_search: False; True or 'weight'; 'output'.
    Raises:
      InputError: what a method cannot take.
    """
    check_int(method, "bits", bits, 1, 8)
    if group_size is not None:
        check_int(method, "group_size", group_size, 1)
    check_choice(method, "symmetric", symmetric, (True, False))
    check_choice(method, "clip_search", clip_search, (True, False, *SEARCHES))
    check_choice(method, "scale_dtype", scale_dtype, ("float16", "float32"))
    search = "weight" if clip_search is True else clip_search or None
    return GroupGrid(bits, group_size, symmetric, search, jnp.dtype(scale_dtype))
