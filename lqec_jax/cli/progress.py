"""How far long work is: a bar on a terminal, plain lines in a log, nothing for `--quiet`."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.text import Text

from lqec_jax.core.progress import Reporter, Silent

# A log gets a line when a tenth more is done or ten seconds have passed, and never two in a second.
TENTH, SECONDS, LEAST_SECONDS = 0.1, 10.0, 1.0


@contextmanager
def reporting(quiet: bool) -> Iterator[Reporter]:
    """Gives the reporter that fits standard error, and takes its bar away at the end."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with Bar(Console(stderr=True)) as bar:
            yield bar
    else:
        yield Log(sys.stderr)


class Pace:
    """Foretells the end of a task from the mean time of the parts done so far.

    Parts of an earlier run do not count: they took no time in this one.
    """

    def __init__(self, total: int, done: int, now: float):
        self.total, self.done, self._first, self._began, self._last = total, done, done, now, now

    def advance(self, done: int, now: float) -> None:
        if done != self.done:  # else only the message is new
            self.done, self._last = done, now

    def seconds_left(self, now: float) -> float | None:
        """Returns None while no part is done."""
        finished = self.done - self._first
        if finished <= 0:
            return None
        part = (self._last - self._began) / finished
        return max(0.0, part * (self.total - self.done) - (now - self._last))


class Log:
    """Plain lines, each complete in itself."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self._stream, self._clock = stream, clock
        self._task, self._pace, self._shown, self._when = "", Pace(0, 0, 0.0), 0, 0.0

    def begin(self, task: str, total: int, done: int = 0) -> None:
        now = self._clock()
        self._task, self._pace = task, Pace(total, done, now)
        self._write(now, "")

    def advance(self, done: int, message: str = "") -> None:
        now, total = self._clock(), self._pace.total
        self._pace.advance(done, now)
        passed = now - self._when
        due = passed >= SECONDS or done - self._shown >= TENTH * total
        if done == total or (due and passed >= LEAST_SECONDS):
            self._write(now, message)

    def say(self, line: str) -> None:
        self._print(line)

    def _write(self, now: float, message: str) -> None:
        self._shown, self._when = self._pace.done, now
        left = self._pace.seconds_left(now)
        line = f"{self._task}: {self._pace.done}/{self._pace.total}"
        if left is not None and self._pace.done < self._pace.total:
            line += f", about {format_seconds(left)} left"
        self._print(f"{line}, {message}" if message else line)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class Bar:
    """A bar with n/m, the time it took and the time that is left; finished ones stay above."""

    def __init__(self, console: Console):
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            TimeLeft(),
            TextColumn("{task.fields[message]}", markup=False),
            console=console,
        )
        self._task = None

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def begin(self, task: str, total: int, done: int = 0) -> None:
        pace = Pace(total, done, time.monotonic())
        self._task = self._progress.add_task(
            task, total=total, completed=done, message="", pace=pace
        )

    def advance(self, done: int, message: str = "") -> None:
        self._progress.tasks[-1].fields["pace"].advance(done, time.monotonic())
        self._progress.update(self._task, completed=done, message=message)

    def say(self, line: str) -> None:
        self._progress.console.print(Text(line))


class TimeLeft(ProgressColumn):
    """Says when a task will be done."""

    def render(self, task) -> Text:
        left = task.fields["pace"].seconds_left(time.monotonic())
        if task.finished or left is None:
            return Text("")
        return Text(f"about {format_seconds(left)} left", style="progress.remaining")


def format_seconds(seconds: float) -> str:
    """Writes a duration with the two units that matter: '9 s', '2 min 5 s', '3 h 7 min'."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
