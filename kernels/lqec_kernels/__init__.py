"""Formats of compressed weights and the products with them. Depends on jax only.

`formats` says what is stored, `packing` how codes become words, `reference` multiplies in plain XLA
without ever holding a dense weight. `planes` is the kernels' layout and `repack` makes it,
`layers` is one of a stack, read where it lies. `capability` says what can run where, `api` chooses.
"""

from lqec_kernels.adapters import QuantizedLowRank
from lqec_kernels.api import packed_matmul, use
from lqec_kernels.bitplanes import BitPlanes
from lqec_kernels.codebook import Codebook, DoubleScales
from lqec_kernels.formats import Affine, CompressedLinear, Dense, LowRank
from lqec_kernels.inputs import InputGrid
from lqec_kernels.layers import Layer, pick_layer, take_layer
from lqec_kernels.outliers import Outliers
from lqec_kernels.packing import pack, unpack
from lqec_kernels.planes import Planes
from lqec_kernels.repacking import DenseCopy, repack, repack_for_kernels
from lqec_kernels.sums import Sum
from lqec_kernels.transforms import ChannelScale, Hadamard

# The names that they had before.
prepare, ready = repack_for_kernels, repack

__all__ = [
    "Affine",
    "BitPlanes",
    "ChannelScale",
    "Codebook",
    "CompressedLinear",
    "Dense",
    "DenseCopy",
    "DoubleScales",
    "Hadamard",
    "InputGrid",
    "Layer",
    "LowRank",
    "Outliers",
    "Planes",
    "QuantizedLowRank",
    "Sum",
    "pack",
    "packed_matmul",
    "pick_layer",
    "prepare",
    "ready",
    "repack",
    "repack_for_kernels",
    "take_layer",
    "unpack",
    "use",
]
