"""How far a student's hidden states are from its teacher's, after every block and at the end."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.tree import unstack_blocks
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.core.walking import compile_block, compile_embed, cut_rows


@dataclass(frozen=True)
class Discrepancy:
    """Distances of hidden states, means over windows, tokens and channels.

    Attributes:
      post_norm: mean (H_q - H)² of the final normed states, what RILQ's loss lowers.
      by_block: E (h_q - h)² / E h² after each block, each model on its own stream.
      tokens: over how many.
    """

    post_norm: float
    by_block: tuple[float, ...]
    tokens: int


def discrepancy(
    teacher: tuple[ModelFns, Params],
    student: tuple[ModelFns, Params],
    windows: np.ndarray,
    reporter: Reporter | None = None,
) -> Discrepancy:
    """Walks windows through both models side by side.

    Args:
      teacher, student: functions and parameters of each; they share their embedding.
      windows: int [n, t].
    Cost: a forward pass of each; holds both models and a few windows' states.
    """
    reporter = reporter or Silent()
    reporter.begin("discrepancy", len(windows))
    walks = [(fns, params, unstack_blocks(params["blocks"])) for fns, params in (teacher, student)]
    depth = len(walks[0][2])
    differences, energies, final = np.zeros(depth), np.zeros(depth), 0.0
    for rows in cut_rows(*windows.shape):
        h = [compile_embed(fns)(params, windows[rows]) for fns, params, _ in walks]
        for layer in range(depth):
            h = [
                compile_block(fns)(blocks[layer], x)
                for (fns, _, blocks), x in zip(walks, h, strict=True)
            ]
            difference, energy = _compare(*h)
            differences[layer] += float(difference)
            energies[layer] += float(energy)
        normed = [_norm(fns)(params, x) for (fns, params, _), x in zip(walks, h, strict=True)]
        final += float(_compare(*normed)[0])
        reporter.advance(rows.stop)
    width = h[0].shape[-1]
    return Discrepancy(
        post_norm=final / (windows.size * width),
        by_block=tuple((differences / energies).tolist()),
        tokens=windows.size,
    )


@jax.jit
def _compare(teacher: jax.Array, student: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns Σ (student - teacher)² and Σ teacher²."""
    wanted = teacher.astype(jnp.float32)
    difference = student.astype(jnp.float32) - wanted
    return jnp.sum(jnp.square(difference)), jnp.sum(jnp.square(wanted))


@lru_cache(maxsize=8)
def _norm(fns: ModelFns) -> Callable:
    return jax.jit(fns.norm)
