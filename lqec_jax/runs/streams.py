"""The two streams of a run: what enters every block in the teacher and in the student, on disk.

A stream has two slots. Block `layer` reads slot `layer % 2` and fills the other, so what a block
began with is whole until the next one begins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from lqec_jax.core.types import ModelFns, Params
from lqec_jax.core.walking import compile_block, compile_embed, cut_rows
from lqec_jax.runs.folder import Run
from lqec_jax.runs.record import StreamWriter


@dataclass(frozen=True)
class Streams:
    """Hidden states of windows, one block after the other.

    Attributes:
      walked: a stream's name -> its windows, int32 [n, t].
      width, dtype: of hidden states.
      written: a stream's name -> the record of the slot that was filled last; the driver commits it
        with the block, before which it speaks of nothing that a resumed run would read.
    """

    run: Run
    fns: ModelFns
    walked: Mapping[str, np.ndarray]
    width: int
    dtype: Any
    written: dict[str, dict] = field(default_factory=dict)

    def reserve(self) -> None:
        """Gives every slot its place on the disk, before there is any work to lose.

        Raises:
          OSError: there is none.
        """
        for name in self.walked:
            for slot in (0, 1):
                self._fill(name, slot)

    def open(self, outer: Params, names: Sequence[str]) -> None:
        """Fills the first slots with embeddings."""
        embed = compile_embed(self.fns)
        for name in names:
            out, windows = StreamWriter(self._fill(name, 0), hashed=False), self.walked[name]
            for rows in self.rows(len(windows)):
                out.put(rows, embed(outer, windows[rows]))
            out.finish()

    def advance(self, name: str, layer: int, block: Params) -> None:
        """Walks all windows through one block, from one slot of a stream into the other."""
        apply, h = compile_block(self.fns), self.slot(name, layer)
        out = StreamWriter(self._fill(name, layer + 1), hashed=self.run.resumable)
        for rows in self.rows(len(h)):
            out.put(rows, apply(block, np.asarray(h[rows])))
        self.written[name] = {"slot": (layer + 1) % 2, **out.finish()}

    def slot(self, name: str, layer: int) -> np.memmap:
        """Returns a stream as it stands before block `layer`, [n, t, d], to be read.

        Raises:
          InputError: its file is missing, or of another size.
        """
        return self.run.read_stream(name, layer % 2, self._shape(name), self.dtype)

    def _fill(self, name: str, layer: int) -> np.memmap:
        """Returns a slot to be filled."""
        return self.run.stream(name, layer % 2, self._shape(name), self.dtype)

    def _shape(self, name: str) -> tuple[int, int, int]:
        n, t = self.walked[name].shape
        return n, t, self.width

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
