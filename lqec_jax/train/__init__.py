"""One optimization loop for every gradient method. Depends on core only."""

from lqec_jax.train.update import TrainState, init_state, make_update

__all__ = ["TrainState", "init_state", "make_update"]
