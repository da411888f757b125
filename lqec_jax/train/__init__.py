"""A training is parts × loss × scope, over one optimization loop. Depends on core only.

`lqec_jax.losses` has the losses of a whole model.
"""

from lqec_jax.core.types import Schedule
from lqec_jax.train import parts
from lqec_jax.train.answers import Answer, LinearAnswer
from lqec_jax.train.moments import Moments
from lqec_jax.train.rates import Rates
from lqec_jax.train.steps import make_training
from lqec_jax.train.update import TrainState, init_state, make_update

__all__ = ["Answer", "LinearAnswer", "Moments", "Rates", "Schedule", "TrainState", "init_state",
           "make_training", "make_update", "parts"]  # fmt: skip
