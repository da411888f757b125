"""A layer under everything that a run writes, which counts the writes and fails at one of them.

A write is: rows of a stream, a file that is about to take its name, a state of a training, a folder
that is about to take its name, the reservation of an array's place.
"""

from collections.abc import Callable
from contextlib import contextmanager

import pytest

from lqec_jax.core import disk
from lqec_jax.io import files
from lqec_jax.runs import folder, record
from lqec_jax.runs.checkpoints import Checkpoints


class Killed(SystemExit):
    """Stands for the death of the process; of a kind that the command line lets through."""


class Disk:
    """Counts writes; at number `last`, from 1, `fail` is called and so is every later one."""

    def __init__(self, last: int | None = None, fail: Callable[[], None] | None = None):
        self.count, self._last, self._fail = 0, last, fail

    def write(self) -> None:
        self.count += 1
        if self._last is not None and self.count >= self._last:
            self._fail()

    def under(self, patch: pytest.MonkeyPatch) -> None:
        """Puts itself under the writes."""
        staged_file, save = files.staged_file, Checkpoints.save

        @contextmanager
        def staged(path):
            with staged_file(path) as temporary:
                yield temporary
                self.write()  # all of it is there, under a name that nobody reads

        def save_whole(checkpoints, *arguments):
            self.write()
            save(checkpoints, *arguments)
            # Its thread would outlive what stands for the death of the process.
            checkpoints._manager.wait_until_finished()

        patch.setattr(files, "staged_file", staged)
        patch.setattr(Checkpoints, "save", save_whole)
        for owner, name in ((record.StreamWriter, "put"), (folder, "replace_folder"),
                            (disk, "reserve")):  # fmt: skip
            patch.setattr(owner, name, self._before(getattr(owner, name)))

    def _before(self, inner: Callable) -> Callable:
        def counted(*arguments, **named):
            self.write()
            return inner(*arguments, **named)

        return counted
