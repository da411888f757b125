"""Checks of the arguments of methods and verbs, each failing with one line."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

from lqec_jax.errors import InputError

PREFERRED_GROUPS = (128, 64, 32)  # whole words of codes at any width, and sizes that kernels have
T = TypeVar("T")


class Misfit(InputError):
    """An argument that one matrix refuses; it is to suit every matrix that a recipe meets.

    Attributes:
      method: whose argument.
      problem: what is wrong, 'd_in is not divisible by group_size=64'.
      side: what of a matrix the argument has to suit, 'd_in' or 'min(d_in, d_out)'.
      advise: sizes of that side -> what to choose for all of them.
    """

    def __init__(
        self, words: str, *, method: str, problem: str, side: str,
        advise: Callable[[list[int]], str],
    ):  # fmt: skip
        super().__init__(words)
        self.method, self.problem, self.side, self.advise = method, problem, side, advise

    def measure(self, shape: tuple[int, int]) -> int:
        """Returns the side of a matrix [d_in, d_out]."""
        return shape[0] if self.side == "d_in" else min(shape)

    def over(self, refused: Iterable[str], shapes: Mapping[str, tuple], where: str) -> InputError:
        """Says the same of all that refused it, with advice that suits all of `shapes`."""
        by_size: dict[int, list[str]] = {}
        for path in refused:
            by_size.setdefault(self.measure(shapes[path]), []).append(path)
        places = ", ".join(f"{size} ({where}{', '.join(paths)})" for size, paths in by_size.items())
        advice = self.advise([self.measure(shape) for shape in shapes.values()])
        return InputError(f"{self.method}: {self.problem} where that is {places}; {advice}")


def check_all(
    check: Callable[[str], T], shapes: Mapping[str, tuple[int, int]], where: str = ""
) -> dict[str, T]:
    """Checks every weight of a model; an argument that some refuse is refused once, for all.

    Args:
      check: path -> what becomes of the weight; raises for one that it refuses.
      shapes: path -> (d_in, d_out).
      where: is put before the paths in a refusal.
    Raises:
      InputError: a refusal, with the paths of the weights it is of.
    """
    results, misfits = {}, {}
    for path in shapes:
        try:
            results[path] = check(path)
        except Misfit as misfit:
            misfits[path] = misfit
        except InputError as error:
            raise InputError(f"{error} (at {where}{path})") from error
    if misfits:
        first = next(iter(misfits.values()))
        same = [
            p for p, m in misfits.items() if (m.method, m.problem) == (first.method, first.problem)
        ]
        raise first.over(same, shapes, where) from first
    return results


def check_int(method: str, name: str, value: Any, low: int, high: int | None = None) -> int:
    """Returns an integer in [low, high], or says what came."""
    good = isinstance(value, int) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        wanted = f"an integer from {low} to {high}" if high is not None else f"an integer >= {low}"
        raise InputError(f"{method}: {name}={value!r}; {wanted} was wanted")
    return value


def check_number(method: str, name: str, value: Any, low: float, high: float = math.inf) -> float:
    """Returns a finite number in [low, high], or says what came."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: an integer may be too large for a float.
    if not good or not low <= value <= min(high, sys.float_info.max):
        wanted = f"a number from {low:g} to {high:g}" if high < math.inf else f"a number >= {low:g}"
        raise InputError(f"{method}: {name}={value!r}; {wanted} was wanted")
    return value


def check_choice(method: str, name: str, value: Any, choices: Iterable) -> Any:
    """Returns one of the choices, or says what came."""
    choices = tuple(choices)
    if not any(
        value is choice or (type(value) is type(choice) and value == choice) for choice in choices
    ):
        wanted = ", ".join(repr(choice) for choice in choices)
        raise InputError(f"{method}: {name}={value!r}; one of {wanted} was wanted")
    return value


def check_rank(method: str, rank: Any) -> int | float:
    """Returns a rank: an integer >= 1, or a fraction in (0, 1] of min(d_in, d_out)."""
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise InputError(
                f"{method}: rank={rank!r}; an integer >= 1 or a fraction in (0, 1] was wanted"
            )
        return rank
    return check_int(method, "rank", rank, 1)


def resolve_rank(method: str, rank: int | float, d_in: int, d_out: int) -> int:
    """Returns the rank for one matrix; a fraction is of min(d_in, d_out), cut, at least 1.

    Raises:
      InputError: the rank is larger than the matrix allows.
    """
    largest = min(d_in, d_out)
    if isinstance(rank, float):
        return max(1, int(rank * largest + 1e-9))  # 0.29 · 100 is 28.999... in binary
    if rank > largest:
        raise Misfit(
            f"{method}: rank={rank} is larger than min(d_in={d_in}, d_out={d_out})={largest}; "
            f"choose at most {largest}, or a fraction",
            method=method,
            problem=f"rank={rank} is larger than min(d_in, d_out)",
            side="min(d_in, d_out)",
            advise=lambda sizes: f"choose at most {min(sizes)}, or a fraction",
        )
    return rank


def resolve_group(method: str, group_size: int | None, d_in: int) -> int:
    """Returns the group's length for one matrix; None is one group over all of d_in.

    Raises:
      InputError: the length does not divide d_in; names some that do.
    """
    if group_size is None:
        return d_in
    if d_in % group_size:
        raise Misfit(
            f"{method}: d_in={d_in} is not divisible by group_size={group_size}; "
            f"{_advise_groups([d_in], group_size)}",
            method=method,
            problem=f"d_in is not divisible by group_size={group_size}",
            side="d_in",
            advise=lambda sizes: _advise_groups(sizes, group_size),
        )
    return group_size


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Refuses ids that the model has no embedding for; a gather would clamp them silently.

    Raises:
      InputError: an id below 0 or not below vocab_size; names the first and its flat position.
    """
    flat = np.asarray(tokens).reshape(-1)
    outside = np.flatnonzero((flat < 0) | (flat >= vocab_size))
    if outside.size:
        at = int(outside[0])
        raise InputError(
            f"token {at} is id {int(flat[at])}, outside the model's vocabulary of {vocab_size} "
            f"({outside.size} such); use this model's own tokenizer"
        )


def _advise_groups(sizes: list[int], asked: int) -> str:
    """Names up to three lengths that divide every size, those that are preferred first."""
    common = math.gcd(*sizes)
    preferred = [n for n in PREFERRED_GROUPS if common % n == 0]
    others = [n for n in range(min(asked, common), 1, -1) if common % n == 0 and n not in preferred]
    fit = [str(n) for n in (preferred + others)[:3]]
    every = ", which divide every d_in" if len(sizes) > 1 else ""
    return f"choose {' or '.join(fit)}{every}, or group_size=None" if fit else (
        "choose group_size=None: no other length divides every d_in"
    )  # fmt: skip
