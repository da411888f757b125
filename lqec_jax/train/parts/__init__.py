"""What can move in a training; see `part.Part`."""

from lqec_jax.train.parts.adapters import Adapters
from lqec_jax.train.parts.clips import Clips
from lqec_jax.train.parts.grids import Grid, Scales, Zeros
from lqec_jax.train.parts.part import Part
from lqec_jax.train.parts.stored import Norms, Rest, StoredAdapters

__all__ = ["Adapters", "Clips", "Grid", "Norms", "Part", "Rest", "Scales", "StoredAdapters",
           "Zeros"]  # fmt: skip
