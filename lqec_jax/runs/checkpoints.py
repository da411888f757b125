"""Training state between two runs, kept by Orbax, which keeps nothing else."""

import logging
import time
from pathlib import Path
from typing import Any

import jax

from lqec_jax.core.progress import Reporter
from lqec_jax.core.types import Step


class Checkpoints:
    """Keeps the newest training state under a folder: three methods around Orbax's manager.

    A state is (arrays, facts): a pytree, and JSON. It is written under a temporary name and
    renamed, so a kill leaves the one before.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        # Orbax logs every file it touches, and the failures of its own threads, as if ours.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, update: int, arrays: Any, facts: dict) -> None:
        """Begins to write a state; the arrays may be consumed as soon as this returns."""
        self._manager.save(
            update,
            args=self._args.Composite(
                arrays=self._args.StandardSave(arrays), facts=self._args.JsonSave(facts)
            ),
        )

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """Returns the newest whole state, its arrays placed like `like`, or None."""
        update = self._manager.latest_step()
        if update is None:
            return None
        target = jax.tree.map(_abstract, like)
        saved = self._manager.restore(
            update,
            args=self._args.Composite(
                arrays=self._args.StandardRestore(target), facts=self._args.JsonRestore()
            ),
        )
        return saved["arrays"], saved["facts"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


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
