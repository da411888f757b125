"""OmniQuant's learnable weight clipping: the ends of groups' ranges, trained a block at a time.

    hi = σ(γ) max w,  lo = σ(β) min w,  s = (hi - lo) / (2^b - 1),  z = round(-lo / s)

γ and β begin at 4, where σ is 0.98, and are trained so that the block answers as the teacher's does
in both streams (Shao et al. 2023, arXiv:2308.13137, equations 2 and 4); the gradient passes the
rounding of weights unchanged and stops at that of z. Weights are not trained. Of the paper's two
parts this is LWC; LET moves activations' outliers into weights, which serves activation
quantization.

Differs from OpenGVLab/OmniQuant@ec4aded: scales are rounded to their stored dtype while training,
so that what is trained is what is stored; a group of one sign keeps zero inside its range, as its
zero has but `bits` bits; the symmetric grid is s = 2·absmax/(2^b - 1) with one end to learn, where
absmax/(2^(b-1) - 1) would leave 2 bits three levels; the learning rate decays; the best of the
epochs is kept, the start included.
"""

from functools import lru_cache

import jax
import optax

from lqec_jax.core.arguments import check_choice, check_int, check_number
from lqec_jax.core.bases import base_target, replace_base
from lqec_jax.core.clipping import read_clipped, start_clips, store_clipped
from lqec_jax.core.group_grid import GroupGrid, make_grid
from lqec_jax.core.types import Params, Step
from lqec_jax.train.block_fit import Trainable, fit_bases
from lqec_kernels.formats import CompressedLinear

REFERENCE = "OpenGVLab/OmniQuant@ec4aded quantize/quantizer.py"


def make_trainable(grid: GroupGrid) -> Trainable:
    """Returns the clipped grid as something that `train.block_fit` trains."""

    def start(leaf: CompressedLinear) -> Params:
        return start_clips(leaf.d_in, leaf.d_out, grid, "omniquant")

    def read(leaf: CompressedLinear, clips: Params) -> jax.Array:
        return read_clipped(base_target(leaf), clips, grid)

    def store(leaf: CompressedLinear, clips: Params) -> CompressedLinear:
        return replace_base(leaf, store_clipped(base_target(leaf), clips, grid))

    return Trainable(start, read, store)


def omniquant(
    *,
    bits: int = 4,
    group_size: int | None = 64,
    symmetric: bool = False,
    epochs: int = 5,
    batch: int = 4,
    lr: float = 0.05,
    aug: bool = True,
    scale_dtype: str = "float16",
) -> Step:
    """Makes the step that replaces a block's bases by grids with trained ends.

    Args:
      bits, group_size, symmetric, scale_dtype: of the grid, as for `rtn`.
      epochs: over the training windows.
      batch: windows an update.
      lr: of Adam, on logits; decays by a cosine to zero. The authors' is 0.01, constant, for
        epochs of 128 updates of one window, 20 and at 2 bits 40 of them; this one goes as far in
        an eighth of the updates, and the logits have the same size in every model.
      aug: adds the distance to the teacher's block on the student's stream, as the authors do at
        2 bits.
    """
    grid = make_grid("omniquant", bits=bits, group_size=group_size, symmetric=symmetric,
                     scale_dtype=scale_dtype)  # fmt: skip
    check_int("omniquant", "epochs", epochs, 1)
    check_int("omniquant", "batch", batch, 1)
    check_number("omniquant", "lr", lr, 0.0)
    check_choice("omniquant", "aug", aug, (True, False))
    trainable = make_trainable(grid)

    @lru_cache(maxsize=4)
    def make_optimizer(updates: int) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(lr, updates))

    return Step(
        name="omniquant",
        scope="block",
        run=lambda problem: fit_bases(
            problem, trainable, make_optimizer, epochs=epochs, batch=batch, aug=aug
        ),
        arguments={"bits": bits, "group_size": group_size, "symmetric": symmetric,
                   "epochs": epochs, "batch": batch, "lr": lr, "aug": aug,
                   "scale_dtype": scale_dtype},
        preview=trainable.preview,
        trained=trainable.count,
        objective_name="what the block answers in both streams",
    )  # fmt: skip
