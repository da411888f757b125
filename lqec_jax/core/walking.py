"""How windows walk through a model: a few of them together, by programs that are compiled once."""

from collections.abc import Callable
from functools import lru_cache

import jax

from lqec_jax.core.types import ModelFns

# Windows that walk through a block together, in tokens.
STREAM_TOKENS = 4096


def cut_rows(count: int, length: int) -> list[slice]:
    """Cuts so many windows of so many tokens into runs that walk together.

    Example:
      >>> cut_rows(3, 2048)
      [slice(0, 2, None), slice(2, 3, None)]
    """
    size = max(1, STREAM_TOKENS // length)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@lru_cache(maxsize=8)
def compile_embed(fns: ModelFns) -> Callable:
    """Returns a compiled (params, tokens [b, t]) -> h [b, t, d]."""
    return jax.jit(fns.embed)


@lru_cache(maxsize=8)
def compile_block(fns: ModelFns) -> Callable:
    """Returns a compiled (block, h [b, t, d]) -> h after it."""
    return jax.jit(lambda block, h: fns.block(block, h)[0])
