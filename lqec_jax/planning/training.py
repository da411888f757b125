"""How a step trains, as far as a plan needs it: the one place that asks a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lqec_jax.core.types import Step
from lqec_jax.train.update import count_parts


@dataclass(frozen=True)
class Training:
    """What a step's updates walk over.

    Attributes:
      batch: windows an update sees; 0 where it reads moments of the inputs and no window.
      updates: of the model, of a block, or of each weight on moments; None where epochs are given.
      epochs: over the training windows; None where updates are given.
      accumulate: parts of a batch; None where the machine chooses.
      look_every: updates between two looks at the other windows; there is one after each epoch.
    """

    batch: int
    updates: int | None = None
    epochs: int | None = None
    accumulate: int | None = None
    look_every: int | None = None

    @property
    def on_moments(self) -> bool:
        return not self.batch

    def count_windows(self, train: int) -> int:
        """Returns how many of `train` windows are trained on, repeats counted."""
        return self.epochs * train if self.epochs else self.batch * self.updates

    def count_looks(self) -> int:
        """Returns how often the validation windows are walked, before the first update too."""
        return 1 + (self.epochs or self.updates // self.look_every)

    def count_at_once(self, seqlen: int, backend: str) -> int:
        """Returns how many windows of a batch walk together."""
        return self.batch // (self.accumulate or count_parts(self.batch, seqlen, backend=backend))


def read_training(step: Step) -> Training:
    """Returns how a step of a block or of the model trains."""
    arguments: Mapping[str, Any] = step.arguments
    if "epochs" in arguments and arguments.get("scope") == "linear":
        return Training(0, updates=arguments["updates"])
    if "epochs" in arguments:
        return Training(arguments["batch"], epochs=arguments["epochs"])
    names = {"updates": "updates", "accumulate": "accumulate", "look_every": "eval_every"}
    return Training(arguments["batch"], **{name: arguments[its] for name, its in names.items()})
