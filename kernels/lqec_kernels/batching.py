"""vmap of a product by a kernel, which a compiler cannot look into."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def join_rows(multiply: Callable) -> Callable:
    """Gives a product its rule of vmap: rows of one weight are rows; several weights take turns.

    Args:
      multiply: (rows [m, d_in], then any trees of arrays: the weight) -> [m, d_out].
    """
    joined = jax.custom_batching.custom_vmap(multiply)

    @joined.def_vmap
    def multiply_batch(size: int, batched: list, rows: jax.Array, *weight: Any) -> tuple:
        if not any(jax.tree.leaves(batched[1:])):
            y = joined(rows.reshape(-1, rows.shape[-1]), *weight)  # [n m, d_out]
            return y.reshape(*rows.shape[:2], y.shape[-1]), True  # [n, m, d_out]
        arrays, tree = jax.tree.flatten((rows, *weight))
        turns = jax.tree.leaves(batched)

        def take_turn(parts: list) -> jax.Array:
            parts = iter(parts)
            taken = [next(parts) if turn else a for turn, a in zip(turns, arrays, strict=True)]
            return joined(*jax.tree.unflatten(tree, taken))

        return lax.map(take_turn, [a for turn, a in zip(turns, arrays, strict=True) if turn]), True

    return joined
