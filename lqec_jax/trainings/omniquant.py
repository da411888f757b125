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

from lqec_jax.core.arguments import check_choice
from lqec_jax.core.factories import makes_step
from lqec_jax.core.group_grid import make_grid
from lqec_jax.core.types import Schedule, TrainingStep
from lqec_jax.train.answers import Answer
from lqec_jax.train.parts import Clips
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training, same_key

REFERENCE = "OpenGVLab/OmniQuant@ec4aded quantize/quantizer.py"


@makes_step()
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
) -> TrainingStep:
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
    check_choice("omniquant", "aug", aug, (True, False))
    rates = Rates(lr)
    rates.check("omniquant")
    return make_training(
        "omniquant",
        [Clips(grid=grid, tiled=False, rates=rates)],
        Answer(aug),
        scope="block",
        schedule=Schedule(epochs=epochs, batch=batch, accumulate=None, patience=0),
        keys=same_key,
        objective_name="what the block answers in both streams",
    )
