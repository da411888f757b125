"""EfficientQAT's Block-AP: all numbers of a block's quantizers trained together, weights too.

    ŵ = s (clip(round(w / s) + round(z), 0, 2^b - 1) - round(z))

w, s and z begin at the rounding of every group to its range and are trained, a block at a time, so
that the block answers as the teacher's does (Chen et al. 2024, arXiv:2407.11062, §3.2); gradients
pass both roundings unchanged. At the end w becomes codes and is gone.

They are trained in units that make one learning rate mean the same at every size: a weight in steps
of its group's first grid, a scale as a fraction of its first value, a zero in codes. The authors'
rates are absolute: 2e-5 for weights and 1e-4 for the others at 2 bits and width 4096, where a step
is about 0.03, so some 7e-4 and 3e-3 of it, for 4096 updates. Ours are for the few hundred updates
of a default run. Written from the equations. Differs besides: scales are rounded to their stored
dtype while training; no gradient is clipped, as Adam's steps have their size from the rate; the
best of the epochs is kept, the start included.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core import grids
from lqec_jax.core.arguments import check_choice, check_int, check_number
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.group_grid import GroupGrid, make_grid
from lqec_jax.core.types import Params, Step
from lqec_jax.train.block_fit import Trainable, fit_bases
from lqec_kernels.formats import CompressedLinear

REFERENCE = "our choice"

# The rate that a decay ends at, of the first.
LAST = 0.05


def make_trainable(grid: GroupGrid) -> Trainable:
    """Returns a grid and the weights on it as something that `train.block_fit` trains."""

    def fit(leaf: CompressedLinear) -> tuple[jax.Array, jax.Array, jax.Array]:
        size = grid.size("block_ap", leaf.d_in)
        w = grids.group_rows(base_target(leaf), size)
        return w, *grid.fit(w)

    def start(leaf: CompressedLinear) -> Params:
        w, scales, zeros = fit(leaf)
        ones = jnp.ones(scales.shape, jnp.float32)
        trained = {"moved": jnp.zeros(w.shape, jnp.float32), "scales": ones}
        return trained if grid.symmetric else {**trained, "zeros": zeros}

    def unpack(leaf: CompressedLinear, trained: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns weights, scales as they will be stored and whole zeros, all grouped."""
        w, scales, zeros = fit(leaf)
        first = scales.astype(jnp.float32)
        exact = first * trained["scales"]
        limits = jnp.finfo(grid.dtype)
        stored = jnp.clip(exact, limits.tiny, limits.max).astype(grid.dtype)
        if not grid.symmetric:
            whole = jnp.clip(jnp.round(trained["zeros"]), 0, 2**grid.bits - 1)
            zeros = grids.store_through(trained["zeros"], whole)
        return w + first * trained["moved"], grids.store_through(exact, stored), zeros

    def read(leaf: CompressedLinear, trained: Params) -> jax.Array:
        numbers = grids.dequantize_through(*unpack(leaf, trained), grid.bits)
        return numbers.reshape(leaf.d_in, leaf.d_out)

    def store(leaf: CompressedLinear, trained: Params) -> CompressedLinear:
        w, scales, zeros = unpack(leaf, trained)
        codes, _ = grid.round(w, scales, zeros)
        codes = codes.reshape(leaf.d_in, leaf.d_out)
        base = grid.pack(codes, scales[:, 0].astype(grid.dtype), zeros[:, 0])
        return replace_base(leaf, base)

    return Trainable(start, read, store)


def block_ap(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    epochs: int = 2,
    batch: int = 2,
    weight_lr: float = 0.015,
    scale_lr: float = 0.02,
    aug: bool = False,
    scale_dtype: str = "float16",
) -> Step:
    """Makes the step that replaces a block's bases by grids that were trained with their weights.

    Args:
      bits, group_size, symmetric, scale_dtype: of the grid, as for `rtn`.
      epochs: over the training windows; 2 are the authors'.
      batch: windows an update; 2 are the authors'.
      weight_lr: of Adam, in steps of a weight's grid.
      scale_lr: of scales, as a fraction of their first value, and of zeros, in codes. Both rates
        decay by a cosine to a twentieth.
      aug: adds the distance to the teacher's block on the student's stream.
    """
    grid = make_grid("block_ap", bits=bits, group_size=group_size, symmetric=symmetric,
                     scale_dtype=scale_dtype)  # fmt: skip
    check_int("block_ap", "epochs", epochs, 1)
    check_int("block_ap", "batch", batch, 1)
    check_number("block_ap", "weight_lr", weight_lr, 0.0)
    check_number("block_ap", "scale_lr", scale_lr, 0.0)
    check_choice("block_ap", "aug", aug, (True, False))
    trainable = make_trainable(grid)

    @lru_cache(maxsize=4)
    def make_optimizer(updates: int) -> optax.GradientTransformation:
        def adam(lr: float) -> optax.GradientTransformation:
            return optax.adam(optax.cosine_decay_schedule(lr, updates, alpha=LAST))

        def kinds(trained: Params) -> Params:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "weights" if path[-1].key == "moved" else "grid", trained
            )

        return optax.multi_transform({"weights": adam(weight_lr), "grid": adam(scale_lr)}, kinds)

    return Step(
        name="block_ap",
        scope="block",
        run=lambda problem: fit_bases(
            problem, trainable, make_optimizer, epochs=epochs, batch=batch, aug=aug
        ),
        arguments={"bits": bits, "group_size": group_size, "symmetric": symmetric,
                   "epochs": epochs, "batch": batch, "weight_lr": weight_lr,
                   "scale_lr": scale_lr, "aug": aug, "scale_dtype": scale_dtype},
        preview=trainable.preview,
        trained=trainable.count,
        objective_name="what the block answers to the teacher's",
    )  # fmt: skip
