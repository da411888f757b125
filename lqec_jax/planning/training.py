"""How a step trains, as far as a plan needs it: the one place that asks a step."""

from dataclasses import dataclass

from lqec_jax.core.types import Schedule, TrainingStep
from lqec_jax.train.update import count_parts


@dataclass(frozen=True)
class Training:
    """What a step's updates walk over."""

    schedule: Schedule

    @property
    def on_moments(self) -> bool:
        """Says whether it reads moments of the inputs, and no window."""
        return self.schedule.batch is None

    def count_windows(self, train: int) -> int:
        """Returns how many of `train` windows are trained on, repeats counted."""
        schedule = self.schedule.resolve(train)
        return schedule.batch * schedule.updates

    def count_looks(self, train: int) -> int:
        """Returns how often the validation windows are walked, before the first update too."""
        schedule = self.schedule.resolve(train)
        return 1 + schedule.updates // schedule.eval_every

    def count_at_once(self, seqlen: int, backend: str) -> int:
        """Returns how many windows of a batch walk together."""
        batch, parts = self.schedule.batch, self.schedule.accumulate
        return batch // (parts or count_parts(batch, seqlen, backend=backend))


def read_training(step: TrainingStep) -> Training:
    """Returns how a step of a block or of the model trains."""
    return Training(step.schedule)
