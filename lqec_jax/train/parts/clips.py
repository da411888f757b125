"""The ends of every group's range, in the place of a weight's base; see `core.clipping`."""

import dataclasses
from dataclasses import dataclass

import jax
import optax

from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.clipping import Clipped, read_clipped, start_clips, store_clipped
from lqec_jax.core.group_grid import GroupGrid, suit_grid
from lqec_jax.train.parts.part import Part, attributes, put_weight
from lqec_kernels.formats import CompressedLinear


@dataclass(frozen=True, kw_only=True)
class Clips(Part):
    """hi = σ(γ) max w, lo = σ(β) min w: γ and β move, the weights stay (OmniQuant, 2308.13137).

    Attributes:
      grid: what the base becomes.
      tiled: a product reads the base a tile at a time, and again in the backward pass, so that no
        dense copy of what is read is held; else one is, which takes less time.
    """

    grid: GroupGrid
    tiled: bool = True

    def suit(self, leaf: CompressedLinear) -> "Clips":
        return dataclasses.replace(self, grid=suit_grid(self.grid, leaf))

    def begin(self, leaf: CompressedLinear, key: jax.Array) -> CompressedLinear:
        clips = start_clips(leaf.d_in, leaf.d_out, self.grid, self.method)
        base = Clipped(leaf.base, clips["upper"], clips.get("lower"), self.suit(leaf).grid)
        return dataclasses.replace(leaf, base=base)

    def label(self, path: tuple, array: jax.Array) -> str | None:
        return "clips" if attributes(path)[-1:] in (["upper"], ["lower"]) else None

    def read(self, leaf: CompressedLinear) -> CompressedLinear | jax.Array:
        if self.tiled:
            return leaf
        grid, (leaf, clips) = leaf.base.grid, _take(leaf)
        return put_weight(leaf, read_clipped(base_target(leaf), clips, grid))

    def keep(self, leaf: CompressedLinear, given: CompressedLinear) -> CompressedLinear:
        grid, (leaf, clips) = leaf.base.grid, _take(leaf)
        return replace_base(leaf, store_clipped(base_target(leaf), clips, grid))

    def optimizers(self, width: int, updates: int) -> dict[str, optax.GradientTransformation]:
        return {"clips": self.rates.chain(self.rates.lr, updates)}


def _take(leaf: CompressedLinear) -> tuple[CompressedLinear, dict[str, jax.Array]]:
    """Returns a weight with the base that it was given, and the clips."""
    base = leaf.base
    return dataclasses.replace(leaf, base=base.inner), {"upper": base.upper, "lower": base.lower}
