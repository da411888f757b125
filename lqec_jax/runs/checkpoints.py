"""Training state between two runs, kept by Orbax, which keeps nothing else."""

import errno
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lqec_jax.core.hashing import hash_parts
from lqec_jax.core.progress import Reporter
from lqec_jax.core.types import Step
from lqec_jax.errors import InputError

# As tensorstore, which writes for Orbax, and the kernel say it.
_DISK_FULL = re.compile(r"RESOURCE_EXHAUSTED|No space left|Disk quota|os error: ENOSPC", re.I)


class Checkpoints:
    """Keeps the newest training state under a folder: three methods around Orbax's manager.

    A state is (arrays, facts): a pytree, and JSON. It is written under a temporary name and
    renamed, so a kill leaves the one before. With it goes a digest of both, because not every
    damaged byte of Orbax's files is an error to it.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        # Orbax logs every file it touches, and the failures of its own threads and tasks, as ours.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._args = ocp.args
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, update: int, arrays: Any, facts: dict) -> None:
        """Begins to write a state; the arrays may be consumed as soon as this returns.

        Raises:
          OSError: the disk is full, or was while the state before this one was written.
        """
        kept = {"facts": facts, "sha256": _digest(arrays, facts)}
        with self._writing():
            self._manager.save(
                update,
                args=self._args.Composite(
                    arrays=self._args.StandardSave(arrays), facts=self._args.JsonSave(kept)
                ),
            )

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """Returns the newest whole state, its arrays placed like `like`, or None.

        Raises:
          InputError: it is damaged.
        """
        update = self._manager.latest_step()
        if update is None:
            return None
        target = jax.tree.map(_abstract, like)
        try:
            saved = self._manager.restore(
                update,
                args=self._args.Composite(
                    arrays=self._args.StandardRestore(target), facts=self._args.JsonRestore()
                ),
            )
        except Exception as error:  # whatever Orbax, zarr and tensorstore make of other bytes
            raise self._damaged(update, f"{type(error).__name__} at reading it") from error
        arrays, kept = saved["arrays"], saved["facts"]
        if not isinstance(kept, dict):
            raise self._damaged(update, "its facts are no object")
        if "sha256" not in kept:  # of a version that kept none
            return arrays, kept
        if kept["sha256"] not in (None, _digest(arrays, kept.get("facts"))):
            raise self._damaged(update, "it is not as it was written (sha256 differs)")
        return arrays, kept["facts"]

    def _damaged(self, update: int, what: str) -> InputError:
        return InputError(
            f"{self._folder / str(update)}, a training's state, is damaged: {what}; remove "
            f"{self._folder} and run again with --resume, which begins this training anew"
        )

    def close(self) -> None:
        """Waits until everything is on disk.

        Raises:
          OSError: the disk is full.
        """
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says a full disk as the operating system does, whoever noticed it."""
        try:
            yield
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not (full or _DISK_FULL.search(str(error))):
                raise
            reason = f"{os.strerror(errno.ENOSPC)} while a training's state was written"
            raise OSError(errno.ENOSPC, reason, str(self._folder)) from error


def _digest(arrays: Any, facts: Any) -> str | None:
    """Hashes a state; None where other processes hold a part of it."""
    leaves = jax.tree.leaves(arrays)
    if not all(leaf.is_fully_addressable for leaf in leaves):
        return None
    text = json.dumps(json.loads(json.dumps(facts)), sort_keys=True)
    return hash_parts([text, *map(np.asarray, leaves)])


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
