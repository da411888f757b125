"""PEQA: the scales of a rounded model learn a task, and its codes stay.

    min over s of  E -log p(x[t+1] | x[..t];  ŵ = s (u - z)),   u and z as they are

(Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit
Integer Quantization", arXiv:2305.14152), so ∂L/∂s = 1/s Σ (∂L/∂ŵ ⊙ ŵ) over a group. One set of
codes serves every task, each with scales of its own, and no adapter is left beside them. `zeros`
moves zero points too, which scales cannot make up for: a group whose codes are all its zero stays
zero whatever its scale.

No code of the authors is known. Differs: a scale moves by fractions of its value, so that one
learning rate means the same for every weight and none crosses zero at a sensible one; the best look
at the validation windows is kept, the start included. `e2e_qp` moves the same numbers on the
calibration text, for a fixed time.
"""

from lqec_jax.core.arguments import check_choice
from lqec_jax.core.factories import makes_step
from lqec_jax.core.types import Schedule, TrainingStep
from lqec_jax.train.losses import ModelLoss, NextToken
from lqec_jax.train.parts import Scales, Zeros
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training

REFERENCE = "our choice"


@makes_step()
def peqa(
    *,
    zeros: bool = False,
    updates: int = 200,
    batch: int = 8,
    accumulate: int | None = None,
    lr: float = 0.002,
    decay: str = "cosine",
    patience: int = 5,
    eval_every: int = 25,
) -> TrainingStep:
    """Makes the step that trains every base's scales on the next token of a task.

    Args:
      zeros: moves the zero points of uniform grids too, in codes; they are stored in float16.
      updates, batch: at most so many updates of so many windows, in `accumulate` equal parts; None
        chooses them, see `train.update.count_parts`.
      lr: of Adam, as a fraction of a scale, and of a zero in codes; `decay` brings it to zero by
        'cosine' or 'linear', or leaves it 'constant'.
      patience, eval_every: stop after so many looks, so many updates apart, without a new best on
        the validation windows; patience=0 never stops early.
    """
    check_choice("peqa", "zeros", zeros, (True, False))
    rates = Rates(lr, decay)
    rates.check("peqa")
    return make_training(
        "peqa",
        [Scales(rates=rates), Zeros(rates=rates)] if zeros else [Scales(rates=rates)],
        ModelLoss((NextToken(),)),
        scope="model",
        schedule=Schedule(updates, batch, accumulate, eval_every, patience),
        objective_name="next-token loss",
    )
