"""One training of a model step: where its state is kept, and to whom it says how far it is."""

import time
from typing import Any

from lqec_jax.core.progress import Reporter
from lqec_jax.core.types import Step
from lqec_jax.io.checkpoints import Checkpoints


class StepSession:
    """A model step's checkpoints and progress; counts the seconds of earlier runs too."""

    def __init__(self, checkpoints: Checkpoints, step: Step, reporter: Reporter, started: float):
        self._checkpoints, self._step, self._reporter = checkpoints, step, reporter
        self._started, self._before, self._begun = started, 0.0, False

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        saved = self._checkpoints.restore(like)
        if saved is None:
            return None
        arrays, facts = saved
        self._before = facts.pop("seconds")
        return arrays, facts

    def save(self, update: int, arrays: Any, facts: dict) -> None:
        self._checkpoints.save(update, arrays, {**facts, "seconds": self.seconds()})

    def progress(self, done: int, total: int, message: str) -> None:
        if not self._begun:
            self._reporter.begin(self._step.name, total, done - 1)
            self._begun = True
        self._reporter.advance(done, message)

    def close(self) -> None:
        self._checkpoints.close()
