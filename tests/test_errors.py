"""The errors a user can cause: their codes, their words."""

import pytest

from lqec_jax.errors import CheckFailed, InputError, MissingExtra, did_you_mean


def test_exit_codes():
    assert (InputError.exit_code, CheckFailed.exit_code, MissingExtra.exit_code) == (2, 3, 2)


def test_an_input_error_may_be_caught_as_a_value_error():
    with pytest.raises(ValueError, match="rtn: bits=9"):
        raise InputError("rtn: bits=9")
    assert not issubclass(CheckFailed, ValueError)


@pytest.mark.parametrize("kind", [InputError, CheckFailed])
def test_a_message_is_short_whatever_came(kind):
    said = "no folder /models/llama; wanted a folder with config.json, or a hub id"
    assert str(kind(said)) == said
    for long in ("x" * 3000, repr("a b " * 3000), "/deep" * 3000, "'" * 3000, "word " * 3000):
        message = str(kind(f"rtn: bits={long}; an integer was wanted"))
        assert len(message) <= 480 and " ... " in message
        assert message.startswith("rtn: bits=") and message.endswith("; an integer was wanted")
        assert message.count(long[5:15]) * 10 <= 480
    quoted = str(kind(f"bits={'a b ' * 3000!r}; an integer was wanted"))
    assert len(quoted) < 250  # the value is cut by itself
    again = str(kind(f"{kind(said * 40)} (at w)"))
    assert len(again) <= 480 and again.endswith(" (at w)")


def test_a_missing_extra_says_what_for_and_how_to_get_it():
    error = MissingExtra("pyarrow", "parquet", "reading a .parquet")
    assert str(error) == (
        "reading a .parquet needs the package 'pyarrow', which is not installed; "
        "pip install 'lqec-jax[parquet]'"
    )


def test_the_nearest_known_word_is_named():
    assert did_you_mean("rtm", {"rtn", "rilq"}) == "; did you mean 'rtn'?"
    assert did_you_mean("grup_size", ["bits", "group_size"]) == "; did you mean 'group_size'?"


def test_a_word_near_nothing_gets_the_list_in_order():
    assert did_you_mean("quantise", {"svd", "rtn"}) == "; known: rtn, svd"
    assert did_you_mean("", ["b", "a"]) == "; known: a, b"
