"""The errors a user can cause, each one line: what came, what was wanted, what to do.

`InputError` is a `ValueError`, so a script may catch either; the command line prints it after
`error: ` and exits with 2. `CheckFailed` exits with 3. Everything else is our fault and exits with
1. Whatever came, a message repeats about 200 characters of it and has fewer than 500.
"""

import difflib
import re
from collections.abc import Iterable

LONGEST = 480  # characters of a message
LONGEST_WORD = 200  # of a word, or of what is in quotes
_LONG_WORD = re.compile(
    rf"'[^']{{{LONGEST_WORD},}}'|\"[^\"]{{{LONGEST_WORD},}}\"|\S{{{LONGEST_WORD},}}"
)


class InputError(ValueError):
    """The user's input cannot be used."""

    exit_code = 2

    def __init__(self, message: object = ""):
        super().__init__(shorten(str(message)))


class CheckFailed(RuntimeError):
    """A check that the user asked for did not hold."""

    exit_code = 3

    def __init__(self, message: object = ""):
        super().__init__(shorten(str(message)))


class NotFinite(InputError, FloatingPointError):
    """The model or the text made numbers that no float holds; a row of a comparison may say so."""


class MissingExtra(InputError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"pip install 'lqec-jax[{extra}]'"
        )


def shorten(text: str) -> str:
    """Leaves out the middle of words that are too long, and of a text that is.

    What is wrong stands at a message's beginning, and what to do at its end.
    """
    text = _LONG_WORD.sub(lambda word: _cut(word[0], LONGEST_WORD), text)
    return _cut(text, LONGEST)


def _cut(text: str, longest: int) -> str:
    head = longest * 3 // 5
    tail = longest - head - len(" ... ")
    return text if len(text) <= longest else f"{text[:head]} ... {text[-tail:]}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the nearest known word, or the whole list of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
