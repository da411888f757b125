"""Checks of recipe arguments: what passes, and the one line that refuses the rest."""

import math

import numpy as np
import pytest

from lqec_jax.core.arguments import (
    check_all,
    check_choice,
    check_int,
    check_number,
    check_rank,
    check_tokens,
    resolve_group,
    resolve_rank,
)
from lqec_jax.errors import InputError, shorten

HUGE = 10**4000


def refusal(check, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        check(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(("rtn: ", "token "))
    return message


def test_integers_in_range_pass():
    assert [check_int("rtn", "bits", n, 1, 8) for n in (1, 8)] == [1, 8]
    assert check_int("rtn", "group_size", HUGE, 1) == HUGE


@pytest.mark.parametrize("value", [0, 9, -HUGE, True, 2.0, "2", None, [2], 1j])
def test_other_integers_are_refused_with_what_came_and_what_was_wanted(value):
    message = refusal(check_int, "rtn", "bits", value, 1, 8)
    assert message == shorten(f"rtn: bits={value!r}; an integer from 1 to 8 was wanted")


def test_an_open_range_says_only_its_low_end():
    message = refusal(check_int, "rtn", "group_size", 0, 1)
    assert message == "rtn: group_size=0; an integer >= 1 was wanted"


def test_numbers_may_be_whole_or_not():
    assert check_number("rtn", "lr", 1, 0.0) == 1
    assert check_number("rtn", "lr", 1e-4, 0.0) == 1e-4
    assert check_number("rtn", "damp", 1.0, 0.0, 1.0) == 1.0


@pytest.mark.parametrize("value", [-1e-9, 1.5, math.inf, -math.inf, math.nan, False, "1", None])
def test_other_numbers_are_refused(value):
    message = refusal(check_number, "rtn", "damp", value, 0.0, 1.0)
    assert message == f"rtn: damp={value!r}; a number from 0 to 1 was wanted"


def test_an_integer_beyond_floats_is_refused_not_an_overflow():
    assert refusal(check_number, "rtn", "lr", HUGE, 0.0).endswith("a number >= 0 was wanted")


def test_choices_are_compared_with_their_type():
    assert check_choice("rtn", "symmetric", True, (True, False)) is True
    assert check_choice("rtn", "dtype", "float16", {"float16": 1}) == "float16"
    for value in (1, "true", None, [True]):
        message = refusal(check_choice, "rtn", "symmetric", value, (True, False))
        assert message == f"rtn: symmetric={value!r}; one of True, False was wanted"


def test_ranks_are_integers_or_fractions():
    assert check_rank("rtn", 64) == 64
    assert check_rank("rtn", 0.1) == 0.1 and check_rank("rtn", 1.0) == 1.0
    for value in (0, -1, 0.0, 1.5, math.nan, True, "8", None):
        assert f"rank={value!r}" in refusal(check_rank, "rtn", value)


@pytest.mark.parametrize(
    ("rank", "shape", "wanted"),
    [
        (5, (8, 5), 5),
        (1.0, (8, 5), 5),
        (0.5, (64, 256), 32),
        (0.1, (352, 128), 12),
        (0.29, (100, 100), 29),
        (0.001, (64, 64), 1),
    ],
)
def test_a_fraction_is_of_the_smaller_side(rank, shape, wanted):
    assert resolve_rank("rtn", rank, *shape) == wanted


def test_a_rank_above_the_smaller_side_is_refused_with_the_largest_that_fits():
    message = refusal(resolve_rank, "rtn", 6, 8, 5)
    assert message == (
        "rtn: rank=6 is larger than min(d_in=8, d_out=5)=5; choose at most 5, or a fraction"
    )


def test_groups_divide_or_are_the_whole():
    assert resolve_group("rtn", 32, 96) == 32
    assert resolve_group("rtn", None, 96) == 96


@pytest.mark.parametrize(
    ("group_size", "d_in", "advice"),
    [
        (64, 96, "choose 32 or 48 or 24"),
        (128, 192, "choose 64 or 32 or 96"),
        (100, 4096, "choose 128 or 64 or 32"),
        (48, 352, "choose 32 or 44 or 22"),
        (64, 172, "choose 43 or 4 or 2"),
        (200, 288, "choose 32 or 144 or 96"),
    ],
)
def test_a_group_that_does_not_divide_is_refused_with_those_that_do(group_size, d_in, advice):
    message = refusal(resolve_group, "rtn", group_size, d_in)
    assert message == (
        f"rtn: d_in={d_in} is not divisible by group_size={group_size}; {advice}, or "
        "group_size=None"
    )


def test_an_id_outside_the_vocabulary_is_named_by_position():
    tokens = np.array([[0, 104], [3, 4]], np.int32)
    check_tokens(tokens, 105)
    message = refusal(check_tokens, tokens, 104)
    assert "token 1 is id 104, outside the model's vocabulary of 104 (1 such)" in message
    assert "token 2 is id -7" in refusal(check_tokens, np.array([1, 2, -7, 900]), 10)


def test_where_nothing_divides_the_whole_is_one_group():
    message = refusal(resolve_group, "rtn", 2, 7)
    assert message.endswith("; choose group_size=None: no other length divides every d_in")


SHAPES = {"q": (64, 64), "k": (64, 16), "up": (64, 172), "down": (172, 64)}


@pytest.mark.parametrize(
    ("group_size", "shapes", "where", "advice"),
    [
        (64, SHAPES, "172 (every block's down)", "4 or 2"),
        (43, SHAPES, "64 (every block's q, k, up)", "4 or 2"),
        (48, SHAPES, "64 (every block's q, k, up), 172 (every block's down)", "4 or 2"),
        (
            256,
            {"q": (4096, 1), "down": (11136, 1)},
            "11136 (every block's down)",
            "128 or 64 or 32",
        ),
    ],
)
def test_groups_that_some_weights_refuse_are_advised_for_all(group_size, shapes, where, advice):
    def check(path):
        return resolve_group("rtn", group_size, shapes[path][0])

    message = refusal(check_all, check, shapes, "every block's ")
    assert message == (
        f"rtn: d_in is not divisible by group_size={group_size} where that is {where}; choose "
        f"{advice}, which divide every d_in, or group_size=None"
    )
    for advised in advice.split(" or "):
        group_size = int(advised)
        assert check_all(check, shapes) == dict.fromkeys(shapes, group_size)


def test_a_rank_that_some_weights_refuse_is_advised_for_all():
    shapes = SHAPES | {"v": (64, 8)}
    message = refusal(check_all, lambda path: resolve_rank("rtn", 32, *shapes[path]), shapes)
    assert message == (
        "rtn: rank=32 is larger than min(d_in, d_out) where that is 16 (k), 8 (v); choose at "
        "most 8, or a fraction"
    )


def test_other_refusals_name_their_weight_and_come_first():
    def check(path):
        if path == "up":
            raise InputError("rtn: not this one; choose another")
        return resolve_group("rtn", 48, SHAPES[path][0])

    message = refusal(check_all, check, SHAPES, "every block's ")
    assert message == "rtn: not this one; choose another (at every block's up)"
