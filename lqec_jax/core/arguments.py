"""Checks of the arguments of methods and verbs, each failing with one line."""

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from lqec_jax.errors import InputError


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
        raise InputError(
            f"{method}: rank={rank} is larger than min(d_in={d_in}, d_out={d_out})={largest}; "
            f"choose at most {largest}, or a fraction"
        )
    return rank


def resolve_group(method: str, group_size: int | None, d_in: int) -> int:
    """Returns the group's length for one matrix; None is one group over all of d_in.

    Raises:
      InputError: the length does not divide d_in; names the nearest that do.
    """
    if group_size is None:
        return d_in
    if d_in % group_size:
        smaller = max(n for n in range(1, min(group_size, d_in) + 1) if d_in % n == 0)
        raise InputError(
            f"{method}: d_in={d_in} is not divisible by group_size={group_size}; "
            f"choose a divisor such as {smaller}, or group_size=None"
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
