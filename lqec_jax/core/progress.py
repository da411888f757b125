"""How long work says how far it is: the command line draws it, a library call stays silent."""

from typing import Protocol


class Reporter(Protocol):
    """What a driver calls; every method returns at once."""

    def begin(self, task: str, total: int, done: int = 0) -> None:
        """A task of `total` equal parts starts, `done` of them finished by an earlier run."""

    def advance(self, done: int, message: str = "") -> None:
        """So many parts of the task are finished."""

    def say(self, line: str) -> None:
        """Something the user should know, once."""


class Silent:
    """Draws nothing."""

    def begin(self, task: str, total: int, done: int = 0) -> None: ...

    def advance(self, done: int, message: str = "") -> None: ...

    def say(self, line: str) -> None: ...
