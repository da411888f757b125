"""EfficientQAT's E2E-QP: the scales of a rounded model trained together on its text.

    min over s of  E -log p(x[t+1] | x[..t];  ŵ = s (u - z)),   u and z as they are

the stage that follows Block-AP (Chen et al. 2024, arXiv:2407.11062, §3.3). A scale is trained as a
fraction of its value, so that one learning rate means the same for every weight: the authors' 2e-5
at 2 bits and width 4096 is about 7e-4 of a scale. Written from the equations. Differs besides: the
base stays packed; scales are float32 while training and stored as they came; the best look at the
validation windows is kept, the start included.
"""

from lqec_jax.core.factories import makes_step
from lqec_jax.core.types import Schedule, TrainingStep
from lqec_jax.train.losses import ModelLoss, NextToken
from lqec_jax.train.parts import Scales
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training, same_key

REFERENCE = "our choice"


@makes_step()
def e2e_qp(
    *,
    updates: int = 128,
    batch: int = 4,
    accumulate: int | None = None,
    lr: float = 0.002,
    eval_every: int = 16,
) -> TrainingStep:
    """Makes the step that trains every base's scales on the next-token loss.

    Args:
      updates, batch: so many updates of so many windows, in `accumulate` equal parts; None chooses
        them, see `train.update.count_parts`. The authors pass once over 4096 windows, 32 an update.
      lr: of Adam, as a fraction of a scale; decays by a cosine to zero.
      eval_every: updates between two looks at the validation windows.
    """
    rates = Rates(lr)
    rates.check("e2e_qp")
    return make_training(
        "e2e_qp",
        [Scales(rates=rates)],
        ModelLoss((NextToken(),)),
        scope="model",
        schedule=Schedule(updates, batch, accumulate, eval_every, patience=0),
        keys=same_key,
        objective_name="next-token loss",
    )
