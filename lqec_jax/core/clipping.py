"""A uniform grid whose range is learned: both ends of every group drawn in by a trained factor.

    hi = σ(γ) max w,  lo = σ(β) min w,  s = (hi - lo) / (2^b - 1),  z = round(-lo / s)

(Shao et al. 2023, arXiv:2308.13137, equation 2). Logits γ and β begin at 4, where σ is 0.98. The
gradient passes the rounding of weights unchanged and stops at that of z, so a range is learned
through its scale and through what it clips. Scales are rounded to their stored dtype on the way, so
what is trained is what is stored.

The symmetric grid has one end, hi = -lo = σ(γ) max |w|, and z = 2^(b-1): at 2 bits its levels are
{-2, -1, 0, 1} · 2/3 of the end.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core import grids
from lqec_jax.core.group_grid import GroupGrid
from lqec_kernels.fields import static
from lqec_kernels.formats import Affine, Base, Layout

START = 4.0


def start_clips(d_in: int, d_out: int, grid: GroupGrid, method: str) -> dict[str, jax.Array]:
    """Returns the logits at which a weight [d_in, d_out] begins.

    Returns:
      'upper' and, on an asymmetric grid, 'lower', float32 [groups, d_out].
    Raises:
      InputError: the group's length does not divide d_in.
    """
    logits = jnp.full((d_in // grid.size(method, d_in), d_out), START, jnp.float32)
    return {"upper": logits} if grid.symmetric else {"upper": logits, "lower": logits}


def clip_range(w: jax.Array, clips: dict, grid: GroupGrid) -> tuple[jax.Array, jax.Array]:
    """Returns the clipped range of every group.

    Args:
      w: float32 [groups, group_size, d_out].
      clips: logits as `start_clips` makes them.
    Returns:
      (lo, hi), each [groups, 1, d_out].
    """
    lo, hi = grids.find_range(w, symmetric=grid.symmetric)
    hi = jax.nn.sigmoid(clips["upper"])[:, None] * hi
    lo = -hi if grid.symmetric else jax.nn.sigmoid(clips["lower"])[:, None] * lo
    return lo, hi


def read_clipped(w: jax.Array, clips: dict, grid: GroupGrid) -> jax.Array:
    """Returns w [d_in, d_out] as its clipped grid stores it, differentiable in the logits."""
    grouped = _group(w, clips)
    lo, hi = clip_range(grouped, clips, grid)
    scales, zeros = grids.fit_grid_through(
        lo, hi, grid.bits, symmetric=grid.symmetric, dtype=grid.dtype
    )
    return grids.dequantize_through(grouped, scales, zeros, grid.bits).reshape(w.shape)


def store_clipped(w: jax.Array, clips: dict, grid: GroupGrid) -> Affine:
    """Returns what `read_clipped` reads, in its format."""
    grouped = _group(w, clips)
    ends = clip_range(grouped, clips, grid)
    scales, zeros = grids.fit_grid(*ends, grid.bits, symmetric=grid.symmetric, dtype=grid.dtype)
    codes, _ = grid.round(grouped, scales, zeros)
    return grid.pack(codes.reshape(w.shape), scales[:, 0], zeros[:, 0])


def _group(w: jax.Array, clips: dict) -> jax.Array:
    return grids.group_rows(w, w.shape[0] // clips["upper"].shape[0])


@dataclass(frozen=True)
class ClippedLayout:
    """How Clipped's columns become a dense weight."""

    inner: Layout
    grid: GroupGrid

    def dense(self, columns: tuple, dtype: Any) -> jax.Array:
        *inner, upper, lower = columns
        w = jax.lax.stop_gradient(self.inner.dense(tuple(inner), jnp.float32))
        clips = {"upper": upper} if lower is None else {"upper": upper, "lower": lower}
        return read_clipped(w, clips, self.grid).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clipped:
    """A weight seen through its clipped grid while the clips are trained; never stored.

    A product reads it as any other base, a tile of output columns at a time and again in the
    backward pass, so no dense copy of what is read is ever held.

    Attributes:
      inner: what is rounded, any base, unstacked; it gets no gradient.
      upper, lower: logits float32 [groups, d_out], `lower` None on a symmetric grid.
      grid: bits, symmetry and dtype of scales; the group's length is the logits'.
    """

    inner: Base
    upper: jax.Array
    lower: jax.Array | None
    grid: GroupGrid = static()

    @property
    def d_in(self) -> int:
        return self.inner.d_in

    @property
    def d_out(self) -> int:
        return self.inner.d_out

    @property
    def layout(self) -> ClippedLayout:
        return ClippedLayout(self.inner.layout, self.grid)

    def columns(self) -> tuple:
        return (*self.inner.columns(), self.upper, self.lower)

    def dense(self, dtype: Any = jnp.float32) -> jax.Array:
        return self.layout.dense(self.columns(), dtype)
