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

from lqec_jax.core.arguments import check_choice
from lqec_jax.core.factories import makes_step
from lqec_jax.core.group_grid import make_grid
from lqec_jax.core.types import Schedule, TrainingStep
from lqec_jax.train.answers import Answer
from lqec_jax.train.parts import Grid
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training, same_key

REFERENCE = "our choice"

# The rate that a decay ends at, of the first.
LAST = 0.05


@makes_step()
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
) -> TrainingStep:
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
    check_choice("block_ap", "aug", aug, (True, False))
    weights, others = Rates(weight_lr, last=LAST), Rates(scale_lr, last=LAST)
    weights.check("block_ap", "weight_lr")
    others.check("block_ap", "scale_lr")
    return make_training(
        "block_ap",
        [Grid(grid=grid, rates=weights, grid_rates=others)],
        Answer(aug),
        scope="block",
        schedule=Schedule(epochs=epochs, batch=batch, accumulate=None, patience=0),
        keys=same_key,
        objective_name="what the block answers to the teacher's",
    )
