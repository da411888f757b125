"""Formats of compressed weights and the products with them. Depends on jax only.

`formats` says what is stored, `packing` how codes become words, `reference` multiplies in plain XLA
without ever holding a dense weight, `api` chooses an implementation.
"""

from lqec_kernels.api import packed_matmul
from lqec_kernels.formats import Affine, ChannelScale, CompressedLinear, Dense, LowRank
from lqec_kernels.packing import pack, unpack

__all__ = [
    "Affine",
    "ChannelScale",
    "CompressedLinear",
    "Dense",
    "LowRank",
    "pack",
    "packed_matmul",
    "unpack",
]
