"""The errors a user can cause, each one line: what came, what was wanted, what to do.

`InputError` is a `ValueError`, so a script may catch either; the command line prints it after
`error: ` and exits with 2. `CheckFailed` exits with 3. Everything else is our fault and exits with
1.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input cannot be used."""

    exit_code = 2


class CheckFailed(RuntimeError):
    """A check that the user asked for did not hold."""

    exit_code = 3


class MissingExtra(InputError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"pip install 'lqec-jax[{extra}]'"
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the nearest known word, or the whole list of them."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
