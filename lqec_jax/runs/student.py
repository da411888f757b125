"""The student of a run: what is at hand, and what lies in the run's folder to be continued from.

What this process made is never read back: a block is written once, when it is finished, and kept on
the host, packed. What an earlier process left is read from the folder.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lqec_jax.core.tree import stack_blocks, unstack_blocks
from lqec_jax.core.types import Params
from lqec_jax.runs.folder import Run


class Student:
    """The packed model as every phase leaves it, one block at a time or whole.

    Args:
      outer: the teacher's embedding, norm and head, which are the student's until a step trains
        them.
    """

    def __init__(self, run: Run, outer: Params, layers: int):
        self._run, self._teacher, self._layers = run, outer, layers
        self._blocks: dict[int, tuple[int, Params]] = {}  # layer -> the phase that made it, itself
        self._outers: dict[int, Params] = {}  # phase -> what it left

    def block(self, phase: int, layer: int) -> Params:
        """Returns a block as a phase left it."""
        made, block = self._blocks.get(layer, (None, None))
        if made != phase:
            return self._run.load_block(phase, layer)
        return jax.tree.map(jnp.asarray, block)

    def outer(self, phase: int) -> Params:
        """Returns embedding, norm and head as a phase left them."""
        trained = self.trained_outer(phase)
        return self._teacher if trained is None else trained

    def trained_outer(self, phase: int) -> Params | None:
        """Returns the same where some phase up to this one trained them, else None."""
        known = [number for number in self._outers if number <= phase]
        if known:
            return self._outers[max(known)]
        found = self._run.load_outer(phase)
        if found is not None:
            self._outers[phase] = found
        return found

    def whole(self, phase: int) -> Params:
        """Returns the model as a phase left it, its blocks stacked."""
        blocks = [self.block(phase, layer) for layer in range(self._layers)]
        return {**self.outer(phase), "blocks": stack_blocks(blocks)}

    def put_block(self, phase: int, layer: int, block: Params, *, write: bool = True) -> None:
        """Keeps a finished block, and writes it where a later phase is to be continued from it."""
        kept = jax.device_get(block)
        if write and self._run.out is not None:
            self._run.save_block(phase, layer, kept)
        self._blocks[layer] = (phase, kept)

    def put(self, phase: int, params: Params, *, write: bool) -> list[Any]:
        """Keeps a whole model; returns its blocks, on the host.

        Args:
          write: False for the last phase, whose result is the artifact.
        """
        outer = {name: params[name] for name in self._teacher}
        same = jax.tree.map(jnp.array_equal, outer, self.outer(phase - 1))
        if not all(map(bool, jax.tree.leaves(same))):
            if write and self._run.out is not None:
                self._run.save_outer(phase, outer)
            self._outers[phase] = jax.tree.map(jnp.asarray, jax.device_get(outer))
        blocks = unstack_blocks(jax.device_get(params["blocks"]))
        for layer, block in enumerate(blocks):
            self.put_block(phase, layer, block, write=write)
        return blocks
