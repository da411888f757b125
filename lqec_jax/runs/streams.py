"""The two streams of a run: what enters every block in the teacher and in the student, on disk.

A stream has two slots. Block `layer` reads slot `layer % 2` and fills the other, so what a block
began with is whole until the next one begins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from lqec_jax.core.types import ModelFns, Params
from lqec_jax.core.walking import compile_block, compile_embed, cut_rows
from lqec_jax.runs.folder import Run


@dataclass(frozen=True)
class Streams:
    """Hidden states of windows, one block after the other.

    Attributes:
      walked: a stream's name -> its windows, int32 [n, t].
      width, dtype: of hidden states.
    """

    run: Run
    fns: ModelFns
    walked: Mapping[str, np.ndarray]
    width: int
    dtype: Any

    def open(self, outer: Params, names: Sequence[str]) -> None:
        """Fills the first slots with embeddings."""
        embed = compile_embed(self.fns)
        for name in names:
            out, windows = self.slot(name, 0), self.walked[name]
            for rows in self.rows(len(windows)):
                out[rows] = embed(outer, windows[rows])
            out.flush()

    def advance(self, name: str, layer: int, block: Params) -> None:
        """Walks all windows through one block, from one slot of a stream into the other."""
        apply, out = compile_block(self.fns), self.slot(name, layer + 1)
        h = self.slot(name, layer)
        for rows in self.rows(len(h)):
            out[rows] = apply(block, np.asarray(h[rows]))
        out.flush()

    def slot(self, name: str, layer: int) -> np.memmap:
        """Returns a stream as it stands before block `layer`, [n, t, d]."""
        n, t = self.walked[name].shape
        return self.run.stream(name, layer % 2, (n, t, self.width), self.dtype)

    def rows(self, count: int) -> list[slice]:
        """Cuts so many windows into runs that walk together."""
        return cut_rows(count, next(iter(self.walked.values())).shape[1])

    def batches(self, h: np.ndarray) -> Iterator[np.ndarray]:
        return (np.asarray(h[rows]) for rows in self.rows(len(h)))

    def inputs(self, layer: int, block: Params, path: str, count: int) -> Iterator[jax.Array]:
        """Yields what one linear of the student reads in its first `count` windows."""
        read = _inputs(self.fns, path)
        return (read(block, rows) for rows in self.batches(self.slot("student", layer)[:count]))


@lru_cache(maxsize=64)
def _inputs(fns: ModelFns, path: str) -> Callable:
    """Returns a compiled (block, h) -> what one linear reads, computing no more of the block."""
    return jax.jit(lambda block, h: fns.block(block, h)[1][path])
