"""How far an update moves: rates, their fall, and the optimizer of a training's parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from lqec_jax.core.arguments import check_choice, check_int, check_number
from lqec_jax.core.types import Params, Schedule
from lqec_jax.errors import InputError

OPTIMIZERS = ("adamw", "adam", "adafactor")
DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Rates:
    """How far a part's numbers move, in the part's own units.

    Attributes:
      lr: the highest rate of Adam; None is the part's rule.
      decay: 'cosine' or 'linear' to `last` of it, or 'constant'.
      warmup: updates, or their fraction, on a rising line before; None is a rate without one.
      weight_decay: decoupled; None has no place for it.
      optimizer: Adafactor is without momentum, without relative steps and with updates clipped to
        an rms of 1, as in Hugging Face's trainer; its second moments are factored where the two
        longest sides of a stack are 128 or more.
    """

    lr: float | None = None
    decay: str = "cosine"
    last: float = 0.0
    warmup: int | float | None = None
    weight_decay: float | None = None
    optimizer: str = "adamw"

    def check(self, method: str, name: str = "lr") -> None:
        """Checks what a recipe said.

        Raises:
          InputError: the first that cannot be.
        """
        check_choice(method, "optimizer", self.optimizer, OPTIMIZERS)
        check_choice(method, "decay", self.decay, DECAYS)
        if self.lr is not None:
            check_number(method, name, self.lr, 0.0)
        if self.weight_decay is not None:
            check_number(method, "weight_decay", self.weight_decay, 0.0)
        if isinstance(self.warmup, float):
            check_number(method, "warmup", self.warmup, 0.0, 1.0)
        elif self.warmup is not None:
            check_int(method, "warmup", self.warmup, 0)
        if self.optimizer == "adam" and self.weight_decay:
            raise InputError(
                f"{method}: weight_decay={self.weight_decay} and optimizer='adam', which has "
                "none; take 'adamw'"
            )

    def follow(self, peak: float, updates: int) -> float | optax.Schedule:
        """Returns the rate by update: up in a line to the peak, then down, or not."""
        if self.decay == "constant" and self.warmup is None:
            return peak
        warmup = self.warmup or 0
        rising = round(warmup * updates) if isinstance(warmup, float) else min(warmup, updates)
        left = max(1, updates - rising)
        falling = {
            "cosine": optax.cosine_decay_schedule(peak, left, alpha=self.last),
            "linear": optax.linear_schedule(peak, self.last * peak, left),
            "constant": optax.constant_schedule(peak),
        }[self.decay]
        if not rising:
            return falling
        climb = optax.linear_schedule(peak / (rising + 1), peak, rising)
        return optax.join_schedules([climb, falling], [rising])

    def chain(
        self, peak: float, updates: int, before: Iterable = (), after: Iterable = ()
    ) -> optax.GradientTransformation:
        """Returns the optimizer: `before` turns gradients, `after` steps into the part's units."""
        core = (optax.scale_by_adam(),)
        if self.optimizer == "adafactor":
            core = (optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        decay = () if self.weight_decay is None else (optax.add_decayed_weights(self.weight_decay),)
        rate = optax.scale_by_learning_rate(self.follow(peak, updates))
        return optax.chain(*before, *core, *after, *decay, rate)


def times_value() -> optax.GradientTransformation:
    """Makes steps fractions of what they change."""
    return optax.stateless(lambda steps, params: jax.tree.map(_times_size, steps, params))


def _times_size(step: jax.Array, value: jax.Array) -> jax.Array:
    return step * jnp.abs(value)


@lru_cache(maxsize=64)
def make_optimizer(parts: tuple, width: int, updates: int) -> optax.GradientTransformation:
    """Returns one optimizer for all parts, by the labels they give what moves.

    Equal arguments give one object: compiled programs are kept by it.

    Args:
      parts: of a training, see `train.parts`.
      width: of the model.
    """
    kinds = {}
    for part in parts:
        kinds |= part.optimizers(width, updates)
    if len(kinds) == 1:
        return next(iter(kinds.values()))

    def label(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, array: find_label(parts, path, array), params
        )

    return optax.partition(kinds, label)


def find_label(parts: tuple, path: tuple, array: jax.Array) -> str | None:
    """Returns under which label an array moves, None where it stays; the first part decides."""
    labels = (part.label(path, array) for part in parts)
    return next((label for label in labels if label is not None), None)


def check_schedule(method: str, schedule: Schedule) -> None:
    """Checks how long a training is to run.

    Raises:
      InputError: the first that cannot be.
    """
    for name in ("updates", "epochs", "batch", "eval_every"):
        if (value := getattr(schedule, name)) is not None:
            check_int(method, name, value, 1)
    check_int(method, "patience", schedule.patience, 0)
    if (parts := schedule.accumulate) is None:
        return
    check_int(method, "accumulate", parts, 1)
    if schedule.batch is not None and schedule.batch % parts:
        raise InputError(
            f"{method}: batch={schedule.batch} does not divide into accumulate={parts} equal "
            "parts; choose a divisor"
        )
