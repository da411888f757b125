"""Tiny packed Llamas made of random words, so that a test of a format compresses nothing."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.tree import set_at, stack_blocks
from lqec_jax.models.families import family, read_config
from lqec_jax.models.model import Model
from lqec_kernels.formats import Affine, CompressedLinear, LowRank
from tests.golden import tiny_checkpoint

RAW = {**tiny_checkpoint.RAW, "num_hidden_layers": 2, "num_key_value_heads": 4}


@lru_cache
def make_model(
    bits: tuple[int, ...] = (2, 2),
    ranks: tuple[int, ...] = (2, 2),
    symmetric: bool = True,
    group_size: int | None = 32,
    **changes,
) -> Model:
    """Makes a model with bits and adapter ranks by block; rank 0 is no adapter."""
    raw = {**RAW, **changes}
    config, rng = read_config(raw), np.random.default_rng(0)
    shapes = family("llama").block_shapes(config)
    blocks = []
    for width, rank in zip(bits, ranks, strict=True):
        block = {}
        for path, shape in shapes.items():
            value = rng.uniform(0.5, 1.5, shape).astype(np.float32)
            if path.endswith("/kernel"):
                value = make_leaf(rng, shape, width, rank, symmetric, group_size)
            block = set_at(block, path, value)
        blocks.append(block)
    embedding = rng.standard_normal((config.vocab_size, config.d_model)).astype(np.float32)
    params = {
        "embed": {"embedding": embedding},
        "blocks": stack_blocks(blocks),
        "norm": {"scale": np.ones(config.d_model, np.float32)},
    }
    if not config.tied_head:
        params["head"] = {"kernel": embedding.T[::-1].copy() / 4}
    return Model(config, jax.tree.map(jnp.asarray, params), raw, recipe="rtn(bits=2)",
                 fingerprint="abc")  # fmt: skip


def make_leaf(rng, shape, bits, rank=0, symmetric=True, group_size=32) -> CompressedLinear:
    """Makes a weight of random codes, of about unit gain; zeros are odd, so at least 1."""
    d_in, d_out = shape
    group_size = group_size or d_in
    groups = d_in // group_size
    words = rng.integers(0, 2**32, (-(-d_in // 32) * bits, d_out), np.uint32)
    scales = rng.uniform(0.5, 1.5, (groups, d_out)) / (2 ** (bits - 1) * d_in**0.5)
    zeros = None
    if not symmetric:
        zeros = rng.integers(0, 2**32, (groups, -(-d_out // 32) * bits), np.uint32)
        zeros |= np.tile(ones(bits), zeros.shape[1] // bits)
    base = Affine(words, scales.astype(np.float16), zeros, bits, group_size, d_in)
    if not rank:
        return CompressedLinear(base)
    a, b = (rng.standard_normal(s).astype(np.float16) / 9 for s in ((d_in, rank), (rank, d_out)))
    return CompressedLinear(base, (LowRank(a, b),))


def ones(bits: int) -> np.ndarray:
    """Returns the words of a run of 32 codes that are all 1."""
    stream = sum(1 << (bits * i) for i in range(32))
    return np.array([stream >> (32 * w) & 0xFFFFFFFF for w in range(bits)], np.uint32)
